"""Corrupted checkpoints: whatever bytes lie in one, it is refused in one line or read as arrays.

Three kinds of it: one whose digests must give the damage away; one from before there were digests;
and one that someone made up, whose digests are right.
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
    """What happens to one file: `file` and `place` are shares of all files and of its length."""

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
    """Changes the checkpoint in `folder`; whether it is another one now."""
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
    """What became of it: "refused", "read", or "unchanged". Raises whatever must not happen."""
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
            return "refused: content"  # it cannot even be forged: a link, or no such JSON
    config, state, params = _target()
    try:
        with Checkpoints(run) as checkpoints:
            step = checkpoints.newest_good(lambda line: None)
            assert step == STEP
            if example.kind == "sealed" and changed:
                raise AssertionError(f"damage was not noticed: {example}")
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
    """The abstract parameters with the place that a reader gives them."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params)


@functools.cache
def _digest() -> str:
    path = OLD / "checkpoints" / str(STEP) / "data" / "metadata"
    return json.loads(path.read_text())["digest"]


def _as_new(checkpoint: Path) -> None:
    """Seals a checkpoint of the old format as one of today."""
    path = checkpoint / "data" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    digests.seal(checkpoint)
