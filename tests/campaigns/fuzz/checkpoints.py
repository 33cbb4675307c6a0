"""Corrupted checkpoints: each is refused in one line, or read as arrays of the right shapes.

There are three kinds: "sealed" ones, whose checksums must reveal the damage; "unsealed" ones of the
old format without checksums; and "forged" ones, whose checksums match the damage.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from hypothesis import strategies as st

from mea_jax.checkpoint import digests
from mea_jax.checkpoint.manager import Checkpoints
from mea_jax.config.schema import TrainConfig
from mea_jax.errors import UserError
from mea_jax.model.params import abstract_params
from mea_jax.parallel import sharding
from mea_jax.train.guards import Guards
from mea_jax.train.step import abstract_state
from tests.paths import ROOT

OLD = ROOT / "tests" / "checkpoints" / "format_1" / "run"
STEP = 4


@dataclasses.dataclass(frozen=True)
class Damage:
    """A change to one file; `file` and `place` are fractions of all files and of its length."""

    kind: str  # "sealed", "unsealed", "forged"
    change: str
    file: float
    place: float
    content: bytes


_SHARES = st.floats(0, 1, exclude_max=True)
STRATEGY = st.builds(
    Damage,
    kind=st.sampled_from(["sealed", "unsealed", "forged"]),
    change=st.sampled_from(
        ["flip", "cut", "remove", "replace", "insert", "empty", "link", "words"]
    ),
    file=_SHARES,
    place=_SHARES,
    content=st.binary(min_size=1, max_size=64),
)
_WORDS = (b"null", b"[]", b"{}", b'"x"', b"-1", b"1e999", b"NaN", b"[" * 5000, b'{"format": 2}')


@functools.cache
def _target() -> tuple[TrainConfig, Any, Any]:
    with Checkpoints(OLD) as checkpoints:
        config = checkpoints.config(STEP)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    return config, abstract_state(config, mesh), abstract_params(config.model)


def damage(folder: Path, example: Damage) -> bool:
    """Change a file of the checkpoint in `folder`; return whether its content is different now."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[int(example.file * len(files))]
    before = path.read_bytes()
    place, content = int(example.place * max(len(before), 1)), example.content
    if example.change == "remove":
        path.unlink()
        return True
    if example.change == "link":
        path.unlink()
        path.symlink_to("/etc/passwd")
        return True
    after = {
        "flip": before[:place]
        + bytes(b ^ (1 << content[0] % 8) for b in before[place : place + 1])
        + before[place + 1 :],
        "cut": before[:place],
        "replace": before[:place] + content + before[place + len(content) :],
        "insert": before[:place] + content + before[place:],
        "empty": b"",
        "words": _WORDS[content[0] % len(_WORDS)],
    }[example.change]
    path.write_bytes(after)
    return after != before


def check(example: Damage, folder: Path) -> str:
    """Damage a checkpoint, load it, and return the outcome.

    Returns:
      "refused: damage", "refused: content", "read" or "unchanged".

    Raises:
      AssertionError: the damage was not detected, or a message or an array is wrong.
      Exception: any other error than a `UserError`, which is a defect.
    """
    run = folder / "run"
    shutil.copytree(OLD, run)
    checkpoint = run / "checkpoints" / str(STEP)
    if example.kind == "sealed":
        _as_new(checkpoint)
    changed = damage(checkpoint, example)
    if example.kind == "forged":
        (checkpoint / digests.FILE).unlink(missing_ok=True)
        try:
            _as_new(checkpoint)
        except (OSError, ValueError, LookupError, TypeError):
            return "refused: content"  # it cannot be forged: a link, or invalid JSON
    config, state, params = _target()
    try:
        with Checkpoints(run) as checkpoints:
            step = checkpoints.newest_good(lambda line: None)
            assert step == STEP
            if example.kind == "sealed" and changed:
                raise AssertionError(f"damage was not detected: {example}")
            checkpoints.config(step)
            position = checkpoints.position(step, _digest())
            Guards(config.guards, position.guards)
            found = checkpoints.restore(step, state)
            checkpoints.params(step, params_on_device(params))
    except UserError as refusal:
        words = str(refusal)
        if "\n" in words or not (str(run) in words or "config.guards" in words):
            raise AssertionError(f"not one line that names the checkpoint: {words}") from refusal
        return "refused: damage" if example.kind == "sealed" else "refused: content"
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert leaf.shape == wanted.shape
        assert leaf.dtype == wanted.dtype
        np.asarray(leaf)
    return "read" if changed else "unchanged"


def params_on_device(params: Any) -> Any:
    """Return the abstract parameters with the sharding that a reader of checkpoints uses."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params)


@functools.cache
def _digest() -> str:
    path = OLD / "checkpoints" / str(STEP) / "data" / "metadata"
    return json.loads(path.read_text())["digest"]


def _as_new(checkpoint: Path) -> None:
    """Convert a checkpoint of the old format to the current one, with checksums."""
    path = checkpoint / "data" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    digests.write_checksums(checkpoint)
