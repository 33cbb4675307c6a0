"""The FLOPs of a model, counted by one convention, and the peak rates that MFU divides by.

A multiply-add counts as two FLOPs. The count includes all products of the model: projections,
attention over the positions that a causal mask and a layer's window leave (half of T x T without a
window), the mixing of heads in the form that runs, the router and the experts that a token is sent
to, and the unembedding. The backward pass counts as twice the forward pass. The count excludes
norms, softmax, rotary positions, lookups, recomputation (remat), the optimizer, and a teacher's
forward pass. Frozen parameters count as if they had gradients. So MFU measures useful work,
independent of recomputation.
"""

from mea_jax.config.schema import ModelConfig, Side
from mea_jax.ops.hlc import training_form

# Dense bfloat16 FLOP/s of one device, by a prefix of `jax.Device.device_kind`, from the vendors'
# data sheets. A device that is not listed has no MFU; its FLOP/s are still reported.
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
    """Return the peak bfloat16 FLOP/s of a device kind, or None if it is not listed."""
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def _mixing_products(model: ModelConfig, side: Side, components: int) -> tuple[int, int]:
    """Return multiply-adds of projecting one position to K heads, and of one folding per step."""
    d, h, k = model.d_model, model.head_dim, model.n_kv_heads
    if not model.mixes(side):
        return d * components * h, 0
    kind = model.mixing_kind(side)
    mixing = {"heads": 1, "frequency": 2, "dense": h}[kind] * components * k * h
    if training_form(model, side, components) == "explicit":
        return d * components * h + mixing, 0
    return d * k * h, d * mixing


def _attention_products(model: ModelConfig, c_key: int, c_value: int) -> tuple[int, int]:
    """Return multiply-adds of one layer's attention: per position, and per query-key pair."""
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
        _mixing_products(model, side, components)[0]
        for side, components in ((Side.KEY, c_key), (Side.VALUE, c_value))
    )
    return 2 * d * n * h + gate + keys + values, 2 * n * h


def _feed_forward_products(model: ModelConfig) -> int:
    """Return multiply-adds per position of a feed-forward half; only experts that run count."""
    if not model.n_experts:
        return 3 * model.d_model * model.d_ff
    router = model.d_model * model.n_experts
    return router + model.experts_per_token * 3 * model.d_model * model.d_expert


def _keys_per_query(length: int, window: int) -> float:
    """Return the mean number of keys of T queries that see the last `window` positions; 0: all.

    A position's own key counts as half, so that this is T / 2 without a window, except for queries
    that see a full window.
    """
    window = min(window or length, length)
    return window - window**2 / (2 * length)


def forward_flops_per_token(model: ModelConfig, length: int) -> float:
    """Return the FLOPs per position of a forward pass over windows of `length` positions."""
    total = 0.0
    counts = (model.components(side) for side in Side)
    for c_key, c_value, window in zip(*counts, model.windows(), strict=True):
        position, pair = _attention_products(model, c_key, c_value)
        total += 2 * (position + pair * _keys_per_query(length, window))
        total += 2 * _feed_forward_products(model)
    return total + 2 * model.d_model * model.vocab_size


def step_flops(model: ModelConfig, length: int, tokens: int) -> float:
    """Return the FLOPs of a training step on `tokens` positions: 3 forward passes, 1 folding.

    Folding again for each part of an accumulated batch is recomputation, so it is not counted.
    """
    folding = sum(
        2 * _mixing_products(model, side, components)[1]
        for side in Side
        for components in model.components(side)
    )
    return 3 * (forward_flops_per_token(model, length) * tokens + folding)
