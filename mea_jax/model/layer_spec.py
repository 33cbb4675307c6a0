"""The static description of one layer: its widths, its heads, and the layout of its cache."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from mea_jax.config.schema import ModelConfig, Side, layer_configs
from mea_jax.model.heads import HeadLayout
from mea_jax.model.transformer import Block
from mea_jax.model.variants import make_attention
from mea_jax.ops import hlc


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer of a model; hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      model: the layer's config (`layer_configs`) with `key_components` and `value_components` set
        to None.
      key_components, value_components: C_k and C_v of this layer.
      cached_form: the form of cached components: "absorbed" or "explicit" (model/kv_cache.py).
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
        """The config in which all layers are like this one, without rematerialisation."""
        key, value = self.components
        return dataclasses.replace(
            self.model, key_components=key, value_components=value, remat="none"
        )

    def block(self) -> Block:
        """Return the Linen module of the layer."""
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
    """Return each layer's spec; equal layers have equal specs and share a compiled program."""
    found = []
    for config in layer_configs(model):
        shared = dataclasses.replace(config, key_components=None, value_components=None)
        key, value = (config.components(side)[0] for side in Side)
        found.append(LayerSpec(shared, key, value))
    return found


def fold_model(model: ModelConfig, sides: Collection[Side] = tuple(Side)) -> ModelConfig:
    """Return `model`'s config after folding the mixing of `sides`, without component counts.

    What differs between layers otherwise stays.
    """
    mixed = [side for side in Side if model.mixes(side) and side not in sides]
    return dataclasses.replace(
        model,
        hlc="".join(side[0] for side in mixed) or "none",
        hlc_order=model.hlc_order if Side.KEY in mixed else "before",
        key_mixing=model.key_mixing if Side.KEY in mixed else "heads",
        value_mixing=model.value_mixing if Side.VALUE in mixed else "heads",
        key_slots=model.key_slots if Side.KEY in mixed else "",
        value_slots=model.value_slots if Side.VALUE in mixed else "",
        key_components=None,
        value_components=None,
    )


def fold_layer(
    model: ModelConfig, attention: Mapping[str, Any], sides: Collection[Side] = tuple(Side)
) -> dict[str, Any]:
    """Fold the mixing of `sides` into the projections of a layer's attention parameters."""
    folded = [side for side in sides if model.mixes(side)]
    dropped = [f"{side}_mixing" for side in folded]
    kept = {name: leaf for name, leaf in attention.items() if name not in dropped}
    kept |= {side.value: hlc.composite_heads(model, side, attention) for side in folded}
    if model.qkv_bias:
        kept |= {f"{side}_bias": hlc.composite_bias(model, side, attention) for side in folded}
    return kept


def plain_specs(model: ModelConfig) -> list[LayerSpec]:
    """Return the specs of the equivalent layers whose only heads are the composite heads."""
    return layer_specs(fold_model(model))
