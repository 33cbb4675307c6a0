"""Random config trees, as config files or `--config.key=value` overrides may produce them.

A tree is coherent at first: the values of all options fit together. In most trees a few options
then get another value, of the right type or of any type.
"""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mea_jax.config.schema import (
    ACTIVATIONS,
    ATTENTION_KERNELS,
    NORMS,
    POSITIONS,
    REMAT_POLICIES,
    ROPE_SCALINGS,
    SCHEDULES,
    VARIANTS,
    TrainConfig,
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A config tree and the number of devices for it.

    Attributes:
      coherent: True if no value was changed, so that the config must train.
      through_file: True if the tree updates a `ConfigDict`, as in a config file; otherwise it is
        parsed directly.
    """

    tree: Any
    devices: int
    coherent: bool
    through_file: bool


# -- coherent configs ----------------------------------------------------------------------


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def _one(draw, *values):
    return draw(st.sampled_from(values))


@st.composite
def _meshes(draw, devices: int):
    """Draw (mesh tree, sizes of its axes)."""
    sizes, left = {}, devices
    for axis in draw(st.permutations(("tensor", "sequence", "fsdp", "expert"))):
        sizes[axis] = draw(st.sampled_from(_divisors(left)))
        left //= sizes[axis]
    sizes["data"] = left
    tree: dict[str, int] = dict(sizes)
    if draw(st.booleans()):
        tree[draw(st.sampled_from(sorted(sizes)))] = -1
    tree["slices"] = draw(st.sampled_from(_divisors(left)))
    return tree, sizes


def _each(values, layers: int):
    """Draw one of `values` for each layer."""
    return st.lists(values, min_size=layers, max_size=layers)


@st.composite
def _components(draw, kv: int, tensor: int, layers: int, fewer: bool):
    """Draw component heads that block identity and mesh allow: None, a number, one per layer."""
    counts = [c for c in _divisors(kv) if c % tensor == 0] if fewer else [kv]
    form = _one(draw, "none", "int", "tuple")
    if form == "none":
        return None
    if form == "int":
        return draw(st.sampled_from(counts))
    return draw(st.lists(st.sampled_from(counts), min_size=layers, max_size=layers))


@st.composite
def _models(draw, sizes: dict[str, int], context: int, devices: int):
    tensor, sequence = sizes["tensor"], sizes["sequence"]
    variant = _one(draw, *("mea",) * 5, *VARIANTS)
    if variant == "talking_heads" and sequence > 1:
        variant = "mea"
    mea = variant == "mea"
    unit = tensor * (2 if variant == "differential_v1" else 1)
    kv = unit * draw(st.integers(1, max(8 // unit, 1)))
    heads = kv * draw(st.integers(1, max(8 // kv, 1)))
    split = sizes["fsdp"] * sizes["expert"] * sequence
    layers = draw(st.integers(1, 3))
    experts = 0
    if sizes["expert"] > 1 or draw(st.booleans()):
        experts = sizes["expert"] * draw(st.integers(1, 3))
    chosen = draw(st.integers(1, min(experts, 3))) if experts else 0
    hlc = _one(draw, "kv", "k", "v", "none") if mea else "none"
    positions = draw(st.sampled_from(POSITIONS))
    key_mixing = _one(draw, "heads", "frequency") if "k" in hlc else "heads"
    value_mixing = _one(draw, "heads", "dense") if "v" in hlc else "heads"
    even = positions == "rope" or key_mixing == "frequency"
    dtype = _one(draw, "auto", "float32", "bfloat16")
    backend = _one(draw, "auto", "cpu", "xla")
    if backend == "xla":  # jax's CPU compiler fails on bfloat16
        dtype = "float32"
    kernels = ["auto", "chunked"] + (["einsum"] if sequence == 1 else [])
    if backend != "xla" and positions != "alibi" and sequence == 1:
        kernels.append("cpu")
    if variant == "talking_heads":
        kernels = ["auto", "einsum"]
    theta = _one(draw, 1e4, 500_000, 1.0)
    scaling = {"kind": "none", "original_context": _one(draw, 8, 8192)}
    if draw(st.booleans()):
        kinds = ["linear", "llama3"] + ["yarn"] * (theta > 1)
        kinds += ["dynamic"] * (context <= scaling["original_context"])
        scaling |= {"kind": _one(draw, *kinds), "factor": _one(draw, 1.0, 8.0)}
    fewer_keys = "k" in hlc or variant == "collaborative"
    qk_norm = mea and draw(st.booleans())
    windows = st.sampled_from([0, 1, 3, context, context + 1, 2**31 - 1])
    window = None
    if variant != "talking_heads":
        window = draw(st.one_of(st.none(), windows, _each(windows, layers)))
    thetas = None
    if positions == "rope":
        bases = st.sampled_from([0, 1e4, 1e6] + [1.0] * (scaling["kind"] != "yarn"))
        thetas = draw(st.one_of(st.none(), _each(bases, layers)))
    return {
        "vocab_size": tensor * draw(st.integers(1, 40)),
        "d_model": split * draw(st.integers(math.ceil(8 / split), 32 // split)),
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv,
        "head_dim": 2 * draw(st.integers(1, 8)) if even else draw(st.integers(1, 16)),
        "d_ff": tensor * draw(st.integers(1, 6)),
        "n_experts": experts,
        "experts_per_token": chosen,
        "d_expert": tensor * draw(st.integers(1, 6)) if experts else 0,
        "normalise_router": chosen != 1 and draw(st.booleans()),
        "variant": variant,
        "hlc": hlc,
        "key_components": draw(
            _components(kv, 1 if variant == "collaborative" else tensor, layers, fewer_keys)
        ),
        "value_components": draw(_components(kv, tensor, layers, "v" in hlc)),
        "key_mixing": key_mixing,
        "value_mixing": value_mixing,
        "hlc_order": _one(draw, "before", "after") if "k" in hlc else "before",
        "hlc_form": _one(draw, "auto", "folded", "explicit"),
        "head_norm": mea and draw(st.booleans()),
        "qk_norm": qk_norm,
        "qk_norm_over": _one(draw, "head", "all") if qk_norm and "k" not in hlc else "head",
        "qkv_bias": mea and draw(st.booleans()),
        "out_bias": mea and draw(st.booleans()),
        "norms": draw(st.sampled_from(NORMS)),
        "activation": "silu" if experts else draw(st.sampled_from(ACTIVATIONS)),
        "attention_scale": _one(draw, 0.0, 0.1) if mea else 0.0,
        "embedding_scale": _one(draw, 1.0, 5.6),
        "window": window,
        "layer_thetas": thetas,
        "gate": _one(draw, "none", "head", "feature") if mea else "none",
        "norm_eps": _one(draw, 1e-6, 1e-5),
        "positions": positions,
        "max_positions": context + _one(draw, 0, 3) if positions == "learned" else 0,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": draw(st.booleans()),
        "dtype": dtype,
        "backend": backend,
        "attention_kernel": draw(st.sampled_from(kernels)),
        "remat": draw(st.sampled_from(REMAT_POLICIES)),
        "scan_unroll": draw(st.integers(1, 4)),
        "loss_chunk": _one(draw, 0, 1, 256),
    }


@st.composite
def _coherent(draw, devices: int):
    mesh, sizes = draw(_meshes(devices))
    context = 2 * sizes["sequence"] * draw(st.integers(1, 32 // (2 * sizes["sequence"])))
    if sizes["sequence"] == 1 and draw(st.booleans()):
        context -= 1
    accumulate, copies = (
        draw(st.integers(1, 3)),
        math.prod(sizes[axis] for axis in ("data", "fsdp", "expert")),
    )
    steps = draw(st.integers(2, 50))
    prompt = "" if context == 1 else draw(st.sampled_from(["", "def ", "\n", "é"]))
    return {
        "name": draw(st.sampled_from(["run", "a b", "été", "..."])),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "steps": steps,
        "batch_size": accumulate * copies * draw(st.integers(1, max(8 // copies, 1))),
        "accumulate": accumulate,
        "log_every": draw(st.integers(1, 100)),
        "model": draw(_models(sizes, context, devices)),
        "data": {
            "sources": [
                {"source": "text", "path": "somewhere", "weight": draw(st.integers(1, 100)) / 10}
                for _ in range(draw(st.integers(1, 3)))
            ],
            "tokenizer": "bytes",
            "context_length": context,
            "held_out_fraction": draw(st.integers(1, 50)) / 100,
            "bad_input": _one(draw, "stop", "skip"),
        },
        "optimizer": {
            "learning_rate": 10.0 ** draw(st.integers(-5, -2)),
            "schedule": draw(st.sampled_from(SCHEDULES)),
            "warmup_steps": draw(st.integers(0, steps - 1)),
            "final_fraction": draw(st.integers(0, 10)) / 10,
            "decay_fraction": draw(st.integers(0, 10)) / 10,
            "b1": _one(draw, 0.0, 0.9),
            "b2": _one(draw, 0.0, 0.95),
            "eps": _one(draw, 1e-8, 1e-6),
            "weight_decay": _one(draw, 0.0, 0.1),
            "decay_mixing": draw(st.booleans()),
            "clip_norm": _one(draw, 0.0, 1.0),
            "z_loss": _one(draw, 0.0, 1e-4),
        },
        "mesh": mesh,
        "evaluate": {
            "every": draw(st.integers(0, 10)),
            "batches": draw(st.integers(1, 3)),
            "sample_prompt": prompt,
            "sample_tokens": draw(st.integers(1, 200)),
            "sample_temperature": draw(st.integers(0, 20)) / 10,
        },
        "checkpoint": {
            "every": draw(st.integers(0, 10)),
            "minutes": draw(st.integers(0, 10)) / 1,
            "keep": draw(st.integers(1, 3)),
            "keep_every": draw(st.integers(0, 10)),
        },
        "guards": {
            "max_skipped": draw(st.integers(0, 10)),
            "spike_margin": draw(st.integers(1, 30)) / 10,
            "spike_steps": draw(st.integers(1, 9)),
            "rewind": draw(st.booleans()),
            "max_rewinds": draw(st.integers(0, 3)),
        },
    }


# -- changed options -----------------------------------------------------------------------

# No values between small ones and those that are refused: they would only take time and memory.
INTEGERS = (-(2**40), -2, -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 2**31 - 1, 2**31, 2**40, 2**63, 10**4000)
FLOATS = (
    *(math.nan, math.inf, -math.inf, -1.0, -1e-9, 0.0, 1e-300, 1e-40, 1e-20, 0.5, 1.0, 2.0),
    *(1e20, 1e39, 1e300),
)
STRINGS = (
    *("", " ", "none", "auto", "kv", "frequency", "dense", "../up", "a/b", "..", ".", "a\0b"),
    *("\n", "two\nlines", "é\ud800", "\U0001f600", "%s{}", "x" * 1000, "nan", "4", "bytes"),
    *("bpe:-1", "bpe:99999999999", "bpe:x", "tfds:", "splash", "cudnn"),
)
OPTIONS = (
    *(
        *VARIANTS,
        *POSITIONS,
        *NORMS,
        *ACTIVATIONS,
        *ROPE_SCALINGS,
        *ATTENTION_KERNELS,
        *REMAT_POLICIES,
        *SCHEDULES,
        *STRINGS,
    ),
    *("kv", "k", "v", "before", "after", "folded", "explicit", "head", "feature", "heads"),
    *("float32", "bfloat16", "xla", "cpu", "stop", "skip"),
)
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(INTEGERS),
    st.sampled_from(FLOATS),
    st.sampled_from(STRINGS),
    st.text(max_size=5),
    st.sampled_from([b"bytes", 1j, (), [], {}, [[1]], [None], ["x"], {"a": 1}, {1: 2}, {"": {}}]),
    st.sampled_from([np.int64(4), np.float64(0.5), np.float32(0.5), np.ones(2), np.bool_(True)]),
    st.sampled_from([range(2), {1, 2}, object, len, np.nan, Path("here")]),
)


def _hints(cls: Any = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """Return the type of every option by its path; those of a source are at "data.sources.0."."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        if dataclasses.is_dataclass(inner):
            path = f"{prefix}{name}.0." if inner is not hint else f"{prefix}{name}."
            found |= {path[:-1]: None} | _hints(inner, path)
        else:
            found[prefix + name] = hint
    return found


HINTS = _hints()


@st.composite
def _out_of_line(draw, hint: Any):
    """Draw a value that may be invalid for an option of type `hint`, often of the right type."""
    if hint is None or draw(st.integers(0, 3)) == 0:
        return draw(ANYTHING)
    if isinstance(hint, types.UnionType):  # a value per layer
        counts = st.lists(st.sampled_from(INTEGERS[:12]), max_size=4)
        return draw(st.one_of(st.sampled_from(INTEGERS), counts, st.none()))
    if hint is bool:
        return draw(st.booleans())
    values = {int: INTEGERS, float: FLOATS, str: OPTIONS}[hint]
    return draw(st.sampled_from(values))


def _put(tree: Any, path: str, value: Any) -> None:
    """Set a leaf by its path, if its parents are still containers."""
    *parents, last = path.split(".")
    for key in parents:
        if isinstance(tree, list):
            tree = tree[int(key)] if int(key) < len(tree) else None
        elif isinstance(tree, dict):
            tree = tree.setdefault(key, {})
    if isinstance(tree, dict):
        tree[last] = value
    elif isinstance(tree, list) and tree:
        tree[int(last)] = value


@st.composite
def examples(draw):
    devices = _one(draw, 1, 1, 2, 4, 8, 8)
    tree: Any = draw(_coherent(devices))
    through_file = draw(st.booleans())
    coherent = draw(st.integers(0, 2)) == 0
    if coherent:
        return Example(tree, devices, True, through_file)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(HINTS)))
        _put(tree, path, draw(_out_of_line(HINTS[path])))
    kind = draw(st.integers(0, 19))
    if kind == 0:  # a key that does not exist
        above = draw(st.sampled_from(["", "model.", "data.", "data.sources.0.", "mesh."]))
        _put(tree, above + draw(st.one_of(st.text(max_size=6), st.just("n_head"))), draw(ANYTHING))
    elif kind == 1:
        tree = draw(ANYTHING)
    elif kind == 2:  # most left at their defaults, which are too large to run here
        tree = {key: tree[key] for key in sorted(tree)[: draw(st.integers(0, 8))]}
    return Example(tree, devices, False, through_file)
