"""The architectures of transformers that are imported and exported, as features of `ModelConfig`.

A family is one class of transformers. config_reading.py and config_writing.py convert its
config.json; tensors.py names its tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mea_jax.config.schema import ModelConfig
from mea_jax.errors import UserError, shown

Json = Mapping[str, Any]

_WINDOW = 4096  # the default of transformers' Qwen, Mistral and Gemma classes
# Keys that do not change what the model computes: an export keeps those of the imported config.
KEPT = (
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "attention_dropout",
    "no_rope_layer_interval",  # `no_rope_layers` is written
    "router_aux_loss_coef",
    "output_router_logits",
)
# Features of `ModelConfig` in which families differ, and their values in a plain Llama.
PLAIN: dict[str, Any] = {
    "qk_norm": False,
    "qk_norm_over": "head",
    "qkv_bias": False,
    "out_bias": False,
    "norms": "pre",
    "activation": "silu",
    "attention_scale": 0.0,
    "window": None,
    "layer_thetas": None,
}


def _no_window(index: int, config: Json) -> bool:
    return False


def _every_layer(index: int, config: Json) -> bool:
    return config.get("sliding_window", _WINDOW) is not None


def _upper_layers(index: int, config: Json) -> bool:
    return bool(config.get("use_sliding_window")) and index >= config.get("max_window_layers", 28)


def _not_rotated(index: int, config: Json) -> bool:
    return bool(config.get("use_sliding_window")) and not rotates(index, config)


def _five_of_six(index: int, config: Json) -> bool:
    return (index + 1) % config.get("sliding_window_pattern", 6) != 0


def rotates(index: int, config: Json) -> bool:
    """Return whether layer `index` of a SmolLM3 rotates queries and keys by their positions."""
    flags = config.get("no_rope_layers")
    if flags is not None:
        return bool(flags[index])
    return (index + 1) % (config.get("no_rope_layer_interval") or 4) != 0


@dataclass(frozen=True)
class Family:
    """One architecture, and its differences from the others.

    Attributes:
      architecture, model_type: its names in config.json.
      features: its values of `PLAIN`, where they differ.
      free: features that config.json sets: "bias" (`attention_bias`), "window", "thetas", "scale".
      experts: True if its feed-forward halves are mixtures.
      has_window: whether layer i has a window, by config.json without `layer_types`.
      window: the default of `sliding_window`.
      theta: the default of `rope_theta`.
      tied: the default of `tie_word_embeddings`.
      sizes: True if key/value heads and their width have defaults, N and D / N.
      norm_offset: what the class adds to the weight of a norm.
      scaled_embeddings: True if embeddings are multiplied by sqrt(D).
    """

    architecture: str
    model_type: str
    features: Json = field(default_factory=dict)
    free: tuple[str, ...] = ()
    experts: bool = False
    has_window: Callable[[int, Json], bool] = _no_window
    window: int | None = None
    theta: float = 10_000.0
    tied: bool = False
    sizes: bool = False
    norm_offset: float = 0.0
    scaled_embeddings: bool = False

    def fixed(self, model_width: int) -> dict[str, Any]:
        """Return the fields of `ModelConfig` that all models of the family and width D have."""
        scale = model_width**0.5 if self.scaled_embeddings else 1.0
        return PLAIN | dict(self.features) | {"embedding_scale": scale}

    def lacks(self, model: ModelConfig) -> str | None:
        """Return the feature of `model` that the class cannot have, as `name=value`, or None."""
        if bool(model.n_experts) != self.experts:
            return f"n_experts={model.n_experts}"
        names = {"bias": ("qkv_bias", "out_bias"), "scale": ("attention_scale",)}
        free = {"window": ("window",), "thetas": ("layer_thetas",), **names}
        open_fields = {name for key in self.free for name in free[key]}
        for name, value in self.fixed(model.d_model).items():
            found = getattr(model, name)
            if name == "window":
                found = found if any(model.windows()) else None
            if name not in open_fields and found != value:
                return f"{name}={found!r}"
        if "bias" in self.free and model.qkv_bias != model.out_bias:
            return f"out_bias={model.out_bias} with qkv_bias={model.qkv_bias}"
        if not self._has_layers(model):
            return f"window={model.window!r} with layer_thetas={model.layer_thetas!r}"
        return None

    def _has_layers(self, model: ModelConfig) -> bool:
        """Return whether config.json can tell apart the layers as `model` does."""
        windows, thetas = model.windows(), model.thetas()
        sizes = {window for window in windows if window}
        if len(sizes) > 1:
            return False
        if self.has_window is _every_layer:
            return len(set(windows)) == 1
        if self.model_type == "smollm3":
            windowed = all(bool(w) == (not t) for w, t in zip(windows, thetas, strict=True))
            return len(set(thetas) - {0.0}) == 1 and (windowed or not sizes)
        if self.model_type == "gemma3_text":
            kinds = {(bool(w), t) for w, t in zip(windows, thetas, strict=True)}
            return len({windowed for windowed, _ in kinds}) == len(kinds) and 0.0 not in thetas
        return True


_BIAS = ("bias",)
_QWEN3: dict[str, Any] = {
    "features": {"qk_norm": True},
    "free": ("bias", "window"),
    "has_window": _upper_layers,
    "window": _WINDOW,
}
FAMILIES = (
    Family("LlamaForCausalLM", "llama", free=_BIAS, sizes=True),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        {"qkv_bias": True},
        free=("window",),
        has_window=_upper_layers,
        window=_WINDOW,
        sizes=True,
    ),
    Family("Qwen3ForCausalLM", "qwen3", **_QWEN3),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", **_QWEN3, experts=True),
    Family(
        "MistralForCausalLM",
        "mistral",
        free=("window",),
        has_window=_every_layer,
        window=_WINDOW,
        sizes=True,
    ),
    Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        free=("bias", "window", "thetas"),
        has_window=_not_rotated,
        theta=2_000_000.0,
        tied=True,
        sizes=True,
    ),
    Family(
        "Olmo2ForCausalLM",
        "olmo2",
        {"qk_norm": True, "qk_norm_over": "all", "norms": "post"},
        free=_BIAS,
        sizes=True,
    ),
    Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {"qk_norm": True, "norms": "both", "activation": "gelu"},
        free=("bias", "window", "thetas", "scale"),
        has_window=_five_of_six,
        window=_WINDOW,
        theta=1_000_000.0,
        tied=True,
        norm_offset=1.0,
        scaled_embeddings=True,
    ),
)


def family_of(config: Json, where: str) -> Family:
    """Return the family that a config.json names. Raise `UserError` for an unknown architecture."""
    names = config.get("architectures") or []
    kind = config.get("model_type")
    for family in FAMILIES:
        if names == [family.architecture] or (not names and kind == family.model_type):
            return family
    given = names[0] if isinstance(names, list) and len(names) == 1 else names or kind
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(f"{where}: the architecture {shown(given)} is not supported; known: {known}")
