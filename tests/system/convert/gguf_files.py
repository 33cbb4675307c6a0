"""Small GGUF files, written with llama.cpp's own package from small models of transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from mea_jax.convert import gguf_file

# The names by which a file of our test models is written; the reader has the inverse table.
_NAMES = {theirs: ours for ours, theirs in (gguf_file._TOP | gguf_file._LAYER).items()}
# Dimensions that the blocks of all types divide, 256 numbers each.
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def to_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """Return a projection with rotary halves as one of adjacent pairs, feature by feature."""
    width = array.shape[0] // heads
    order = [
        head * width + i % 2 * (width // 2) + i // 2 for head in range(heads) for i in range(width)
    ]
    return array[np.array(order)]


def quantised(array: np.ndarray, kind: Type) -> np.ndarray:
    """Return the bytes of `array` in a type; random blocks if the package cannot quantise to it."""
    try:
        return gguf.quantize(array, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows = np.random.default_rng(0).integers(
            0, 256, (array.shape[0], array.shape[1] // block, size), np.uint8
        )
        # Two float16 scales of each block: finite ones.
        for start in {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}[kind]:
            rows[:, :, start : start + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        return rows.reshape(array.shape[0], -1)


def write(
    path: Path,
    model: Any,
    kind: Type = Type.F32,
    paired: bool = True,
    fields: dict[str, Any] | None = None,
    parts: int = 0,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> dict[str, np.ndarray]:
    """Write a model, its matrices in type `kind`; return what they hold, by name of transformers.

    `fields` are further metadata, which replace those of the model; a value of None removes one.
    `parts` is the number of tensors of a part; 0 writes one file. `tensors`, by GGUF name, replace
    those of the model; a value of None leaves one out.
    """
    replaced = tensors or {}
    config = model.config
    arch = config.model_type  # the same word for all that are read
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=parts)
    metadata = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope_parameters["rope_theta"],
        **(fields or {}),
    }
    for key, value in metadata.items():
        if value is not None:
            add(writer, key, value)
    held = {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy().astype(np.float32)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = name.split(".")
        ours = _NAMES.get(name) or f"blk.{part[2]}.{_NAMES['.'.join(part[3:-1])]}.{part[-1]}"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        stored = to_pairs(array, heads[part[-2]]) if paired and part[-2] in heads else array
        if ours in replaced:
            if (other := replaced[ours]) is not None:
                writer.add_tensor(ours, other)
            continue
        if array.ndim == 1:
            writer.add_tensor(ours, stored)
            held[name] = array
            continue
        data = quantised(stored, kind)
        writer.add_tensor(ours, data, raw_dtype=kind)
        value = gguf.dequantize(data, kind).reshape(array.shape)
        if paired and part[-2] in heads:  # back into halves, by the inverse order
            value = value[np.argsort(to_pairs(np.arange(len(value)), heads[part[-2]]))]
        held[name] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one field of the type of `value`."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, np.ndarray):
        writer.add_tensor(key, value)
    else:
        writer.add_array(key, value)


def byte_level_fields(tokenizer_json: bytes, pre: str) -> dict[str, Any]:
    """Return the metadata of a byte-level tokenizer.json."""
    tree = json.loads(tokenizer_json)
    added = {token["id"]: token for token in tree["added_tokens"]}
    vocabulary = tree["model"]["vocab"] | {t["content"]: i for i, t in added.items()}
    tokens = [text for text, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    merges = [" ".join(merge) for merge in tree["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in added else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokens.index("<|endoftext|>"),
    }
