"""The project's one convention for FLOPs, and the peak rates that MFU divides by.

A multiply-add counts two. Counted: every product of the model, attention over the positions a
causal mask leaves (half of T x T), the mixing of heads in the form that runs, and the unembedding;
the backward pass as twice the forward. Not counted: norms, softmax, rotary positions, lookups,
recomputation (remat) and the optimizer. So MFU compares useful work, whatever is recomputed.
"""

from mea_jax.config import ModelConfig

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


def forward_flops_per_token(model: ModelConfig, length: int) -> float:
    """FLOPs of a forward pass over windows of `length` positions, per position."""
    d, h, n, k = model.d_model, model.head_dim, model.n_heads, model.n_kv_heads
    total = 0.0
    for c_key, c_value in zip(model.components("key"), model.components("value"), strict=True):
        total += 2 * d * n * h * 2  # query and output projections
        for which, c in (("key", c_key), ("value", c_value)):
            if model.mixes(which) and model.hlc_form == "explicit":
                total += 2 * d * c * h + 2 * c * k * h
            else:  # folded: the projection goes straight to K heads
                total += 2 * d * k * h
        total += 2 * (length / 2) * n * h * 2  # scores and weighted values, causal half
        total += 3 * 2 * d * model.d_ff
    return total + 2 * d * model.vocab_size


def step_flops(model: ModelConfig, length: int, tokens: int) -> float:
    """FLOPs of a training step on `tokens` positions: three forwards, and folding once.

    Folding again for each part of an accumulated batch is recomputation, so it is not counted.
    """
    folding = 0
    if model.hlc_form == "folded":
        for which in ("key", "value"):
            if model.mixes(which):
                for c in model.components(which):
                    folding += 2 * model.d_model * c * model.n_kv_heads * model.head_dim
    return 3 * (forward_flops_per_token(model, length) * tokens + folding)
