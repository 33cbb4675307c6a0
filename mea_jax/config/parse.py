"""Conversion of a `ConfigDict` or a JSON tree to a checked `TrainConfig`."""

import dataclasses
import types
import typing
from typing import Any

from ml_collections import config_dict

from mea_jax.config.checks import validate
from mea_jax.config.schema import RopeScaling, TrainConfig
from mea_jax.errors import UserError, nearest, shown

_LONGEST_KEY = 80  # characters of a key in a message
_INTEGERS, _FLOATS = 2**31, 2**128  # bounds of the 32-bit numbers of a run


def from_config_dict(config: config_dict.ConfigDict) -> TrainConfig:
    """Return a `ConfigDict` as checked dataclasses; raise `UserError` with a wrong key's path."""
    return from_dict(config.to_dict())


def from_dict(tree: dict[str, Any]) -> TrainConfig:
    """Invert `TrainConfig.to_dict`; raise `UserError` as `from_config_dict` does."""
    config = _build(TrainConfig, tree, "config")
    validate(config)
    return config


def _build(cls: type, tree: Any, path: str):
    if not isinstance(tree, typing.Mapping):
        raise UserError(f"{path} must contain the keys of {cls.__name__}, not {shown(tree)}")
    if cls is RopeScaling and "kind" not in tree:
        tree = {"kind": _older_kind(tree)} | dict(tree)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in known:
            name = key if isinstance(key, str) and key.isprintable() else shown(key)
            hint = nearest(str(key)[:_LONGEST_KEY], known)
            raise UserError(f"unknown config key {path}.{name[:_LONGEST_KEY]}: {hint}")
    hints = typing.get_type_hints(cls)
    return cls(**{k: _coerce(hints[k], v, f"{path}.{k}") for k, v in tree.items()})


def _older_kind(tree: typing.Mapping[str, Any]) -> str:
    """Return the kind of a scaling that was stored before there were several kinds.

    All had Llama 3's rule, which is linear scaling with an original context of one position.
    """
    if tree.get("factor", 1) == 1:
        return "none"
    return "linear" if tree.get("original_context") == 1 else "llama3"


def _coerce(hint: Any, value: Any, path: str) -> Any:
    """Return `value` as type `hint` or raise `UserError`; lists become tuples, ints floats."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        whole = isinstance(value, int) and not isinstance(value, bool)
        lists = next(h for h in hint.__args__ if typing.get_origin(h) is tuple)
        kind = int if whole and int in hint.__args__ else lists
        return _coerce(kind, value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path} must be a list, not {shown(value)}")
        item = typing.get_args(hint)[0]
        return tuple(_coerce(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole if hint is int else isinstance(value, hint) or (hint is float and whole)):
        raise UserError(f"{path} must be of type {hint.__name__}, not {shown(value)}")
    if whole and abs(value) >= (_INTEGERS if hint is int else _FLOATS):
        limit = "2^31: integers" if hint is int else "3.4e38: numbers"
        raise UserError(f"{path}={shown(value)} must be within +-{limit} of a run have 32 bits")
    return hint(value)  # converts to the plain type, as in JSON: numpy's float64 is a float too
