"""The static description of one layer: its widths, its heads, and the layout of its cache."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mea_jax.config.schema import ModelConfig
from mea_jax.model.attention import HeadLayout
from mea_jax.model.transformer import Block
from mea_jax.model.variants import make_attention
from mea_jax.ops import hlc

SIDES = ("key", "value")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer of a model; hashable, a static argument of `jax.jit`.

    Attributes:
      model: the config, without lists of components for its layers.
      key_components, value_components: C_k and C_v of this layer.
      cached_form: how a cache holds components: "absorbed" or "explicit" (model/kv_cache.py).
    """

    model: ModelConfig
    key_components: int
    value_components: int
    cached_form: str = "absorbed"

    @property
    def components(self) -> tuple[int, int]:
        """C_k and C_v."""
        return self.key_components, self.value_components

    @property
    def alone(self) -> ModelConfig:
        """The config of a model that has this layer only, without rematerialisation."""
        key, value = self.components
        return dataclasses.replace(
            self.model, key_components=key, value_components=value, remat="none"
        )

    def block(self) -> Block:
        """The Linen module of the layer."""
        return Block(self.model, *self.components, self.cached_form)

    def cache_layout(self) -> tuple[HeadLayout, HeadLayout, int]:
        """Return the cache layout of keys and of values, and the number of scalars per position."""
        layer = make_attention(self.model, *self.components, cached_form=self.cached_form)
        return layer.cache_layout()

    def forms(self) -> tuple[str, str]:
        """Return the cached form of keys and of values: "direct", "absorbed" or "explicit"."""
        key, value, _ = self.cache_layout()
        return key.form, value.form


def layer_specs(model: ModelConfig) -> list[LayerSpec]:
    """The spec of each layer. Layers of equal shape have equal specs, and share a program."""
    shared = dataclasses.replace(model, key_components=None, value_components=None)
    pairs = zip(*(model.components(side) for side in SIDES), strict=True)
    return [LayerSpec(shared, key, value) for key, value in pairs]


def fold_model(model: ModelConfig, sides: tuple[str, ...] = SIDES) -> ModelConfig:
    """The config of one layer of `model` once the mixing of `sides` is folded away."""
    mixed = [side for side in SIDES if model.mixes(side) and side not in sides]
    return dataclasses.replace(
        model,
        hlc="".join(side[0] for side in mixed) or "none",
        hlc_order=model.hlc_order if "key" in mixed else "before",
        key_mixing=model.key_mixing if "key" in mixed else "heads",
        value_mixing=model.value_mixing if "value" in mixed else "heads",
        key_components=None,
        value_components=None,
    )


def fold_layer(
    model: ModelConfig, attention: Mapping[str, Any], sides: tuple[str, ...] = SIDES
) -> dict[str, Any]:
    """A layer's attention parameters once the mixing of `sides` is folded into projections."""
    folded = [side for side in sides if model.mixes(side)]
    dropped = [f"{side}_mixing" for side in folded]
    kept = {name: leaf for name, leaf in attention.items() if name not in dropped}
    return kept | {side: hlc.composite_heads(model, side, attention) for side in folded}


def plain_spec(model: ModelConfig) -> LayerSpec:
    """A layer with the composite heads of `model` as its only heads: the same function."""
    return LayerSpec(fold_model(model), model.n_kv_heads, model.n_kv_heads)
