"""Multi-head Explicit Attention (arXiv 2601.19611) in PyTorch, the layers of modeling_mea.py.

A layer projects its input to C component heads. It mixes them linearly, in the same way at every
position, to the K composite heads that queries read. The cache contains components only. A decode
step reads them unmixed: the mixing is applied to the query and to the weighted sum instead
("absorbed"), so no array of size S x K x H is made. A prompt is mixed first and goes through
PyTorch's own attention.

Letters: B batch, T query positions, S key positions, D model width, N query heads, K composite and
C component heads, G = N/K, H head width, F = H/2 rotary frequencies, M rows of a product, X the
features of a position in the cache.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import Cache

from .configuration_mea import MEAConfig

Tensor = torch.Tensor
MASKED = -1e30  # a masked logit: finite, for rows in which all logits are masked


def rope_frequencies(rope: dict[str, Any], width: int) -> tuple[Tensor, float]:
    """Return radians per position of each rotary pair, float32 (F,), and the factor of YaRN.

    `width` is H. The rules of rope_type "linear", "llama3" and "yarn" are those of transformers.
    Cosine and sine must be multiplied by the factor, which is 1 for all but "yarn". "dynamic" has
    plain frequencies within `max_position_embeddings`, beyond which `MEAModel` refuses positions.
    """
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    exponents_F = torch.arange(0, width, 2, dtype=torch.float64) / width
    frequencies_F = theta**-exponents_F
    keep_F, attention = torch.ones_like(frequencies_F), 1.0
    if kind == "linear":
        keep_F = torch.zeros_like(frequencies_F)
    elif kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns_F = rope["original_max_position_embeddings"] * frequencies_F / (2 * math.pi)
        keep_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":
        ends = []  # the indices of the pairs that turn so often within the original context
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1):
            longest = rope["original_max_position_embeddings"] / (turns * 2 * math.pi)
            ends.append(width * math.log(longest) / (2 * math.log(theta)))
        if rope.get("truncate", True):
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        low, high = max(ends[0], 0), min(ends[1], width - 1)
        high = high + 0.001 if low == high else high
        keep_F = 1 - ((torch.arange(width // 2) - low) / (high - low)).clamp(0, 1)
        attention = rope.get("attention_factor") or yarn_factor(rope)
    elif kind not in ("default", "dynamic"):
        raise ValueError(f"rope_type={kind!r} is not supported")
    frequencies_F = frequencies_F * (keep_F + (1 - keep_F) / rope.get("factor", 1))
    return frequencies_F.float(), attention


def yarn_factor(rope: dict[str, Any]) -> float:
    """Return the factor of cosine and sine that YaRN derives from the factor of wavelengths."""
    numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
    log = 0.1 * math.log(rope["factor"])
    if numerator and denominator:
        return (numerator * log + 1) / (denominator * log + 1)
    return log + 1


def rotate(x_BTNH: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate features f and f + H/2 by each position's angle, in float32; no table: no rotation."""
    if table is None:
        return x_BTNH
    (cos, sin), (x1, x2) = table, x_BTNH.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x_BTNH.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) over the last axis, which stays with size 1, float32."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def complex_product(letters: str, x: Tensor, mixing: Tensor, sign: float) -> Tensor:
    """Multiply rotary pairs by complex numbers (..., F, 2), conjugated if sign is -1.

    Feature f of `x` (..., 2F) is the real part of pair f, feature f + F its imaginary part.
    `letters` is the einsum of the pairs (..., F) with the numbers (..., F).
    """
    real, imaginary = mixing[..., 0], sign * mixing[..., 1]
    x1, x2 = x.chunk(2, dim=-1)
    y1 = torch.einsum(letters, x1, real) - torch.einsum(letters, x2, imaginary)
    y2 = torch.einsum(letters, x2, real) + torch.einsum(letters, x1, imaginary)
    return torch.cat([y1, y2], dim=-1)


class MEAMixing(nn.Module):
    """The mixing of C component heads to K composite heads of width H.

    The shape of `weight` by kind: "heads" (C, K), "frequency" (C, K, F, 2), "dense" (C, H, K, H).
    """

    def __init__(self, kind: str, components: int, composites: int, width: int):
        super().__init__()
        self.kind, self.shape = kind, (components, composites, width)
        c, k, h = self.shape
        shapes = {"heads": (c, k), "frequency": (c, k, h // 2, 2), "dense": (c, h, k, h)}
        self.weight = nn.Parameter(torch.empty(shapes[kind]))

    def start(self) -> Tensor:
        """Return the initial weight, a block identity: a component serves K/C composite heads."""
        (c, k, h), eye = self.shape, torch.eye
        mix_CK = eye(c)[:, torch.arange(k) * c // k]
        if self.kind == "heads":
            return mix_CK
        if self.kind == "dense":
            return torch.einsum("ck,hj->chkj", mix_CK, eye(h))
        return mix_CK[:, :, None, None] * torch.tensor([1.0, 0.0]).expand(h // 2, 2)

    def forward(self, x_BSCH: Tensor) -> Tensor:
        """Return composite heads (B, S, K, H) of component heads (B, S, C, H)."""
        weight = self.weight.to(x_BSCH.dtype)
        if self.kind == "frequency":
            return complex_product("bscf,ckf->bskf", x_BSCH, weight, 1.0)
        letters = "bsch,ck->bskh" if self.kind == "heads" else "bsch,chkj->bskj"
        return torch.einsum(letters, x_BSCH, weight)

    def absorb(self, q_BKGTH: Tensor) -> Tensor:
        """Return the queries for unmixed keys, (B, K, G, T, C, H).

        Their product with the components equals that of `q_BKGTH` with the mixed keys. The kind is
        "heads" or "frequency": keys have no "dense" mixing.
        """
        weight = self.weight.to(q_BKGTH.dtype)
        if self.kind == "frequency":
            return complex_product("bkgtf,ckf->bkgtcf", q_BKGTH, weight, -1.0)
        return torch.einsum("bkgth,ck->bkgtch", q_BKGTH, weight)

    def outputs(self, o_BKGTCH: Tensor) -> Tensor:
        """Return the outputs (B, K, G, T, H) of weighted sums of component values."""
        letters = "bkgtch,ck->bkgth" if self.kind == "heads" else "bkgtch,chkj->bkgtj"
        return torch.einsum(letters, o_BKGTCH, self.weight.to(o_BKGTCH.dtype))


def pack(scalars: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 `scalars` as columns of a cache of `dtype`: as raw bits if it is narrower."""
    return scalars.contiguous().view(dtype) if dtype.itemsize < 4 else scalars.to(dtype)


def unpack(columns: Tensor) -> Tensor:
    """Return the float32 scalars of columns that `pack` made."""
    narrow = columns.dtype.itemsize < 4
    return columns.contiguous().view(torch.float32) if narrow else columns.float()


class MEARMSNorm(nn.Module):
    """RMSNorm over the last axis, in float32, with a weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * inverse_rms(x, self.eps) * self.weight.float()).to(x.dtype)

    def heads(self, x_BTNH: Tensor) -> Tensor:
        """Norm heads: each for itself, or all together if the weight is that wide."""
        return self(x_BTNH.flatten(2).unflatten(-1, (-1, len(self.weight)))).view_as(x_BTNH)


class View(NamedTuple):
    """The positions of the tokens of a call and what they may read, in one kind of layer.

    Attributes:
      table: cosine and sine of the rotary angles, broadcastable to (B, T, heads, F); None without
        rotary positions.
      mask: (B or 1, 1, T, S), boolean (True: may be read) or added to logits; None: the T tokens
        attend causally to each other.
      distance_BTS: key position minus query position in tokens, float32 (B or 1, T, S).
      few: True if so few tokens read a cache that its components are not mixed first.
      slots_T: the indices of the T tokens in the cache.
      end: the number of slots in use, these T included.
    """

    table: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    distance_BTS: Tensor
    few: bool
    slots_T: Tensor
    end: int

    def newest(self, length: int) -> "View":
        """Return the view of a cache that returned only its newest `length` slots.

        Caches of transformers do that in layers with a window.
        """
        if self.mask is None or self.mask.shape[-1] == length:
            return self
        dropped = max(self.end - length, 0) - max(self.end - self.mask.shape[-1], 0)
        kept = slice(dropped, dropped + length)
        return self._replace(mask=self.mask[..., kept], distance_BTS=self.distance_BTS[..., kept])

    def hide(self, logits_BNTS: Tensor) -> Tensor:
        """Return the logits with `mask` applied."""
        if self.mask is None or self.mask.dtype != torch.bool:
            return logits_BNTS if self.mask is None else logits_BNTS + self.mask
        return logits_BNTS.masked_fill(~self.mask, MASKED)


class MEAAttention(nn.Module):
    """Attention with component heads in its cache and composite heads that queries read.

    `index` is the number of the layer.
    """

    def __init__(self, config: MEAConfig, index: int):
        super().__init__()
        c, d, h, self.index = config, config.hidden_size, config.head_dim, index
        self.N, self.K, self.H, self.eps = (
            c.num_attention_heads,
            c.num_key_value_heads,
            h,
            c.rms_norm_eps,
        )
        self.key_C = c.key_components[index] if c.key_components else self.K
        self.value_C = c.value_components[index] if c.value_components else self.K
        self.scale = c.attention_multiplier or h**-0.5
        self.q_proj = nn.Linear(d, self.N * h, bias=c.qkv_bias)
        self.k_proj = nn.Linear(d, self.key_C * h, bias=c.qkv_bias)
        self.v_proj = nn.Linear(d, self.value_C * h, bias=c.qkv_bias)
        self.o_proj = nn.Linear(self.N * h, d, bias=c.out_bias)
        self.key_mixing = self.value_mixing = None
        if c.hlc in ("kv", "k"):
            self.key_mixing = MEAMixing(c.key_mixing, self.key_C, self.K, h)
        if c.hlc in ("kv", "v"):
            self.value_mixing = MEAMixing(c.value_mixing, self.value_C, self.K, h)
        joint = c.qk_norm_over == "all"  # only if keys are not mixed
        self.q_norm = MEARMSNorm(h * (self.N if joint else 1), self.eps) if c.qk_norm else None
        self.k_norm = MEARMSNorm(h * (self.K if joint else 1), self.eps) if c.qk_norm else None
        # True if keys are normed after they are mixed: then cached components are not normed.
        self.scalars = c.qk_norm and self.key_mixing is not None and c.hlc_order == "before"
        self.head_norm = MEARMSNorm(h, self.eps) if c.head_norm else None
        width = {"none": 0, "head": 1, "feature": h}[c.output_gate]
        self.gate_proj = nn.Linear(d, self.N * width, bias=False) if width else None
        slopes = [2.0 ** (-8.0 * (n + 1) / self.N) for n in range(self.N)]
        self.slopes = slopes if c.positions == "alibi" else None

    def components(self, x_BTD: Tensor, table) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what is cached: keys and values (B, T, C, H), and 1/rms (B, T, K) or None.

        The norm of composite keys is one number 1/rms per head and position, and a weight, which
        the component keys are multiplied by. Complex mixing does not commute with a weight within
        rotary pairs: there the projection contains the weight already, and the rms is that of
        k/weight.
        """
        k_BTCH = self.k_proj(x_BTD).unflatten(-1, (self.key_C, self.H))
        v_BTCH = self.v_proj(x_BTD).unflatten(-1, (self.value_C, self.H))
        inverse_BTK = None
        if self.scalars:
            assert self.key_mixing is not None
            assert self.k_norm is not None
            k_BTKH, weight_H = self.key_mixing(k_BTCH), self.k_norm.weight.float()
            if self.key_mixing.kind == "frequency":
                k_BTKH = k_BTKH.float() / weight_H
            else:
                k_BTCH = (k_BTCH.float() * weight_H).to(k_BTCH.dtype)
            inverse_BTK = inverse_rms(k_BTKH, self.eps)[..., 0]
        elif self.k_norm is not None:
            k_BTCH = self.k_norm.heads(k_BTCH)
        return rotate(k_BTCH, table), v_BTCH, inverse_BTK

    @staticmethod
    def stored(x_BTCH: Tensor, mixed: bool, scalars_BTK: Tensor | None = None) -> Tensor:
        """Return heads in the layout of the caches of transformers.

        Heads without mixing become (B, K, T, H). Components become (B, 1, T, X): one head of all
        their features, followed by the scalars. So a position is contiguous, and one product reads
        all of it.
        """
        if not mixed:
            return x_BTCH.transpose(1, 2)
        x_BTX = x_BTCH.flatten(2)
        if scalars_BTK is not None:
            x_BTX = torch.cat([x_BTX, pack(scalars_BTK, x_BTX.dtype)], dim=-1)
        return x_BTX[:, None]

    def composites(self, stored: Tensor, mixing: MEAMixing | None) -> Tensor:
        """Return composite heads (B, K, S, H) of cached heads in the layout of `stored`."""
        if mixing is None:
            return stored
        x_BSX, width = stored[:, 0], mixing.shape[0] * self.H
        x_BSKH = mixing(x_BSX[..., :width].unflatten(-1, (-1, self.H)))
        if x_BSX.shape[-1] > width:
            x_BSKH = (x_BSKH.float() * unpack(x_BSX[..., width:])[..., None]).to(x_BSKH.dtype)
        return x_BSKH.transpose(1, 2)

    def biases(self, view: View) -> Tensor:
        """Return the ALiBi biases (B or 1, N, T, S), float32."""
        slopes_N = torch.tensor(self.slopes, device=view.distance_BTS.device)
        return slopes_N[:, None, None] * view.distance_BTS[:, None]

    def explicit(self, q_BNTH: Tensor, keys: Tensor, values: Tensor, view: View) -> Tensor:
        """Build the composite heads, and attend to them: (B, N, T, H)."""
        k_BKSH = self.composites(keys, self.key_mixing)
        v_BKSH = self.composites(values, self.value_mixing)
        mask = view.mask if self.slopes is None else view.hide(self.biases(view))
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q_BNTH.dtype)
        return functional.scaled_dot_product_attention(
            q_BNTH,
            k_BKSH,
            v_BKSH,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.N > self.K,
        )

    def absorbed(self, q_BNTH: Tensor, keys: Tensor, values: Tensor, view: View) -> Tensor:
        """Attend to the unmixed cache: (B, N, T, H)."""
        b, n, t, h = q_BNTH.shape
        s, grouped = keys.shape[2], (b, self.K, n // self.K * t, -1)
        q_BNTH = (q_BNTH.float() * self.scale).to(q_BNTH.dtype)
        if self.key_mixing is None:
            logits_BKMS = q_BNTH.reshape(grouped) @ keys.transpose(2, 3)
        else:
            width = self.key_C * h
            q_BKGTH = q_BNTH.unflatten(1, (self.K, -1))
            q_BMX = self.key_mixing.absorb(q_BKGTH).reshape(b, n * t, width)
            logits_BKMS = (q_BMX @ keys[:, 0, :, :width].transpose(1, 2)).view(grouped)
        logits_BKMS = logits_BKMS.float()
        if self.scalars:
            logits_BKMS = logits_BKMS * unpack(keys[:, 0, :, width:]).transpose(1, 2)[:, :, None]
        logits_BNTS = logits_BKMS.view(b, n, t, s)
        if self.slopes is not None:
            logits_BNTS = logits_BNTS + self.biases(view)
        p_BNTS = torch.softmax(view.hide(logits_BNTS), dim=-1).to(values.dtype)
        if self.value_mixing is None:
            return (p_BNTS.reshape(grouped) @ values).view(b, n, t, h)
        o_BMX = p_BNTS.flatten(1, 2) @ values[:, 0]
        o_BKGTCH = o_BMX.view(b, self.K, n // self.K, t, self.value_C, h)
        return self.value_mixing.outputs(o_BKGTCH).flatten(1, 2)

    def forward(self, x_BTD: Tensor, view: View, cache: Cache | None) -> Tensor:
        q_BTNH = self.q_proj(x_BTD).unflatten(-1, (self.N, self.H))
        q_BTNH = q_BTNH if self.q_norm is None else self.q_norm.heads(q_BTNH)
        q_BNTH = rotate(q_BTNH, view.table).transpose(1, 2)
        k_BTCH, v_BTCH, inverse_BTK = self.components(x_BTD, view.table)
        keys = self.stored(k_BTCH, self.key_mixing is not None, inverse_BTK)
        values = self.stored(v_BTCH, self.value_mixing is not None)
        if cache is not None:
            # Preallocated caches of transformers before 5.4 would write to slot 0 without these.
            slots = {"cache_position": view.slots_T}
            keys, values = cache.update(keys, values, self.index, slots)
        view = view.newest(keys.shape[2])
        attend = self.absorbed if view.few else self.explicit
        o_BTNH = attend(q_BNTH, keys, values, view).transpose(1, 2)
        o_BTNH = o_BTNH if self.head_norm is None else self.head_norm(o_BTNH)
        if self.gate_proj is not None:
            gate_BTNH = self.gate_proj(x_BTD).unflatten(-1, (self.N, -1))
            o_BTNH = o_BTNH * torch.sigmoid(gate_BTNH.float()).to(o_BTNH.dtype)
        return self.o_proj(o_BTNH.flatten(2))
