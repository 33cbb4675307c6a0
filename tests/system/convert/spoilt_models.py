"""Ways to spoil a published model's folder, each with the words of its error message."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from mea_jax.convert import shards
from mea_jax.data import tokenizers

SHARD = "model-00002-of-00003.safetensors"


def edit(path, **changes):
    """Set keys of a JSON file; a value of None removes the key."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))


def edit_index(folder, change):
    path = folder / shards.INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def drop_tensor(folder):
    """Remove a tensor from its shard and from the index, which then agree."""
    tensors = load_file(folder / SHARD)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, folder / SHARD)
    edit_index(folder, lambda places: places.pop(name))


def replace_tensor(folder, change):
    tensors = load_file(folder / SHARD)
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / SHARD)


def spoilt(value):
    def change(array):
        array = array.copy()
        array[-1, -1] = value
        return array

    return lambda folder: replace_tensor(folder, change)


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def many_tokens(folder):
    tokenizers.train_bpe(iter(["any text that has words enough for merges"] * 3), 281).save(folder)


BAD = {
    "missing shard": (lambda f: (f / SHARD).unlink(), [SHARD, "is missing"]),
    "truncated shard": (lambda f: cut(f / SHARD, 0.9), [SHARD, "is cut short"]),
    "shard cut in its header": (lambda f: cut(f / SHARD, 0.01), [SHARD, "is cut short"]),
    "empty shard": (lambda f: (f / SHARD).write_bytes(b""), [SHARD, "is cut short"]),
    "longer shard": (
        lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"0"),
        [SHARD, "longer than its header says"],
    ),
    "no JSON in a header": (
        lambda f: (f / SHARD).write_bytes(b"\x08" + bytes(7) + b"notjson!"),
        [SHARD, "header is damaged"],
    ),
    "index names another shard": (
        lambda f: edit_index(
            f, lambda m: m.update({"model.norm.weight": "model-00001-of-00003.safetensors"})
        ),
        ["model.norm.weight", "where the index puts it"],
    ),
    "index leaves one out": (
        lambda f: edit_index(f, lambda m: m.pop("model.norm.weight")),
        ["model.norm.weight", "the index does not name it"],
    ),
    "index names what is not there": (
        lambda f: edit_index(f, lambda m: m.update(ghost=SHARD)),
        ["ghost is not in", SHARD],
    ),
    "index leads outside": (
        lambda f: edit_index(f, lambda m: m.update(ghost="../../etc/passwd")),
        ["names files outside its folder"],
    ),
    "tensor that nobody has": (drop_tensor, ["model.layers.0.", "is missing"]),
    "shape": (
        lambda f: replace_tensor(f, lambda a: a[:-1].copy()),
        ["has shape", "config.json asks for"],
    ),
    "no index": (lambda f: (f / shards.INDEX).unlink(), ["neither model.safetensors nor"]),
    "not finite": (spoilt(np.inf), ["model.layers.0.", "not finite"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["contains no config.json"]),
    "damaged config": (lambda f: cut(f / "config.json", 0.5), ["config.json cannot be read"]),
    "unknown architecture": (
        lambda f: edit(f / "config.json", architectures=["GPT2LMHeadModel"]),
        ["GPT2LMHeadModel", "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"],
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["contains no tokenizer"]),
    "tokenizer of another model": (many_tokens, ["tokenizer does not match", "vocab_size=280"]),
}
REFUSED = {
    "attention_bias": "yes",
    "mlp_bias": True,
    "hidden_act": "gelu",
    "quantization_config": {"quant_method": "fp8"},
    "layer_types": ["sliding_attention"],
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0},
    "partial_rotary_factor": 0.5,
    "num_attention_heads": 0,
    "rms_norm_eps": "small",
}
