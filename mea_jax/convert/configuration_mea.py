"""The configuration of modeling_mea.py."""

from typing import Any

from transformers import PretrainedConfig


class MEAConfig(PretrainedConfig):
    """The configuration of `MEAForCausalLM`, with the names of transformers where they exist.

    If layers have `windows`, `sliding_window` and `layer_types` say so to the caches of
    transformers, which then keep no more positions. They are not declared here, because
    transformers does not accept None as `layer_types`.
    """

    model_type = "mea"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    num_key_value_heads: int = 8  # composite heads
    head_dim: int = 32
    key_components: list | None = None  # component heads per layer; None: as many as composite
    value_components: list | None = None
    hlc: str = "kv"  # heads that are mixed: "kv", "k", "v" or "none"
    key_mixing: str = "heads"  # "heads": (C, K); "frequency": (C, K, F, 2), complex
    value_mixing: str = "heads"  # "heads": (C, K); "dense": (C, H, K, H)
    hlc_order: str = "before"  # keys are mixed "before" or "after" their norm and rotation
    head_norm: bool = True  # RMSNorm of each head's output
    qk_norm: bool = False  # RMSNorm of queries and keys
    qk_norm_over: str = "head"  # features that share one rms: "head", or "all" heads
    qkv_bias: bool = False  # biases of queries, component keys and component values
    out_bias: bool = False  # a bias of the attention's output
    attention_multiplier: float | None = None  # factor of logits; None: 1/sqrt(head_dim)
    output_gate: str = "none"  # sigmoid(x W) on outputs: one number per "head" or per "feature"
    norms: str = "pre"  # RMSNorm on each half's input ("pre"), its output ("post"), or "both"
    hidden_act: str = "silu"  # or "gelu_pytorch_tanh"; experts use "silu"
    embedding_multiplier: float = 1.0
    windows: list | None = None  # positions that a layer's tokens see, themselves included; 0: all
    positions: str = "rope"  # "rope", "alibi", "learned" or "none"
    rope_parameters: dict | None = None  # rope_type, rope_theta, ... as in transformers
    layer_thetas: list | None = None  # a rope_theta per layer, 0: not rotated; with it, layers
    # with a window have no other rope_parameters
    max_position_embeddings: int = 2048  # the table of "learned" positions has as many rows
    rms_norm_eps: float = 1e-5
    n_experts: int = 0  # 0: one SwiGLU per layer
    experts_per_token: int = 0
    d_expert: int = 0
    normalise_router: bool = True  # the chosen experts' weights add up to 1
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None
    # The oldest and newest versions that this code was run with: {"torch": ["2.13", "2.13"], ...}
    tested_with: dict | None = None

    def window(self, index: int) -> int:
        """Return the number of positions that tokens see in layer `index`; 0: all."""
        return self.windows[index] if self.windows else 0

    def rope(self, index: int) -> dict[str, Any] | None:
        """Return the rotary parameters of layer `index`; None: it is not rotated."""
        common = self.rope_parameters if self.positions == "rope" else None
        if common is None or self.layer_thetas is None:
            return common
        theta = self.layer_thetas[index]
        scaling = {} if self.window(index) else common
        return {**scaling, "rope_theta": theta} if theta else None
