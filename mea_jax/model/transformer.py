"""A decoder of LLaMA-3.2 shape in Linen, with a scan over each run of equal layers."""

import itertools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mea_jax.config.schema import REMAT_POLICIES, ModelConfig, Side, layer_configs
from mea_jax.model.context import Context
from mea_jax.model.experts import PRODUCTS
from mea_jax.model.init import embedding_stddev, kernel
from mea_jax.model.kv_cache import CachedLayer
from mea_jax.model.mlp import MLP
from mea_jax.model.moe import MoE, RouterSums
from mea_jax.model.norms import RMSNorm
from mea_jax.model.variants import make_attention
from mea_jax.ops import rope
from mea_jax.ops.backend import make_backend
from mea_jax.ops.embedding import lookup
from mea_jax.parallel.sharding import constrain, parameter

RESIDUAL = ("batch", "length", "activation_embed")


def remat(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """Return `block` with the rematerialisation policy named `policy`.

    "none" saves all intermediates. "dots" saves the results of products without batch axes (the
    projections, including those of experts) and recomputes the rest. "full" saves only the block's
    input.
    """
    assert policy in REMAT_POLICIES
    if policy == "none":
        return block
    policies, saved = jax.checkpoint_policies, None
    if policy == "dots":
        saved = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PRODUCTS)
        )
    # Inside a scan the compiler cannot merge the recomputation with the forward pass anyway.
    return nn.remat(block, policy=saved, prevent_cse=False)


class Block(nn.Module):
    """Attention and a gated feed-forward half (or experts), normed and added to the residual.

    `config.norms` says whether each half's input, its output or both are normed.
    `index` is the layer's index from 0; `stored` is its cache, None in training.
    """

    config: ModelConfig
    key_components: int
    value_components: int
    cached_form: str = "absorbed"

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, index, stored: CachedLayer | None = None
    ):
        c = self.config
        x_BTD = constrain(x_BTD, *RESIDUAL)
        attention = make_attention(
            c,
            self.key_components,
            self.value_components,
            cached_form=self.cached_form,
            name="attention",
        )

        def norm(name: str, x_BTD: jax.Array) -> jax.Array:
            return RMSNorm(c.d_model, c.norm_eps, name=name)(x_BTD)

        before, after = c.norms != "post", c.norms != "pre"
        normed_BTD = norm("attention_norm", x_BTD) if before else x_BTD
        y_BTD, stored = attention(normed_BTD, context, index, stored)
        x_BTD = x_BTD + (norm("attention_out_norm", y_BTD) if after else y_BTD)
        normed_BTD = norm("mlp_norm", x_BTD) if before else x_BTD
        if c.n_experts:
            y_BTD = MoE(c, name="mlp")(normed_BTD, context)
        else:
            y_BTD = MLP(c, name="mlp")(normed_BTD)
        x_BTD = x_BTD + (norm("mlp_out_norm", y_BTD) if after else y_BTD)
        return constrain(x_BTD, *RESIDUAL), stored


def rope_of(config: ModelConfig, positions_BT: jax.Array) -> Any:
    """Return the rotary table of these positions, or None if positions are not rotary.

    `config` is that of one layer (`layer_configs`), or of a model whose layers rotate alike.
    """
    if config.positions != "rope" or config.rope_theta == 0:
        return None
    frequencies = rope.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return rope.rope_table(positions_BT, frequencies, rope.attention_factor(config.rope_scaling))


class RopeTables:
    """The rotary tables of positions (B, T), one for each kind of layer."""

    def __init__(self, positions_BT: jax.Array):
        self.positions_BT = positions_BT
        self._made: dict[Any, Any] = {}

    def of(self, layer: ModelConfig) -> Any:
        """Return `rope_of` the layer, made once for layers that rotate alike."""
        kind = (layer.rope_theta, layer.rope_scaling)
        if kind not in self._made:
            self._made[kind] = rope_of(layer, self.positions_BT)
        return self._made[kind]


def runs_of_equal_layers(config: ModelConfig) -> list[tuple[int, int, ModelConfig]]:
    """Return runs of consecutive equal layers: [(first layer, length, layer's config), ...]."""
    runs, first = [], 0
    for layer, members in itertools.groupby(layer_configs(config)):
        length = len(list(members))
        runs.append((first, length, layer))
        first += length
    return runs


class Decoder(nn.Module):
    """A decoder-only transformer that maps token ids to final hidden states.

    `unembedding` maps hidden states to logits.
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = parameter(
            self,
            "embedding",
            nn.initializers.normal(embedding_stddev(c)),
            ("vocab", "embed"),
            (c.vocab_size, c.d_model),
        )
        if not c.tie_embeddings:
            shape, axes = (c.d_model, c.vocab_size), ("embed", "vocab")
            self.head = kernel(self, "head", shape, axes, c.d_model)
        if c.positions == "learned":
            self.position_embedding = parameter(
                self,
                "position_embedding",
                nn.initializers.normal(embedding_stddev(c)),
                ("positions", "embed"),
                (c.max_positions, c.d_model),
            )
        block = remat(Block, c.remat)
        self.stacks = [
            nn.scan(
                block,
                variable_axes={"params": 0, "statistics": 0, "router": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=length,
                unroll=min(c.scan_unroll, length),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(layer, *(layer.components(side)[0] for side in Side), name=f"layers_{first}")
            for first, length, layer in runs_of_equal_layers(c)
        ]
        self.final_norm = RMSNorm(c.d_model, c.norm_eps)

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Return the first residual (B, T, D)."""
        c, activation = self.config, make_backend(self.config).activation
        learned = c.positions == "learned"
        dtype = jnp.float32 if learned else activation
        x_BTD = lookup(self.embedding, tokens_BT, dtype, ("vocab", "embed"))
        if learned:
            x_BTD = x_BTD + lookup(
                self.position_embedding, positions_BT, dtype, ("positions", "embed")
            )
        x_BTD = x_BTD.astype(activation)
        if c.embedding_scale != 1:
            x_BTD = x_BTD * jnp.asarray(c.embedding_scale, activation)
        return constrain(x_BTD, *RESIDUAL)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        shards: int = 1,
    ) -> jax.Array:
        """Return hidden states (B, T, D) after the final norm.

        Segments do not attend to one another. Tokens and positions are ordered for `shards`
        shards of the sequence (`attention.Context`); segment ids are in natural order.
        """
        tables, x_BTD = RopeTables(positions_BT), self.embed(tokens_BT, positions_BT)
        runs = runs_of_equal_layers(self.config)
        for stack, (first, length, layer) in zip(self.stacks, runs, strict=True):
            context = Context(segment_ids_BT, tables.of(layer), positions_BT, shards=shards)
            x_BTD, _ = stack(x_BTD, context, jnp.arange(first, first + length))
        return self.final_norm(x_BTD)

    def unembedding(self) -> jax.Array:
        """Return the kernel (D, V), float32, from hidden states to logits."""
        return self.embedding.T if self.config.tie_embeddings else self.head

    def hidden_and_unembedding(self, tokens_BT, positions_BT, segment_ids_BT, shards):
        """Return the inputs of the loss: hidden states (B, T, D) and the unembedding (D, V)."""
        return self(tokens_BT, positions_BT, segment_ids_BT, shards), self.unembedding()

    def to_logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return logits (B, T, V), float32, of hidden states after the final norm."""
        backend = make_backend(self.config)
        x_BTD, dtype = x_BTD.astype(backend.dtype), backend.dtype
        if self.config.tie_embeddings:
            return backend.matmul_transposed(x_BTD, self.embedding.astype(dtype))
        return backend.matmul(x_BTD, self.head.astype(dtype))

    def normed_logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return logits (B, T, V), float32, of the last block's residual."""
        return self.to_logits(self.final_norm(x_BTD))

    def logits(self, tokens_BT, positions_BT, segment_ids_BT) -> jax.Array:
        """Return logits (B, T, V), float32, of short inputs.

        The logits of a training batch do not fit in memory.
        """
        return self.to_logits(self(tokens_BT, positions_BT, segment_ids_BT))


def apply_hidden(
    model: ModelConfig,
    params: Any,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Return final hidden states (B, T, D) and the unembedding (D, V).

    Tokens, positions and the result are ordered for `shards` shards of the sequence
    (ops/context_parallel.py); segment ids are in natural order.
    """
    method = Decoder.hidden_and_unembedding
    inputs = (tokens_BT, positions_BT, segment_ids_BT, shards)
    return cast(Any, Decoder(model).apply({"params": params}, *inputs, method=method))


def apply_routed(
    model: ModelConfig,
    params: Any,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    shards: int = 1,
) -> tuple[tuple[jax.Array, jax.Array], RouterSums | None]:
    """Return the result of `apply_hidden`, and the routers' sums (L, ...) or None if dense."""
    inputs = (tokens_BT, positions_BT, segment_ids_BT, shards)
    if not model.n_experts:
        return apply_hidden(model, params, *inputs), None
    method: Any = Decoder.hidden_and_unembedding
    out: Any = Decoder(model).apply({"params": params}, *inputs, method=method, mutable=["router"])
    stacks = [
        out[1]["router"][f"layers_{first}"]["mlp"]["sums"][0]
        for first, *_ in runs_of_equal_layers(model)
    ]
    return out[0], jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
