"""Map the path of each parameter in our tree to its name in transformers.

Linear layers of transformers are (out, in) matrices; ours are (in, out), with a separate axis of
heads. All other parameters are the same numbers in the same order. So each tensor of transformers
is a view of one of ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mea_jax.config.schema import ModelConfig

Path = tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of transformers and the parameter that it corresponds to.

    Attributes:
      name: the name in transformers.
      path: our path, within the layer, or within the entire tree if `layer` is None.
      shape: our shape, of one layer and of one expert.
      layer: the index of the layer, or None.
      expert: the index of the expert, or None.
      transposed: True if the tensor in transformers is a matrix (out, in).
      flat: True if it is our array as a vector.
      offset: what transformers adds to the tensor, and our parameter includes.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    layer: int | None = None
    expert: int | None = None
    transposed: bool = True
    flat: bool = False
    offset: float = 0.0

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape in transformers."""
        if self.flat:
            return (int(np.prod(self.shape)),)
        if not self.transposed:
            return self.shape
        # The output projection alone sums over two axes.
        inputs = 2 if self.path[-1] == "out" else 1
        into = int(np.prod(self.shape[:inputs]))
        return int(np.prod(self.shape[inputs:])), into

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Return a view of our `array` in the shape of transformers, `offset` included."""
        if self.flat:
            return array.reshape(-1)
        return array.reshape(self.hf_shape[::-1]).T if self.transposed else array


def top_entries(model: ModelConfig, norm_offset: float = 0.0) -> list[Entry]:
    """Return the entries of the embedding, the final norm and, if it is not tied, the head."""
    words, width = model.vocab_size, model.d_model
    entries = [
        Entry("model.embed_tokens.weight", ("embedding",), (words, width), transposed=False),
        Entry(
            "model.norm.weight",
            ("final_norm", "scale"),
            (width,),
            transposed=False,
            offset=norm_offset,
        ),
    ]
    if not model.tie_embeddings:
        entries.append(Entry("lm_head.weight", ("head",), (width, words)))
    return entries


# The norms of a layer by `ModelConfig.norms`: the names in transformers and ours.
NORMS = {
    "pre": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "post": {
        "post_attention_layernorm": "attention_out_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    },
    "both": {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_out_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    },
}


def attention_entries(model: ModelConfig, layer: int, norm_offset: float = 0.0) -> list[Entry]:
    """Return the entries of one layer's attention and norms, in a model without mixing."""
    d, n, k, h = model.d_model, model.n_heads, model.n_kv_heads, model.head_dim
    at = f"model.layers.{layer}"
    kernels = {"q_proj": ("query", n), "k_proj": ("key", k), "v_proj": ("value", k)}
    entries = [
        Entry(f"{at}.self_attn.{theirs}.weight", ("attention", ours), (d, heads, h), layer)
        for theirs, (ours, heads) in kernels.items()
    ]
    entries.append(Entry(f"{at}.self_attn.o_proj.weight", ("attention", "out"), (n, h, d), layer))
    biases = {name: (ours, heads * h) for name, (ours, heads) in kernels.items()}
    chosen = (biases if model.qkv_bias else {}) | ({"o_proj": ("out", d)} if model.out_bias else {})
    for theirs, (ours, width) in chosen.items():
        path = ("attention", f"{ours}_bias")
        shape = (d,) if ours == "out" else (width // h, h)
        entries.append(Entry(f"{at}.self_attn.{theirs}.bias", path, shape, layer, flat=True))
    joint = model.qk_norm_over == "all"
    scales: dict[str, tuple[Path, int]] = {
        theirs: ((ours,), d) for theirs, ours in NORMS[model.norms].items()
    }
    if model.qk_norm:
        scales["self_attn.q_norm"] = (("attention", "query_norm"), h * (n if joint else 1))
        scales["self_attn.k_norm"] = (("attention", "key_norm"), h * (k if joint else 1))
    return entries + [
        Entry(
            f"{at}.{theirs}.weight",
            (*ours, "scale"),
            (width,),
            layer,
            transposed=False,
            offset=norm_offset,
        )
        for theirs, (ours, width) in scales.items()
    ]


def mlp_entries(model: ModelConfig, layer: int) -> list[Entry]:
    """Return the entries of one layer's SwiGLU, or of its router and each expert."""
    d, at = model.d_model, f"model.layers.{layer}.mlp"

    def swiglu(prefix: str, width: int, expert: int | None) -> Iterator[Entry]:
        for name, shape in (("gate", (d, width)), ("up", (d, width)), ("down", (width, d))):
            yield Entry(f"{prefix}.{name}_proj.weight", ("mlp", name), shape, layer, expert)

    if not model.n_experts:
        return list(swiglu(at, model.d_ff, None))
    entries = [Entry(f"{at}.gate.weight", ("mlp", "router"), (d, model.n_experts), layer)]
    for expert in range(model.n_experts):
        entries += swiglu(f"{at}.experts.{expert}", model.d_expert, expert)
    return entries


def layer_entries(model: ModelConfig, layer: int, norm_offset: float = 0.0) -> list[Entry]:
    """Return the entries of one layer, in a model without mixing."""
    return attention_entries(model, layer, norm_offset) + mlp_entries(model, layer)


def entries(model: ModelConfig, norm_offset: float = 0.0) -> list[Entry]:
    """Return all tensors of a model that a stock class computes, in the published order.

    `norm_offset` is what the class adds to the weight of a norm.
    """
    layers = (
        entry
        for layer in range(model.n_layers)
        for entry in layer_entries(model, layer, norm_offset)
    )
    embedding, *rest = top_entries(model, norm_offset)
    return [embedding, *layers, *rest]
