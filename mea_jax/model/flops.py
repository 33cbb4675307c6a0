"""The project's one convention for FLOPs, and the peak rates that MFU divides by.

A multiply-add counts two. Counted: every product of the model, attention over the positions a
causal mask leaves (half of T x T), the mixing of heads in the form that runs, the router and the
experts that a token is sent to, and the unembedding; the backward pass as twice the forward. Not
counted: norms, softmax, rotary positions, lookups, recomputation (remat), the optimizer and a
teacher's forward pass; frozen parameters count as if they had gradients. So MFU compares useful
work, whatever is recomputed.
"""

from mea_jax.config.schema import ModelConfig
from mea_jax.ops.hlc import training_form

# Dense bfloat16 FLOP/s of one device, by a prefix of `jax.Device.device_kind`, from the vendors'
# data sheets. A device that is not listed has no MFU; its FLOP/s are reported all the same.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device kind, or None where it is not known."""
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def _mixing_products(model: ModelConfig, which: str, components: int) -> tuple[int, int]:
    """Multiply-adds of projecting one position to K heads, and of folding once a step."""
    d, h, k = model.d_model, model.head_dim, model.n_kv_heads
    if not model.mixes(which):
        return d * components * h, 0
    kind = model.mixing_kind(which)
    mixing = {"heads": 1, "frequency": 2, "dense": h}[kind] * components * k * h
    if training_form(model, which, components) == "explicit":
        return d * components * h + mixing, 0
    return d * k * h, d * mixing


def _attention_products(model: ModelConfig, c_key: int, c_value: int) -> tuple[int, int]:
    """Multiply-adds of one layer's attention: per position, and per pair of query and key."""
    d, h, n, k = model.d_model, model.head_dim, model.n_heads, model.n_kv_heads
    if model.variant == "differential_v1":  # both maps of a pair read values of width 2H
        return 2 * d * n * h + 2 * d * k * h, n * h + n * 2 * h
    if model.variant == "differential_v2":
        return 3 * d * n * h + d * n + 2 * d * k * h, 2 * (2 * n) * h
    if model.variant == "talking_heads":
        return 2 * d * n * h + 2 * d * k * h, 2 * n * h + 2 * n * n
    if model.variant == "collaborative":
        return d * n * h + 2 * d * c_key * h + d * k * h, n * c_key * h + n * h
    gate = {"none": 0, "head": d * n, "feature": d * n * h}[model.gate]
    keys, values = (
        _mixing_products(model, which, components)[0]
        for which, components in (("key", c_key), ("value", c_value))
    )
    return 2 * d * n * h + gate + keys + values, 2 * n * h


def _feed_forward_products(model: ModelConfig) -> int:
    """Multiply-adds of one layer's feed-forward half; of the experts those that run."""
    if not model.n_experts:
        return 3 * model.d_model * model.d_ff
    router = model.d_model * model.n_experts
    return router + model.experts_per_token * 3 * model.d_model * model.d_expert


def forward_flops_per_token(model: ModelConfig, length: int) -> float:
    """FLOPs of a forward pass over windows of `length` positions, per position."""
    total = 0.0
    for c_key, c_value in zip(model.components("key"), model.components("value"), strict=True):
        position, pair = _attention_products(model, c_key, c_value)
        total += 2 * (position + pair * length / 2)  # causal half
        total += 2 * _feed_forward_products(model)
    return total + 2 * model.d_model * model.vocab_size


def step_flops(model: ModelConfig, length: int, tokens: int) -> float:
    """FLOPs of a training step on `tokens` positions: three forwards, and folding once.

    Folding again for each part of an accumulated batch is recomputation, so it is not counted.
    """
    folding = sum(
        2 * _mixing_products(model, which, components)[1]
        for which in ("key", "value")
        for components in model.components(which)
    )
    return 3 * (forward_flops_per_token(model, length) * tokens + folding)
