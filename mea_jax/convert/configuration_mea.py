"""The configuration of modeling_mea.py."""

from transformers import PretrainedConfig


class MEAConfig(PretrainedConfig):
    """The configuration of `MEAForCausalLM`, with the names of transformers where they exist."""

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
    output_gate: str = "none"  # sigmoid(x W) on outputs: one number per "head" or per "feature"
    positions: str = "rope"  # "rope", "alibi", "learned" or "none"
    rope_parameters: dict | None = None  # rope_type, rope_theta, ... as in transformers
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
