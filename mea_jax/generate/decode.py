"""Inference: converts parameters once, then runs prefill and single-token steps on a KV cache.

Layers are unrolled, each with its own parameter and cache arrays: a scan would copy every layer's
cache in and out at every step, while separate arrays are read in place. All functions are pure and
meant for `jax.jit` with the cache donated.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mea_jax.config.schema import ModelConfig, Side
from mea_jax.errors import UserError
from mea_jax.model.context import Context, Slots
from mea_jax.model.heads import HeadLayout
from mea_jax.model.kv_cache import (
    RECENT,
    Cache,
    CachedLayer,
    HeadCache,
    LayerCache,
    cache_axes,
    empty_heads,
)
from mea_jax.model.layer_spec import LayerSpec, fold_layer, fold_model, layer_specs
from mea_jax.model.params import abstract_params, is_rounded, param_shardings
from mea_jax.model.transformer import Decoder, RopeTables, runs_of_equal_layers
from mea_jax.ops.backend import make_backend
from mea_jax.parallel import sharding

Array = jax.Array
_LONG_PREFILL = 1024  # positions
FORMS = ("auto", "folded", "absorbed", "explicit")


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """The static description of a served model; hashable, so it can be a static jit argument."""

    model: ModelConfig
    layers: tuple[LayerSpec, ...]

    def describe(self) -> str:
        """Return the cached forms in a few words, such as "keys absorbed, values direct"."""
        kinds: dict[tuple[str, str], int] = {}
        for layer in self.layers:
            kinds[layer.forms()] = kinds.get(layer.forms(), 0) + 1
        parts = [
            f"{key}" if key == value else f"keys {key}, values {value}" for key, value in kinds
        ]
        if len(parts) == 1:
            return parts[0]
        counted = zip(parts, kinds.values(), strict=True)
        return "; ".join(f"{part} ({count} layers)" for part, count in counted)


def _folds(model: ModelConfig, side: Side, components: int, form: str) -> bool:
    """Return whether mixing is folded into the weights, so that the cache has composite heads.

    With C = K this does not enlarge the cache, and absorbed reading would take C times the FLOPs.
    Keys that are mixed after their norm cannot be folded.
    """
    if not model.mixes(side) or model.bits(side) is not None:
        return False
    if side == Side.KEY and (model.key_mean or (model.qk_norm and model.hlc_order == "after")):
        return False
    whole = components == model.n_kv_heads and model.slots(side) is None
    return form == "folded" or (form == "auto" and whole)


def _serve_layer(layer: LayerSpec, form: str, index: int) -> LayerSpec:
    model, k = layer.model, layer.model.n_kv_heads
    key, value = (rows and rows[index : index + 1] for rows in map(model.bits, Side))
    model = dataclasses.replace(model, key_bits=key, value_bits=value)
    pairs = zip(Side, layer.components, strict=True)
    folded = tuple(side for side, count in pairs if _folds(model, side, count, form))
    return LayerSpec(
        fold_model(model, folded),
        k if Side.KEY in folded else layer.key_components,
        k if Side.VALUE in folded else layer.value_components,
        "explicit" if form == "explicit" else "absorbed",
    )


def _served_params(served: ServedModel, params: Any) -> Any:
    """Return separate layers, with mixing folded as specified and matrices in the compute dtype.

    `params` may lack some leaves, but not a part of a layer's attention.
    """
    model, dtype = served.model, make_backend(served.model).dtype
    layers = []
    for first, length, *_ in runs_of_equal_layers(model):
        for i in range(length):
            layer = jax.tree.map(lambda x, i=i: x[i], params.get(f"layers_{first}", {}))
            spec = served.layers[first + i].model
            folded = tuple(side for side in Side if model.mixes(side) and not spec.mixes(side))
            if "attention" in layer:
                layer["attention"] = fold_layer(model, layer["attention"], folded)
            layers.append(layer)
    top = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    tree = {"top": top, "layers": layers}

    def leaf(path, x):
        return x.astype(dtype) if is_rounded(path[-1].key, x.ndim) else x

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _parts(params: Any) -> list[Any]:
    """Divide parameters into trees for `_served_params`: attention, and each other matrix.

    Leaves of one name in all stacks are one part, so that few programs are compiled.
    """
    parts: dict[Any, dict[Any, Any]] = {}
    for path, leaf in flatten_dict(params).items():
        inner = path[1:] if path[0].startswith("layers_") else path
        name = "attention" if inner[0] == "attention" else inner
        parts.setdefault(name, {})[path] = leaf
    return [unflatten_dict(part) for part in parts.values()]


def _serve_and_delete(served: ServedModel, params: Any) -> Any:
    """Return `_served_params`, converted part by part; delete each part once it is converted."""
    convert = jax.jit(_served_params, static_argnums=0)
    found: dict[Any, Any] = {}
    for part in _parts(params):
        ready = jax.block_until_ready(convert(served, part))
        leaves = jax.tree.leaves(ready)
        for leaf in jax.tree.leaves(part):
            if not any(leaf is x for x in leaves):  # `jit` returns an unchanged input itself
                leaf.delete()
        numbered = {"top": ready["top"], "layers": dict(enumerate(ready["layers"]))}
        found |= flatten_dict(numbered)
    tree = unflatten_dict(found)
    return tree | {"layers": [tree["layers"][i] for i in range(len(served.layers))]}


def serving(model: ModelConfig, form: str = "auto") -> ServedModel:
    """Return the static description of a resolved model for serving; `form` as in `serve`."""
    assert form in FORMS
    if form in ("folded", "explicit") and any(map(model.bits, Side)):
        raise UserError(
            f"--cache_form {form}: this model's cache is packed by bits per slot, which only the "
            "form absorbed reads; leave the option out"
        )
    layers = [_serve_layer(layer, form, i) for i, layer in enumerate(layer_specs(model))]
    return ServedModel(model, tuple(layers))


def serve(
    model: ModelConfig, params: Any, form: str = "auto", donate: bool = False
) -> tuple[ServedModel, Any]:
    """Convert a resolved model and its training parameters for inference.

    Args:
      model: the resolved config.
      params: the training parameters.
      form: "folded" caches composite heads. "absorbed" caches component heads and reads them
        directly. "explicit" caches component heads and computes composite heads at each step.
        "auto" is folded if C = K and absorbed if C < K, separately for keys and values.
      donate: delete `params`, each as soon as it is converted. Otherwise memory holds the complete
        model in both forms. (`jit` cannot reuse the memory of a stack for several layers.)

    Returns:
      The static description; the parameters for `prefill` and `step`.
    """
    served = serving(model, form)
    if donate:
        return served, _serve_and_delete(served, params)
    return served, jax.jit(_served_params, static_argnums=0)(served, params)


def placed_params(served: ServedModel, mesh: Mesh) -> Any:
    """Return shapes, dtypes and shardings of the parameters that `serve` returns on a mesh.

    Nothing is computed: the mesh may exist only for compilation.
    """
    model = served.model
    stored = param_shardings(model, mesh)
    shapes = jax.eval_shape(lambda p: _served_params(served, p), abstract_params(model))
    top = {name: where for name, where in stored.items() if not name.startswith("layers_")}
    layers = []
    for first, length, *_ in runs_of_equal_layers(model):
        stack = jax.tree.map(
            lambda where: NamedSharding(mesh, PartitionSpec(*where.spec[1:])),
            stored[f"layers_{first}"],
        )
        layers += [stack] * length
    where = dict(jax.tree_util.tree_leaves_with_path({"top": top, "layers": layers}))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[path]), shapes
    )


def placed_cache(served: ServedModel, batch: int, length: int, dtype: Any, mesh: Mesh) -> Any:
    """Return shapes, dtypes and shardings of an `empty_cache` on a mesh."""
    shapes = jax.eval_shape(lambda: empty_cache(served, batch, length, dtype))

    def leaf(x, names):
        partition = sharding.even_spec(sharding.spec(names), x.shape, mesh)
        where = NamedSharding(mesh, partition)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(leaf, shapes, cache_axes(shapes))


def _empty_layers(
    served: ServedModel, batch: int, length: int, dtype: Any, packed: bool
) -> tuple[LayerCache, ...]:
    def empty(layout: HeadLayout) -> HeadCache:
        shape = (batch, length, layout.heads, layout.width)
        bits = layout.bits if packed else None
        return empty_heads(layout.form, *shape, dtype, bits, layout.kept)

    layers = []
    for spec in served.layers:
        key, value, scalars = spec.cache_layout()
        layers.append(
            LayerCache(
                key=empty(key),
                value=empty(value),
                inverse_rms_BKS=(
                    jnp.zeros((batch, scalars, length), jnp.float32) if scalars else None
                ),
            )
        )
    return tuple(layers)


def empty_cache(served: ServedModel, batch: int, length: int, dtype: Any) -> Cache:
    """Return an empty cache of `batch` rows with at most `length` positions each.

    `dtype` is the dtype of keys and values. On a mesh, rows and heads (or components) are sharded.
    Call this under `jax.eval_shape` to compute the size of a cache without allocating it.
    """
    if dtype == jnp.int8 and any(map(served.model.bits, Side)):
        raise UserError(
            "--cache_dtype int8: this model's cache is packed by bits per slot; leave the option "
            "out"
        )
    cache = Cache(
        layers=_empty_layers(served, batch, length, dtype, packed=True),
        recent=_empty_layers(served, batch, RECENT, dtype, packed=False),
        segment_ids_BS=jnp.zeros((batch, length), jnp.int32),
        lengths_B=jnp.zeros((batch,), jnp.int32),
        recent_count=jnp.zeros((), jnp.int32),
        positions_B=jnp.zeros((batch,), jnp.int32),
    )
    return jax.tree.map(lambda x, names: sharding.constrain(x, *names), cache, cache_axes(cache))


def _prefill_spec(spec: LayerSpec, length: int) -> LayerSpec:
    """Return the spec with the attention kernel that is fastest for a prompt of `length` positions.

    The CPU's own kernel is made for training in windows: a block of its scores is as long as the
    prompt, and leaves the processor's caches. In float32 `chunked` takes as long at 1,024 positions
    and a third at 6,000, in a twentieth of the memory. In bfloat16 it would widen its inputs.
    """
    model = spec.model
    if length < _LONG_PREFILL or model.attention_kernel != "cpu" or model.dtype != "float32":
        return spec
    return dataclasses.replace(spec, model=dataclasses.replace(model, attention_kernel="chunked"))


def _run_layers(
    served: ServedModel,
    params: Any,
    x_BTD: Array,
    positions_BT: Array,
    context: Context,
    cache: Cache,
):
    layers, tables, length = [], RopeTables(positions_BT), x_BTD.shape[1]
    for i, spec in enumerate(_prefill_spec(spec, length) for spec in served.layers):
        context = dataclasses.replace(context, rope=tables.of(spec.model))
        variables = {"params": params["layers"][i]}
        stored = CachedLayer(cache.layers[i], cache.recent[i])
        out: Any = spec.block().apply(variables, x_BTD, context, i, stored)
        x_BTD = out[0]
        layers.append(out[1])
    main, recent = zip(*layers, strict=True)
    return x_BTD, main, recent


def _decoder(served: ServedModel, params: Any, method, *arguments) -> Array:
    variables = {"params": params["top"]}
    return cast(Array, Decoder(served.model).apply(variables, *arguments, method=method))


def prefill(
    served: ServedModel, params: Any, cache: Cache, tokens_BP, segment_ids_BP, positions_BP
) -> tuple[Array, Cache]:
    """Prefill an empty cache with prompts.

    Each row starts with its tokens, followed by padding with segment id 0. A row with several
    segments is continued in its last one. P is at most the length of the cache.

    Returns:
      The logits (B, V), float32, after each row's last token; the filled cache.
    """
    rows = jnp.arange(tokens_BP.shape[0])
    lengths_B = jnp.sum(segment_ids_BP > 0, axis=1, dtype=jnp.int32)
    last_B = jnp.maximum(lengths_B - 1, 0)
    context = Context(segment_ids_BP)
    x_BPD = _decoder(served, params, Decoder.embed, tokens_BP, positions_BP)
    x_BPD, layers, recent = _run_layers(served, params, x_BPD, positions_BP, context, cache)
    logits_B1V = _decoder(served, params, Decoder.normed_logits, x_BPD[rows, last_B][:, None])
    filled_BS = jax.lax.dynamic_update_slice(
        jnp.zeros_like(cache.segment_ids_BS), segment_ids_BP.astype(jnp.int32), (0, 0)
    )
    next_B = positions_BP[rows, last_B].astype(jnp.int32) + 1
    count = jnp.zeros((), jnp.int32)
    return logits_B1V[:, 0], Cache(layers, recent, filled_BS, lengths_B, count, next_B)


def step(served: ServedModel, params: Any, cache: Cache, tokens_B: Array) -> tuple[Array, Cache]:
    """Append one token to each row of the cache.

    Callers must count the steps and call `kv_cache.flush` after every `RECENT` of them.

    Returns:
      The logits (B, V), float32, for the next token of each row; the extended cache.
    """
    rows, slot = jnp.arange(tokens_B.shape[0]), cache.recent_count
    segment_B = cache.segment_ids_BS[rows, jnp.maximum(cache.lengths_B - 1, 0)]
    length, recent_R = cache.segment_ids_BS.shape[1], jnp.arange(RECENT)
    distance_BS = jnp.arange(length)[None] - (cache.lengths_B + slot)[:, None]
    distance_BR = jnp.broadcast_to((recent_R - slot)[None], (len(rows), RECENT))
    positions_B1 = cache.positions_B[:, None]
    context = Context(
        segment_ids_BT=segment_B[:, None],
        positions_BT=positions_B1,
        slot=slot,
        main=Slots(cache.segment_ids_BS == segment_B[:, None], distance_BS),
        recent=Slots(distance_BR <= 0, distance_BR),
    )
    x_B1D = _decoder(served, params, Decoder.embed, tokens_B[:, None], positions_B1)
    x_B1D, layers, recent = _run_layers(served, params, x_B1D, positions_B1, context, cache)
    logits_B1V = _decoder(served, params, Decoder.normed_logits, x_B1D)
    ids_BS, lengths_B = cache.segment_ids_BS, cache.lengths_B
    new = Cache(layers, recent, ids_BS, lengths_B, slot + 1, cache.positions_B + 1)
    return logits_B1V[:, 0], new
