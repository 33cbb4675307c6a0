"""Which published models are ours too: their config.json as a `ModelConfig`, and back.

Three architectures of transformers: LlamaForCausalLM (with Llama 3.1's rotary scaling),
Qwen3ForCausalLM (queries and keys normed) and Qwen3MoeForCausalLM (with experts besides). Whatever
a config.json asks for that our model does not compute is refused by the key's name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea_jax.config import ModelConfig, RopeScaling
from mea_jax.errors import UserError, shown

Json = Mapping[str, Any]

THETA = 10_000.0  # transformers' own default
# Keys that no number of the model depends on: those of the config that it came with are given back.
KEPT = (
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "attention_dropout",
    "router_aux_loss_coef",
    "output_router_logits",
)


@dataclass(frozen=True)
class Family:
    """One architecture, and what sets it apart from the others."""

    architecture: str
    model_type: str
    qk_norm: bool
    experts: bool


FAMILIES = (
    Family("LlamaForCausalLM", "llama", qk_norm=False, experts=False),
    Family("Qwen3ForCausalLM", "qwen3", qk_norm=True, experts=False),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", qk_norm=True, experts=True),
)


# -- their config -> ours ----------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder. Raises `UserError`."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no config.json: give the folder of a model as transformers saves it"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no config of a model but {shown(found)}")
    return found


def family_of(config: Json, where: str) -> Family:
    """The family that a config.json names. Raises `UserError` for an architecture not known."""
    names = config.get("architectures") or []
    kind = config.get("model_type")
    for family in FAMILIES:
        if names == [family.architecture] or (not names and kind == family.model_type):
            return family
    given = names[0] if isinstance(names, list) and len(names) == 1 else names or kind
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(f"{where}: the architecture {shown(given)} is not supported; known: {known}")


class _Reader:
    """Values of a config.json with their types checked."""

    def __init__(self, config: Json, where: str):
        self.config, self.where = config, where

    def fact(self, *spellings: str, of: Json | None = None) -> Any:
        """Return the value that a config gives under any of `spellings`, or None.

        Versions 4 and 5 of transformers spell some keys differently, and files that were edited by
        hand have both. Raises `UserError` where two spellings give different values.
        """
        config = self.config if of is None else of
        found = {key: config[key] for key in spellings if config.get(key) is not None}
        values = list(found.values())
        if any(value != values[0] for value in values):
            given = " and ".join(f"{key}={shown(value)}" for key, value in found.items())
            raise UserError(f"{self.where}: {given} disagree: remove the one that is wrong")
        return values[0] if values else None

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise UserError(f"{self.where}: {key}={shown(value)} must be a positive whole number")
        return value

    def number(self, key: str, default: float | None = None, of: Json | None = None) -> float:
        value = (self.config if of is None else of).get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.where}: {key}={shown(value)} must be a number")
        return float(value)

    def refuse(self, key: str, value: Any, why: str) -> None:
        raise UserError(f"{self.where}: {key}={shown(value)} is not supported: {why}")

    def only(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        value = self.config.get(key)
        if value not in allowed:
            self.refuse(key, value, why)


def model_config(config: Json, where: str) -> ModelConfig:
    """The model that a config.json describes.

    Raises `UserError`, which begins with `where` and names the key, for what we do not compute.
    """
    family, read = family_of(config, where), _Reader(config, where)
    no_bias = "projections have no biases here"
    read.only("attention_bias", (None, False), no_bias)
    read.only("mlp_bias", (None, False), no_bias)
    read.only("hidden_act", (None, "silu", "swish"), "the feed-forward layers are SwiGLU here")
    read.only("quantization_config", (None,), "give the model in float32, float16 or bfloat16")
    if config.get("use_sliding_window") and config.get("sliding_window") is not None:
        read.refuse("use_sliding_window", True, "attention sees all positions here")
    for kind in config.get("layer_types") or ():
        if kind != "full_attention":
            read.refuse("layer_types", kind, "attention sees all positions here")
    heads, width = read.whole("num_attention_heads"), read.whole("hidden_size")
    llama = not family.qk_norm
    fields: dict[str, Any] = {
        "vocab_size": read.whole("vocab_size"),
        "d_model": width,
        "n_layers": read.whole("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": read.whole("num_key_value_heads", heads if llama else None),
        "head_dim": read.whole("head_dim", width // heads if llama else None),
        "d_ff": read.whole("intermediate_size"),
        "hlc": "none",
        "head_norm": False,
        "qk_norm": family.qk_norm,
        "norm_eps": read.number("rms_norm_eps"),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "dtype": _products(read),
        **_rope(read),
    }
    if family.experts:
        del fields["d_ff"]  # of layers without experts, of which there are none
        fields |= _experts(read)
    return ModelConfig(**fields)


def _rope(read: _Reader) -> dict[str, Any]:
    """Return the rotary fields of `rope_parameters` (transformers 5) or `rope_scaling` (before)."""
    given = _rope_object(read)
    inner, outer = given.get("rope_theta"), read.config.get("rope_theta")
    if None not in (inner, outer) and inner != outer:
        raise UserError(
            f"{read.where}: rope_theta={shown(outer)} at the top and rope_theta={shown(inner)} "
            "inside rope_parameters or rope_scaling disagree: remove the one that is wrong"
        )
    theta = read.number("rope_theta", read.number("rope_theta", THETA), of=given)
    for rope in (read.config, given):
        part = rope.get("partial_rotary_factor")
        if part not in (None, 1, 1.0):
            read.refuse("partial_rotary_factor", part, "all features of a head are rotated here")
    kind = read.fact("rope_type", "type", of=given) or "default"
    fields: dict[str, Any] = {"rope_theta": theta}
    if kind == "llama3":
        fields["rope_scaling"] = RopeScaling(
            factor=read.number("factor", of=given),
            low_freq_factor=read.number("low_freq_factor", of=given),
            high_freq_factor=read.number("high_freq_factor", of=given),
            original_context=int(read.number("original_max_position_embeddings", of=given)),
        )
    elif kind != "default":
        read.refuse("rope_type", kind, "known: default, llama3")
    return fields


def _rope_object(read: _Reader) -> dict[str, Any]:
    """Return `rope_parameters` and `rope_scaling` as one object; each may lack keys of the other.

    transformers lets `rope_scaling` replace the other as a whole. Where both are given and differ,
    one of them is a leftover, and which one cannot be known: that raises `UserError`.
    """
    merged: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = read.config.get(name) or {}
        if not isinstance(given, dict):
            read.refuse(name, given, "expected an object")
        if given:
            given = given | {"rope_type": read.fact("rope_type", "type", of=given) or "default"}
        for key, value in given.items():
            if merged.setdefault(key, value) != value:
                raise UserError(
                    f"{read.where}: rope_parameters has {key}={shown(merged[key])} and "
                    f"rope_scaling {key}={shown(value)}: remove the one that is wrong"
                )
    return merged


def _experts(read: _Reader) -> dict[str, Any]:
    config = read.config
    dense = "every layer has experts here"
    read.only("decoder_sparse_step", (None, 1), dense)
    read.only("mlp_only_layers", (None, []), dense)
    count = read.fact("num_experts", "num_local_experts")  # transformers 5 writes the second
    return {
        "n_experts": _Reader({"num_experts": count}, read.where).whole("num_experts"),
        "experts_per_token": read.whole("num_experts_per_tok"),
        "d_expert": read.whole("moe_intermediate_size"),
        "normalise_router": bool(config.get("norm_topk_prob", False)),
    }


def _products(read: _Reader) -> str:
    """Return the dtype of the model's products: bfloat16 for float16, which we do not have."""
    given = read.fact("dtype", "torch_dtype")
    return "bfloat16" if given in ("bfloat16", "float16") else "float32"


def context_of(config: Json, where: str) -> int:
    """Positions that the model was made for."""
    return _Reader(config, where).whole("max_position_embeddings", 2048)


# -- our config -> theirs ----------------------------------------------------------------------


def stock_family(model: ModelConfig) -> Family:
    """The stock class that computes `model`.

    Raises `UserError` that names what no stock class has.
    """
    mixes = model.mixes("key") or model.mixes("value")
    for lacking, what in (
        (model.variant != "mea", f"variant={model.variant!r}"),
        (mixes, "component heads (give --form stock to rebuild composite heads, or --form mea)"),
        (model.head_norm, "a norm of each head's output (head_norm)"),
        (model.gate != "none", f"gate={model.gate!r}"),
        (model.positions != "rope", f"positions={model.positions!r}"),
    ):
        if lacking:
            raise UserError(f"no class of transformers has {what}: --form mea exports it")
    for family in FAMILIES:
        if (family.qk_norm, family.experts) == (model.qk_norm, bool(model.n_experts)):
            break
    else:
        raise UserError(
            "no class of transformers that is known here has experts without qk_norm: "
            "--form mea exports it"
        )
    if not family.qk_norm and model.d_model % model.n_heads:
        raise UserError(
            f"LlamaForCausalLM takes no d_model={model.d_model} that n_heads={model.n_heads} does "
            "not divide: --form mea exports it"
        )
    return family


def stock_config(model: ModelConfig, dtype: str, kept: Json) -> dict[str, Any]:
    """config.json of a model that a stock class computes, in names that transformers 4 reads too.

    `kept` holds values for the keys of `KEPT`. Raises `UserError` as `stock_family`.
    """
    family = stock_family(model)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": kept.get("intermediate_size", model.d_ff)
        if family.experts
        else model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope_scaling(model),
        "attention_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }
    if family.experts:
        config |= {
            "num_experts": model.n_experts,
            "num_experts_per_tok": model.experts_per_token,
            "moe_intermediate_size": model.d_expert,
            "norm_topk_prob": model.normalise_router,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    elif not family.qk_norm:
        config["mlp_bias"] = False
    return config | {key: kept[key] for key in KEPT if key in kept}


def rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    """Theirs, or None where frequencies are not scaled."""
    scaling = model.rope_scaling
    if scaling.factor == 1.0:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }
