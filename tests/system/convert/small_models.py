"""Small models of classes of transformers, with random weights that all affect the logits."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    utils,
)

from mea_jax.data import tokenizers

torch.set_num_threads(1)
utils.logging.disable_progress_bar()

VOCABULARY = 280  # the tokenizer has 264 ids: published vocabularies are padded too
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # N H is not D, as in Qwen3
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Changes frequencies whose wavelength is above 16 / 4 positions.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Changes the frequencies of pairs 1 to 7 of 8, and by mscale the logits.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}

SPECIAL: dict[str, Any] = {"pad_token_id": None}  # whose default is beyond our vocabulary


@dataclasses.dataclass(frozen=True)
class Kind:
    config: Any
    model: Any
    changes: dict[str, Any]


KINDS = {
    "llama linear": Kind(
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "llama dynamic": Kind(
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
            "max_position_embeddings": 64,
        },
    ),
    "qwen3 yarn": Kind(Qwen3Config, Qwen3ForCausalLM, {"rope_parameters": YARN}),
    "mistral": Kind(MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral window": Kind(MistralConfig, MistralForCausalLM, {"sliding_window": 20}),
    "llama biases": Kind(LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "qwen2": Kind(Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2 window": Kind(
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "smollm3": Kind(SmolLM3Config, SmolLM3ForCausalLM, SPECIAL | {"no_rope_layer_interval": 2}),
    "olmo2": Kind(Olmo2Config, Olmo2ForCausalLM, SPECIAL),
    "gemma3": Kind(
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        SPECIAL
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "llama": Kind(LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama tied": Kind(LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": Kind(Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3 tied": Kind(Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3_moe": Kind(Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS),
    "qwen3_moe tied": Kind(
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        EXPERTS | {"tie_word_embeddings": True, "norm_topk_prob": False},
    ),
}


def make(kind: str, **changes: Any) -> Any:
    """Return a model whose logits have a spread of about one and whose norm weights are random."""
    found = KINDS[kind]
    torch.manual_seed(len(kind))
    model = found.model(found.config(**(SHAPE | found.changes | changes)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_((0 if kind.startswith("gemma") else 1) + 0.3 * noise)
            elif name.endswith("bias"):
                weight.copy_(noise)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
    return model.eval()


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Save a model as transformers does, with a tokenizer of 264 ids; return `folder`."""
    model.save_pretrained(folder, **options)
    words = "the quick brown fox jumps over the lazy dog"
    tokenizers.train_bpe(iter([words]), 264).save(folder)
    return folder


def tokens(seed: int, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, length), np.int32)


def logits(model: Any, tokens_BT: np.ndarray, **arguments: Any) -> np.ndarray:
    """Return the float32 logits of a model of transformers."""
    inputs = {name: torch.tensor(value) for name, value in arguments.items()}
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens_BT).long(), **inputs).logits.numpy()
