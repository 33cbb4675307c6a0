"""Helpers of several test modules: tiny configs, parameters, batches and comparisons."""

import dataclasses
import os
import subprocess
import sys
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np

from mea_jax.config.schema import ModelConfig
from mea_jax.model.params import init_params
from mea_jax.model.transformer import Decoder
from mea_jax.ops import hlc
from tests.paths import ROOT

PLAIN: dict[str, Any] = {"hlc": "none", "head_norm": False}
GROUPED: dict[str, Any] = {"n_heads": 8, "n_kv_heads": 4}
# The changes to `tiny_model` for MEA and for each attention that it is compared with.
ATTENTIONS: dict[str, dict[str, Any]] = {
    "MHA": PLAIN,
    "GQA": PLAIN | {"n_kv_heads": 2},
    "MQA": PLAIN | {"n_kv_heads": 1},
    "head norm only": PLAIN | {"head_norm": True, "n_kv_heads": 2},
    "MEA": GROUPED | {"key_components": 2, "value_components": 4},
    "MEA without norm": {"head_norm": False, "key_components": 2},
    "gate per head": PLAIN | GROUPED | {"gate": "head"},
    "gate per feature": {"gate": "feature", "value_components": 2},
    "complex keys, dense values": {
        "key_mixing": "frequency",
        "value_mixing": "dense",
        "key_components": 2,
    },
    "differential V1": PLAIN | GROUPED | {"variant": "differential_v1"},
    "differential V2": PLAIN | GROUPED | {"variant": "differential_v2"},
    "talking heads": PLAIN | GROUPED | {"variant": "talking_heads"},
    "collaborative": PLAIN | GROUPED | {"variant": "collaborative", "key_components": 4},
}


def change(config: Any, **changes: Any) -> Any:
    """Return `config` with dotted keys replaced: `change(c, **{"model.d_ff": 48}, steps=3)`."""
    for path, value in changes.items():
        first, _, rest = path.partition(".")
        new = change(getattr(config, first), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: new})
    return config


def tiny_model(**changes: Any) -> ModelConfig:
    """Return a model of 2 layers of width 32, with 4 heads of width 8, changed by `changes`.

    The vocabulary of 264 tokens is large enough for the bytes tokenizer.
    """
    model = ModelConfig(
        vocab_size=264,
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        head_dim=8,
        d_ff=48,
        dtype="float32",
        backend="xla",
        loss_chunk=0,
    )
    return change(model, **changes)


def params_of(model: ModelConfig, seed: int = 0, noise: float = 0.0) -> Any:
    """Return random parameters, drawn by numpy, which compiles nothing.

    Norm scales are one and mixing is block identity, as at initialization; `noise` is the
    standard deviation of the normal noise added to both.
    """
    tree = nn.unbox(jax.eval_shape(lambda k: init_params(model, k), jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name, noise_ = path[-1].key, noise * rng.standard_normal(shape.shape)
        if name == "scale":
            return (1 + noise_).astype(np.float32)
        if name in ("key_mixing", "value_mixing"):
            kind = model.mixing_kind(name.removesuffix("_mixing"))
            composites = {"heads": 2, "frequency": 2, "dense": 3}[kind]
            sizes = shape.shape[1], shape.shape[composites], model.head_dim
            start = hlc.initial(kind, *sizes)
            return (np.asarray(start)[None] + noise_).astype(np.float32)
        return (0.2 * rng.standard_normal(shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def apply_logits(
    model: ModelConfig,
    params: Any,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
) -> jax.Array:
    """Return the logits, float32 (B, T, V)."""
    inputs = (tokens_BT, positions_BT, segment_ids_BT)
    return cast(Any, Decoder(model).apply({"params": params}, *inputs, method=Decoder.logits))


def packed(rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (positions, segment ids), int32 (B, T), of windows of documents of these lengths.

    If the lengths of a row add up to less than `length`, it ends with padding (segment 0).
    """
    positions = np.zeros((len(rows), length), np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    for row, sizes in enumerate(rows):
        start = 0
        for number, size in enumerate(sizes, start=1):
            positions[row, start : start + size] = np.arange(size)
            segments[row, start : start + size] = number
            start += size
    return positions, segments


def random_batch(
    seed: int, batch: int, length: int, vocab: int, rows: list[list[int]] | None = None
) -> dict[str, Any]:
    """Return a batch of random tokens; `rows` as in `packed`, by default one document per row."""
    rng = np.random.default_rng(seed)
    positions, segments = packed(rows or [[length]] * batch, length)
    tokens = rng.integers(0, vocab, (batch, length + 1), dtype=np.int32)
    return {
        "inputs": tokens[:, :-1] * (segments > 0),
        "targets": tokens[:, 1:] * (segments > 0),
        "positions": positions,
        "segment_ids": segments,
    }


def flat(tree: Any) -> dict[str, Any]:
    """Return the leaves by path, such as "layers_0/attention/key"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def assert_close(a: Any, b: Any, rtol: float, atol: float) -> None:
    """Assert that two trees have the same paths and that their leaves are close."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=rtol, atol=atol, err_msg=path)


def assert_equal(a: Any, b: Any) -> None:
    """Assert that two trees have the same paths and equal leaves."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


def assert_one_error(status, err, *parts):
    """Assert that `err` has one line "error: ...", its last one, which contains all `parts`."""
    assert status != 0
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0], "the error is not the last line"
    for part in parts:
        assert part in lines[0], (part, lines[0])


def run_train_in_subprocess(*arguments, cwd):
    """Run `python -m mea_jax.train` in a separate process; return (status, stderr)."""
    finished = subprocess.run(
        [sys.executable, "-m", "mea_jax.train", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    return finished.returncode, finished.stderr
