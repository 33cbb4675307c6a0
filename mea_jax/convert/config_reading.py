"""Read the config.json of a published model as a `ModelConfig`.

If a config.json needs what our model does not compute, an error names the key.
"""

import json
from pathlib import Path
from typing import Any

from mea_jax.config.schema import ModelConfig
from mea_jax.convert.families import Family, Json, family_of, rotates
from mea_jax.convert.rope_scaling import rope_fields
from mea_jax.errors import UserError, shown

_LOCAL_THETA = 10_000.0  # of Gemma 3's layers with a window
_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model's folder. Raise `UserError` if it is missing or malformed."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} contains no config.json: give the folder of a model as transformers saves it"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}; fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no config of a model but {shown(found)}: fetch it again")
    return found


class Reader:
    """The values of a config.json, with checks of their types that raise `UserError`."""

    def __init__(self, config: Json, where: str):
        self.config, self.where = config, where

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise UserError(f"{self.where}: {key}={shown(value)} must be a positive whole number")
        return value

    def agreed(self, values: Json) -> Any:
        """Return the value of a fact that has several spellings; None if no key gives it.

        `values` holds what each key gives. transformers 4 and 5 spell some facts differently, and
        which of two values wins depends on the version. So this raises `UserError`, which names the
        keys, if the values differ.
        """
        given = [(key, value) for key, value in values.items() if value is not None]
        for key, value in given[1:]:
            if value != given[0][1]:
                raise UserError(
                    f"{self.where}: {given[0][0]}={shown(given[0][1])} and {key}={shown(value)} "
                    "disagree: remove the wrong one"
                )
        return given[0][1] if given else None

    def number(self, key: str, default: float | None = None, of: Json | None = None) -> float:
        value = (self.config if of is None else of).get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.where}: {key}={shown(value)} must be a number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key}={shown(value)} must be true or false")
        return value

    def refuse(self, key: str, value: Any, why: str) -> None:
        raise UserError(f"{self.where}: {key}={shown(value)} is not supported: {why}")

    def only(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        value = self.config.get(key)
        if value not in allowed:
            self.refuse(key, value, why)


def context_of(config: Json, where: str) -> int:
    """Return the number of positions that the model was made for, 2048 if none is given."""
    return Reader(config, where).whole("max_position_embeddings", 2048)


def model_config(config: Json, where: str) -> ModelConfig:
    """Return the model that a config.json describes.

    Raise `UserError`, which begins with `where` and names the key, for what we do not compute.
    """
    family, read = family_of(config, where), Reader(config, where)
    read.only("mlp_bias", (None, False), "feed-forward layers must have no biases")
    read.only("quantization_config", (None,), "give the model in float32, float16 or bfloat16")
    _check_functions(family, read)
    heads, width = read.whole("num_attention_heads"), read.whole("hidden_size")
    fields: dict[str, Any] = family.fixed(width) | {
        "vocab_size": read.whole("vocab_size"),
        "d_model": width,
        "n_layers": read.whole("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": read.whole("num_key_value_heads", heads if family.sizes else None),
        "head_dim": read.whole("head_dim", width // heads if family.sizes else None),
        "d_ff": read.whole("intermediate_size"),
        "hlc": "none",
        "head_norm": False,
        "norm_eps": read.number("rms_norm_eps"),
        "tie_embeddings": read.flag("tie_word_embeddings", family.tied),
        "dtype": _compute_dtype(read),
    }
    if "bias" in family.free and read.flag("attention_bias"):
        fields |= {"qkv_bias": True, "out_bias": True}
    if "scale" in family.free:
        scalar = read.number("query_pre_attn_scalar", 256)
        fields["attention_scale"] = 0.0 if scalar == fields["head_dim"] else scalar**-0.5
    fields |= _layers(family, read)
    if family.experts:
        del fields["d_ff"]  # for layers without experts; there are none
        fields |= _experts(read)
    return ModelConfig(**fields)


def _check_functions(family: Family, read: Reader) -> None:
    """Raise `UserError` for another activation or for scores and logits that are capped."""
    if family.features.get("activation") != "gelu":
        read.only("hidden_act", (None, "silu", "swish"), "feed-forward layers must be SwiGLU")
        return
    gelu = (None, "gelu_pytorch_tanh")
    read.only("hidden_activation", gelu, "feed-forward layers must be GEGLU in the tanh form")
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        read.only(key, (None,), "logits must not be capped")
    read.only("use_bidirectional_attention", (None, False), "attention must be causal")


def _layers(family: Family, read: Reader) -> dict[str, Any]:
    """Return the fields that differ between layers: windows and rotary positions."""
    config, layers = read.config, read.whole("num_hidden_layers")
    windows = _windows(family, read, layers)
    if "thetas" not in family.free:
        fields = _positions(family, read)
    elif family.model_type == "gemma3_text":
        fields = _two_thetas(family, read, windows)
    else:
        flags = config.get("no_rope_layers")
        if flags is not None and (not isinstance(flags, list) or len(flags) < layers):
            read.refuse("no_rope_layers", flags, f"it must list {layers} layers")
        fields = _positions(family, read)
        theta = fields["rope_theta"]
        thetas = tuple(theta if rotates(index, config) else 0.0 for index in range(layers))
        fields["layer_thetas"] = thetas if 0.0 in thetas else None
    if any(windows) and "rope_scaling" in fields and fields.get("layer_thetas") is None:
        read.refuse("sliding_window", max(windows), "rotary scaling and windows exclude each other")
    fields["window"] = windows if any(windows) else None
    if len(set(windows)) == 1:
        fields["window"] = windows[0] or None
    return fields


def _positions(family: Family, read: Reader) -> dict[str, Any]:
    given = {"rope_theta": family.theta} if not _names_theta(read.config) else {}
    return rope_fields(Reader(dict(read.config) | given, read.where))


def _names_theta(config: Json) -> bool:
    inner = [config.get(key) for key in ("rope_parameters", "rope_scaling")]
    return any("rope_theta" in of for of in (config, *inner) if isinstance(of, dict))


def _two_thetas(family: Family, read: Reader, windows: tuple[int, ...]) -> dict[str, Any]:
    """Return the positions of Gemma 3: layers with a window have a base of their own, unscaled.

    transformers 5 writes an object for each kind of layer, transformers 4 `rope_local_base_freq`.
    """
    config = dict(read.config)
    given = config.get("rope_parameters")
    local = {"rope_theta": config.get("rope_local_base_freq") or _LOCAL_THETA}
    if isinstance(given, dict) and (_FULL in given or _SLIDING in given):
        config["rope_parameters"] = given.get(_FULL) or {}
        local |= given.get(_SLIDING) or {}
    if local.get("rope_type", "default") != "default":
        read.refuse(f"rope_parameters.{_SLIDING}", local, "layers with a window are not scaled")
    fields = _positions(family, Reader(config, read.where))
    short, long = read.number("rope_theta", of=local), fields["rope_theta"]
    return fields | {"layer_thetas": tuple(short if window else long for window in windows)}


def _kinds(family: Family, read: Reader, layers: int) -> list[bool]:
    """Return whether each layer is said to have a window."""
    kinds = read.config.get("layer_types")
    if kinds is None:
        return [family.has_window(index, read.config) for index in range(layers)]
    if not isinstance(kinds, list):
        read.refuse("layer_types", kinds, "it must be a list")
    read.agreed({"num_hidden_layers": layers, "the length of layer_types": len(kinds)})
    for kind in kinds:
        known = (_FULL, _SLIDING) if "window" in family.free else (_FULL,)
        if kind not in known:
            read.refuse("layer_types", kind, f"known: {', '.join(known)}")
    return [kind == _SLIDING for kind in kinds]


def _windows(family: Family, read: Reader, layers: int) -> tuple[int, ...]:
    """Return the window of each layer; 0 for none.

    A window that is not below the context is none, unless the layer's positions depend on it.
    """
    kinds = _kinds(family, read, layers)
    if not any(kinds):
        return (0,) * layers
    if read.config.get("sliding_window", family.window) is None:
        read.refuse("layer_types", _SLIDING, "sliding_window gives no number of positions")
    window = read.whole("sliding_window", family.window)
    if "thetas" not in family.free and window >= context_of(read.config, read.where):
        return (0,) * layers
    return tuple(window if sliding else 0 for sliding in kinds)


def _experts(read: Reader) -> dict[str, Any]:
    config = read.config
    dense = "every layer must have experts"
    read.only("decoder_sparse_step", (None, 1), dense)
    read.only("mlp_only_layers", (None, []), dense)
    # transformers 5 writes the second name.
    counts = {key: config.get(key) for key in ("num_experts", "num_local_experts")}
    read.agreed(counts)
    return {
        "n_experts": read.whole(
            next((k for k, n in counts.items() if n is not None), "num_experts")
        ),
        "experts_per_token": read.whole("num_experts_per_tok"),
        "d_expert": read.whole("moe_intermediate_size"),
        "normalise_router": read.flag("norm_topk_prob"),
    }


def _compute_dtype(read: Reader) -> str:
    """Return the dtype of the model's products: models in float16 run in bfloat16."""
    keys = ("dtype", "torch_dtype")
    names = {k: str(v).removeprefix("torch.") for k in keys if (v := read.config.get(k))}
    return "bfloat16" if read.agreed(names) in ("bfloat16", "float16") else "float32"
