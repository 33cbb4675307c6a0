"""Multi-head Explicit Attention for vLLM: a plug-in, stored next to the weights that it serves.

    PYTHONPATH=FOLDER vllm serve FOLDER

A layer is Llama's, with one key/value head as wide as what it caches, and a query projection that
contains the mixing of keys (mea_jax/convert/absorbed.py). Beyond what a stock class has, each layer
has a width and rotary frequencies of its own, and between attention and the output projection a map
of cached values to heads, a norm of each head, and a gate. Tested with vLLM 0.32.

Letters: T tokens, D model width, N query heads and K composite heads of this process, R cached
features of the layer, H features of a composite head.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index


class MEALlamaConfig(LlamaConfig):
    """A Llama's config, with `mea`: what each layer has beyond a Llama's."""

    model_type = "mea_llama"


class MEALlamaAttention(LlamaAttention):
    """Attention to component heads, and what follows it."""

    def __init__(self, config: Any, hidden_size: int, num_heads: int, prefix: str, **others: Any):
        mea, index = config.mea, extract_layer_index(prefix)
        self.waves = mea["wavelengths"][index]
        own = copy.copy(config)
        own.head_dim = mea["widths"][index]
        own.rope_parameters = {
            "rope_type": "longrope",
            "rope_theta": 1.0,
            "short_factor": self.waves,
            "long_factor": self.waves,
            "original_max_position_embeddings": config.max_position_embeddings,
        }
        super().__init__(own, hidden_size, num_heads, prefix=prefix, **others)
        self.size, self.eps, self.has_map = mea["head_dim"], config.rms_norm_eps, mea["maps_values"]
        # Of this process: the first composite head, and how many its query heads belong to.
        group = self.total_num_heads // mea["composite_heads"]
        self.first = get_tensor_model_parallel_rank() * self.num_heads // group
        self.count = max(self.num_heads // group, 1)
        if max(self.num_heads, group) % min(self.num_heads, group):
            raise ValueError(
                f"{self.num_heads} query heads of a process are not whole groups of {group}"
            )
        if self.has_map:
            maps = torch.empty(mea["composite_heads"], self.head_dim, self.size)
            self.value_map = nn.Parameter(maps, requires_grad=False)
            self.o_proj = RowParallelLinear(
                input_size=self.total_num_heads * self.size,
                output_size=hidden_size,
                bias=others.get("bias_o_proj", False),
                quant_config=others.get("quant_config"),
                prefix=f"{prefix}.o_proj",
            )
        self.head_norm = self.head_gate = None
        if mea["head_norm"]:
            self.head_norm = nn.Parameter(torch.empty(self.size), requires_grad=False)
        if width := {"none": 0, "head": 1, "feature": self.size}[mea["gate"]]:
            self.head_gate = ColumnParallelLinear(
                hidden_size, self.total_num_heads * width, bias=False, prefix=f"{prefix}.head_gate"
            )

    def _init_rotary_emb(self, config: Any, quant_config: Any) -> None:
        if self.waves is not None:
            super()._init_rotary_emb(config, quant_config)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.waves is not None:
            q, k = self.rotary_emb(positions, q, k)
        o = self.attn(q, k, v)
        if self.has_map:
            o_TKGR = o.view(len(o), self.count, -1, self.head_dim)
            maps_KRH = self.value_map[self.first : self.first + self.count].to(o.dtype)
            o_TNH = torch.einsum("tkgr,krh->tkgh", o_TKGR, maps_KRH).flatten(1, 2)
            if self.head_norm is not None:
                x = o_TNH.float()
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
                o_TNH = (x * self.head_norm.float()).to(o.dtype)
            if self.head_gate is not None:
                gate, _ = self.head_gate(hidden_states)
                gate_TNX = gate.view(len(o), self.num_heads, -1)
                o_TNH = o_TNH * torch.sigmoid(gate_TNX.float()).to(o.dtype)
            o = o_TNH.flatten(1)
        output, _ = self.o_proj(o)
        return output


class MEALlamaDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with `MEALlamaAttention`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None):
        super().__init__(vllm_config, prefix, config, attn_layer_type=MEALlamaAttention)


class MEALlamaForCausalLM(LlamaForCausalLM):
    """A causal language model of such layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=MEALlamaDecoderLayer)


def register() -> None:
    """Make the model known to vLLM, which calls this in each of its processes."""
    AutoConfig.register(MEALlamaConfig.model_type, MEALlamaConfig, exist_ok=True)
    name = MEALlamaForCausalLM.__name__
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, f"{__name__}:{name}")
