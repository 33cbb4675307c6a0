"""Convert between the rotary positions of `ModelConfig` and those of a published config.json.

transformers 5 writes them into `rope_parameters`, transformers 4 into `rope_theta` and
`rope_scaling`. The rules of the scalings are in mea_jax/ops/rope.py.
"""

from typing import TYPE_CHECKING, Any

from mea_jax.config.schema import ModelConfig, RopeScaling

if TYPE_CHECKING:
    from mea_jax.convert.config_reading import Reader

THETA = 10_000.0  # transformers' own default
_ROPE = "rope_parameters"
_ORIGINAL = "original_max_position_embeddings"
# The numbers of each rope_type. transformers has our defaults for the optional ones, and uses them
# for null and 0 as well.
_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}
_OPTIONAL = _NUMBERS["yarn"][1:]


def rope_fields(read: "Reader") -> dict[str, Any]:
    """Return the fields of `ModelConfig` of rotary positions.

    Of two objects, transformers reads `rope_scaling` alone. Raise `UserError`, which names the
    keys, if the two disagree or if we do not compute what they say.
    """
    keys = [key for key in (_ROPE, "rope_scaling") if read.config.get(key)]
    found = [_facts(read, key) for key in keys or [_ROPE]]
    for fact in found[0] | found[-1]:
        read.agreed({f"{key}.{fact}": of.get(fact) for key, of in zip(keys, found, strict=False)})
    facts, kind = found[-1], found[-1]["rope_type"]
    if facts["partial_rotary_factor"] != 1:
        why = "all features of a head must be rotated"
        read.refuse("partial_rotary_factor", facts["partial_rotary_factor"], why)
    if not isinstance(kind, str) or kind not in _NUMBERS:
        read.refuse("rope_type", kind, f"known: {', '.join(_NUMBERS)}")
    fields: dict[str, Any] = {"rope_theta": read.number("rope_theta", of=facts)}
    if kind == "default":
        return fields
    required = [name for name in _NUMBERS[kind] if name not in _OPTIONAL or facts.get(name)]
    scaling: dict[str, Any] = {name: read.number(name, of=facts) for name in required}
    if kind == "yarn":
        if facts.get("attention_factor") == 0:
            read.refuse("attention_factor", 0, "it must be positive")
        scaling["truncate"] = facts.get("truncate", True)
        if not isinstance(scaling["truncate"], bool):
            read.refuse("truncate", scaling["truncate"], "it must be true or false")
    if kind in ("llama3", "yarn"):
        scaling["original_context"] = int(read.number(_ORIGINAL, of=facts))
    elif kind == "dynamic":
        scaling["original_context"] = read.whole("max_position_embeddings", 2048)
    return fields | {"rope_scaling": RopeScaling(kind, **scaling)}


def _facts(read: "Reader", key: str) -> dict[str, Any]:
    """Return the facts of the object `key` of a config, of keys outside it, or defaults."""
    config, given = read.config, read.config.get(key) or {}
    if not isinstance(given, dict):
        read.refuse(key, given, "it must be an object")
    for name, value in given.items():
        if isinstance(value, dict):
            read.refuse(f"{key}.{name}", value, "all layers must have the same positions")

    def fact(name: str, default: Any, other: str | None = None) -> Any:
        outer = {other or name: (given if other else config).get(other or name)}
        value = read.agreed({f"{key}.{name}": given.get(name), **outer})
        return default if value is None else value

    facts = {name: value for name, value in given.items() if name != "type"}
    facts["rope_type"] = fact("rope_type", "default", "type")
    facts["rope_theta"] = fact("rope_theta", THETA)
    facts["partial_rotary_factor"] = fact("partial_rotary_factor", 1)
    if facts["rope_type"] in ("llama3", "yarn"):
        # transformers uses the model's own context if neither the object nor the config names one.
        facts[_ORIGINAL] = fact(_ORIGINAL, read.whole("max_position_embeddings", 2048))
    return facts


def rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    """Return the value of `rope_scaling`, or None if frequencies are not scaled.

    It has the names that transformers 4 and 5 read. "dynamic" has no original context there: it
    is the config's `max_position_embeddings`, `model.longest_context()`.
    """
    scaling = model.rope_scaling
    if scaling.kind == "none":
        return None
    found: dict[str, Any] = {"rope_type": scaling.kind}
    for name in _NUMBERS[scaling.kind]:
        value = getattr(scaling, name)
        found |= {} if name in _OPTIONAL and value == 0 else {name: value}
    if not scaling.truncate and scaling.kind == "yarn":
        found["truncate"] = False
    if scaling.kind in ("llama3", "yarn"):
        found[_ORIGINAL] = scaling.original_context
    return found
