"""Multi-head Explicit Attention (arXiv 2601.19611) for transformers, self-contained.

This file, attention_mea.py and configuration_mea.py are stored next to the weights of an exported
model and need only torch and transformers:

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

The KV cache may be of any class of transformers; it contains component heads only. transformers up
to 5.23 calls it `past_key_values`, later versions call it `cache`; both names work here with every
version. Array names end in the letters of attention_mea.py.
"""

from typing import Any

import torch
import transformers
from packaging import version
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .attention_mea import MEAAttention, MEAMixing, MEARMSNorm, View, rope_frequencies
from .configuration_mea import MEAConfig

logger = logging.get_logger(__name__)
Tensor = torch.Tensor
# The largest number of new positions that read a cache unmixed. Each of them costs every query head
# C products of width H instead of one; mixing the cache first costs a pass over S K H numbers.
ABSORBED = 8
# The norms of a layer by `norms`: of the input and the output of attention, then of the
# feed-forward half, with the names of Llama, OLMo 2 and Gemma 3.
_NORMS = {
    "pre": ("input_layernorm", "", "post_attention_layernorm", ""),
    "post": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
_RETURNED = next(
    name
    for name in ("cache", "past_key_values")
    if name in CausalLMOutputWithPast.__dataclass_fields__
)


def untested_versions(tested_with: dict[str, list[str]] | None) -> str:
    """Return a description of installed versions that are outside of the tested range, or "".

    Patch releases count as the minor release that they belong to.
    """
    installed = {"transformers": transformers.__version__, "torch": torch.__version__}
    found = []
    for name, (oldest, newest) in (tested_with or {}).items():
        minor = version.parse(installed[name]).release[:2]
        if not version.parse(oldest).release <= minor <= version.parse(newest).release:
            tested = newest if oldest == newest else f"{oldest} to {newest}"
            found.append(f"{name} {installed[name]} (tested with {tested})")
    return " and ".join(found)


def returned(cache: Cache | None) -> dict[str, Any]:
    """Return `cache` under the name that outputs of the installed transformers use."""
    return {_RETURNED: cache}


def find_cache(
    past_key_values: Cache | None, cache: Cache | None, others: dict[str, Any]
) -> Cache | None:
    """Return the cache that was given under either name.

    `others` are the keywords that the model does not have.

    Raises:
      TypeError: if one of `others` looks like a cache, since ignoring it would lose the context
        silently, or if the cache is not a `Cache`.
      ValueError: if two different caches are given.
    """
    for name, value in others.items():
        # transformers 4 passes `cache_position`, which the cache itself determines.
        looks = isinstance(value, Cache) or "cache" in name or "past" in name
        if looks and value is not None and name != "cache_position":
            raise TypeError(
                f"MEA models do not know the keyword {name!r}, which looks like a KV cache: "
                "pass the cache as `cache` or `past_key_values`"
            )
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("give the KV cache as either `cache` or `past_key_values`, not as both")
    given = past_key_values if cache is None else cache
    if not isinstance(given, Cache | None):
        raise TypeError(
            f"the KV cache must be a Cache of transformers such as DynamicCache, not "
            f"{type(given).__name__}"
        )
    return given


class MEAMLP(nn.Module):
    """A gated feed-forward layer: SwiGLU, or GEGLU with another `hidden_act`."""

    def __init__(self, config: MEAConfig):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MEAExperts(nn.Module):
    """A mixture of SwiGLU experts, weighted by the largest entries of a softmax in float32."""

    def __init__(self, config: MEAConfig):
        super().__init__()
        e, d, f = config.n_experts, config.hidden_size, config.d_expert
        self.chosen, self.normalise = config.experts_per_token, config.normalise_router
        self.router = nn.Linear(d, e, bias=False)
        self.gate, self.up = nn.Parameter(torch.empty(e, d, f)), nn.Parameter(torch.empty(e, d, f))
        self.down = nn.Parameter(torch.empty(e, f, d))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_MD = x_BTD.flatten(0, 1)
        router_ME = functional.linear(x_MD.float(), self.router.weight.float())
        weight_MA, expert_MA = torch.softmax(router_ME, dim=-1).topk(self.chosen, dim=-1)
        if self.normalise:
            weight_MA = weight_MA / weight_MA.sum(-1, keepdim=True)
        y_MD = torch.zeros_like(x_MD)
        for expert in expert_MA.unique().tolist():
            row_R, place_R = torch.where(expert_MA == expert)
            x_RD = x_MD[row_R]
            hidden_RF = functional.silu(x_RD @ self.gate[expert]) * (x_RD @ self.up[expert])
            part_RD = (hidden_RF @ self.down[expert]) * weight_MA[row_R, place_R, None].to(x_RD)
            y_MD = y_MD.index_add(0, row_R, part_RD)
        return y_MD.view_as(x_BTD)


class MEADecoderLayer(GradientCheckpointingLayer):
    """A decoder layer: attention, then a gated layer or a mixture of experts, with their norms."""

    def __init__(self, config: MEAConfig, index: int):
        super().__init__()
        self.self_attn = MEAAttention(config, index)
        self.mlp = MEAExperts(config) if config.n_experts else MEAMLP(config)
        self.norms = _NORMS[config.norms]
        for name in filter(None, self.norms):
            setattr(self, name, MEARMSNorm(config.hidden_size, config.rms_norm_eps))

    def norm(self, place: int, x_BTD: Tensor) -> Tensor:
        """Apply the norm at `place` in `_NORMS`, if there is one."""
        name = self.norms[place]
        return getattr(self, name)(x_BTD) if name else x_BTD

    def forward(self, x_BTD: Tensor, view: View, cache: Cache | None) -> Tensor:
        x_BTD = x_BTD + self.norm(1, self.self_attn(self.norm(0, x_BTD), view, cache))
        return x_BTD + self.norm(3, self.mlp(self.norm(2, x_BTD)))


class MEAPreTrainedModel(PreTrainedModel):
    """The base class of MEA models; it initializes weights and warns about untested versions."""

    config: MEAConfig
    config_class = MEAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MEADecoderLayer"]  # noqa: RUF012 - the base has no ClassVar
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 - likewise

    def __init__(self, config: MEAConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if untested := untested_versions(config.tested_with):
            logger.warning_once(
                f"The code of this MEA model has not been tested with {untested}: install a tested "
                "version if its output looks wrong"
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MEAExperts):
            for weight in (module.gate, module.up, module.down):
                nn.init.normal_(weight, std=self.config.initializer_range)
        # Weights from a checkpoint are marked; torch's own initialisers skip them.
        if isinstance(module, MEAMixing) and not hasattr(module.weight, "_is_hf_initialized"):
            module.weight.copy_(module.start())


class MEAModel(MEAPreTrainedModel):
    """A decoder-only transformer with MEA; it returns hidden states."""

    def __init__(self, config: MEAConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            rows = config.max_position_embeddings
            self.position_embedding = nn.Embedding(rows, config.hidden_size)
        layers = (MEADecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = MEARMSNorm(config.hidden_size, config.rms_norm_eps)
        # The window and rotation of each layer, and the first layer that has the same.
        self.kinds = [(config.window(i), config.rope(i)) for i in range(config.num_hidden_layers)]
        self.first = [self.kinds.index(kind) for kind in self.kinds]
        self.gradient_checkpointing = False
        self.post_init()

    def look(
        self, layer: int, x_BTD: Tensor, position_ids: Tensor, attention_mask, past: int
    ) -> View:
        """Return the positions of the newest T of past + T tokens, and what `layer` may read.

        `attention_mask` is that of transformers: (B, past + T), 0 at padding; or a complete mask
        (B, 1, T, S); or one for each kind of layer, where that of layers with a window may have
        only the newest slots. A window counts padding, as in transformers.
        """
        t, device, mask, table = x_BTD.shape[1], x_BTD.device, attention_mask, None
        window, rope = self.kinds[layer]
        if isinstance(mask, dict):
            mask = mask["sliding_attention" if window else "full_attention"]
        if rope is not None:
            frequencies_F, factor = rope_frequencies(rope, self.config.head_dim)
            angles_BT1F = position_ids[:, :, None, None].float() * frequencies_F.to(device)
            table = (angles_BT1F.cos() * factor, angles_BT1F.sin() * factor)
        slots = past + t if mask is None else mask.shape[-1]
        slots_S = torch.arange(slots, device=device) + max(past + t - slots, 0)
        slots_T = torch.arange(past, past + t, device=device)
        ahead_TS = slots_S - slots_T[:, None]
        distance_BTS, near_TS = ahead_TS[None], ahead_TS > -(window or past + t)
        if mask is None or mask.ndim == 2:
            seen_BTS = ((ahead_TS <= 0) & near_TS)[None]
            padded = mask is not None and (past > 0 or not bool(mask.all()))
            if padded:  # padding reads itself: a row with everything masked has no softmax
                seen_BTS = seen_BTS & (mask[:, None].bool() | (ahead_TS == 0))
                places_BS = mask.long().cumsum(-1)
                distance_BTS = places_BS[:, None] - places_BS[:, past : past + t, None]
            plain = not padded and past == 0 and self.config.positions != "alibi"
            mask = None if plain and t <= (window or t) else seen_BTS[:, None]
        elif window:
            far = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = mask.masked_fill(~near_TS, far)
        few = past > 0 and t <= ABSORBED
        return View(table, mask, distance_BTS.float(), few, slots_T, past + t)

    def check_positions(self, position_ids: Tensor) -> None:
        """Raise `ValueError` for positions that "dynamic" scaling would change the frequencies at.

        They would depend on the sequence's length, but cached keys are rotated already.
        """
        dynamic = (self.config.rope_parameters or {}).get("rope_type") == "dynamic"
        if dynamic and int(position_ids.max()) >= self.config.max_position_embeddings:
            raise ValueError(
                f"position {int(position_ids.max())} is not below max_position_embeddings="
                f"{self.config.max_position_embeddings}, beyond which rope_type 'dynamic' is not "
                "supported: shorten the text"
            )

    def cache_for(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """Return the cache to write to: the given one, a new one, or None.

        With gradient checkpointing, which runs layers again for their gradients, there is none.
        Raise `ValueError` if that would lose a filled cache.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if given is not None and given.get_seq_length():
                raise ValueError(
                    "gradient checkpointing cannot continue from a filled KV cache: leave the "
                    "cache out, or call model.gradient_checkpointing_disable() first"
                )
            if use_cache:
                logger.warning_once(
                    "`use_cache=True` is incompatible with gradient checkpointing. Setting "
                    "`use_cache=False`."
                )
            return None
        return DynamicCache(config=self.config) if given is None and use_cache else given

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, exactly one of them")
        if kwargs.get("output_attentions"):
            raise ValueError("attention maps are not returned: leave output_attentions out")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self.cache_for(find_cache(past_key_values, cache, kwargs), use_cache)
        past = 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + x_BTD.shape[1], device=x_BTD.device)[None]
        if self.config.positions == "learned":
            added_BTD = self.position_embedding(position_ids).float()
            x_BTD = (x_BTD.float() + added_BTD).to(x_BTD.dtype)
        if self.config.embedding_multiplier != 1:
            x_BTD = x_BTD * x_BTD.new_tensor(self.config.embedding_multiplier)
        self.check_positions(position_ids)
        views = {
            first: self.look(first, x_BTD, position_ids, attention_mask, past)
            for first in set(self.first)
        }
        states = []
        for first, layer in zip(self.first, self.layers, strict=True):
            states.append(x_BTD)
            x_BTD = layer(x_BTD, views[first], cache)
        x_BTD = self.norm(x_BTD)
        shown = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            hidden_states=(*states, x_BTD) if shown else None,
            **returned(cache),
        )


class MEAForCausalLM(MEAPreTrainedModel, GenerationMixin):
    """A causal language model: `MEAModel` with a head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - likewise

    def __init__(self, config: MEAConfig):
        super().__init__(config)
        self.model = MEAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            **returned(out.get(_RETURNED)),
        )
