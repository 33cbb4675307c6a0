"""All options of a run, each defined once: frozen dataclasses and their defaults.

A config file's `get_config(arg)` starts from `default_config()`, a locked `ConfigDict` with all
options below, and changes some of them. `--config.key=value` on the command line overrides these
values. `from_config_dict` converts the result to the frozen dataclasses that the rest of the
package reads, and raises `UserError` for options that cannot work.
"""

import dataclasses
import enum
import json
from dataclasses import dataclass, field, replace
from typing import Any

from ml_collections import config_dict

REMAT_POLICIES = ("none", "dots", "full")
SCHEDULES = ("cosine", "constant", "wsd")
VARIANTS = ("mea", "differential_v1", "differential_v2", "talking_heads", "collaborative")
NORMS = ("pre", "post", "both")
ACTIVATIONS = ("silu", "gelu")
POSITIONS = ("rope", "alibi", "learned", "none")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn", "dynamic")
TRAINABLE = ("all", "attention")
ATTENTION_KERNELS = ("auto", "einsum", "chunked", "cpu", "cudnn", "splash")


class Side(enum.StrEnum):
    """The two sides of attention that are mixed and cached; a value is its name in parameters."""

    KEY = "key"
    VALUE = "value"


Components = int | tuple[int, ...] | None


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of rotary positions (ops/rope.py), for contexts beyond the original one."""

    kind: str = "none"  # "none", "linear", "llama3", "yarn", or "dynamic", whose frequencies change
    # beyond original_context, where positions are refused
    factor: float = 1.0  # of the wavelengths
    low_freq_factor: float = 1.0  # of "llama3"
    high_freq_factor: float = 4.0
    original_context: int = 8192  # of all kinds except "linear"
    beta_fast: float = 32.0  # of "yarn": turns within the original context, beyond which a
    # frequency is kept
    beta_slow: float = 1.0  # turns below which its wavelength is multiplied by the factor
    attention_factor: float = 0.0  # of "yarn": of queries and keys; 0: from the three others
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True  # of "yarn": round the ends of the ramp between the betas to whole pairs


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of LLaMA-3.2 shape whose attention is MEA, plain MHA/GQA/MQA, or a baseline."""

    vocab_size: int = 2048
    d_model: int = 256  # D
    n_layers: int = 6  # L
    n_heads: int = 8  # N, query heads
    n_kv_heads: int = 8  # K, composite key/value heads; N for MHA, fewer for GQA, 1 for MQA
    head_dim: int = 32  # H
    d_ff: int = 704  # F; no effect if there are experts
    n_experts: int = 0  # E, of a mixture that replaces each feed-forward half; 0: dense
    experts_per_token: int = 0  # k, the most probable experts, to which each token is sent
    d_expert: int = 0  # F of an expert
    normalise_router: bool = True  # divide a token's k probabilities by their sum
    variant: str = "mea"  # with hlc "none" and no head norm: MHA, GQA, MQA. Baselines of
    # model/variants.py: "differential_v1", "differential_v2", "talking_heads", "collaborative"
    hlc: str = "kv"  # heads mixed by W_lc: "kv", "k", "v", or "none" (plain attention)
    key_components: Components = None  # C_k: cached key heads, one number or one per layer; None: K
    value_components: Components = None  # C_v: the same for values
    key_mixing: str = "heads"  # "heads": W_lc, (C, K); "frequency": one complex (C, K) for each
    # rotary frequency
    value_mixing: str = "heads"  # "heads"; "dense": each head is a map of all C heads' features
    # bits of each cached slot, C H digits 0 to 8 for each layer (ops/slots.py); None: not packed
    key_bits: tuple[str, ...] | None = None
    value_bits: tuple[str, ...] | None = None
    # features of component heads that are cached, in all layers: C H digits, 1 for yes, 0 for a
    # feature that is always 0; "": all
    key_slots: str = ""
    value_slots: str = ""
    hlc_order: str = "before"  # keys are mixed "before" or "after" their norm and rotation; both
    # are the same function without qk_norm
    # initial mixing: "identity", with which a fresh model is MHA or GQA, or "normal", a random one
    hlc_init: str = "identity"
    hlc_form: str = "auto"  # in training: "folded" (W_lc into the projection), "explicit" (per
    # token), "auto": the faster one (hlc.choose_form)
    head_norm: bool = True  # RMSNorm on each head's output
    qk_norm: bool = False  # RMSNorm on queries and keys, before positions
    qk_norm_over: str = "head"  # features that share one rms: "head", or "all" heads (OLMo 2)
    key_mean: bool = False  # a constant part of each composite key, read without being cached
    qkv_bias: bool = False  # a bias of each query, component key and component value head
    out_bias: bool = False  # a bias of the attention's output
    gate: str = "none"  # heads' outputs times sigmoid(x W_g): one number per "head" or "feature"
    norms: str = "pre"  # RMSNorm on each half's input ("pre"), its output ("post"), or "both"
    norm_eps: float = 1e-5
    activation: str = "silu"  # of the gated feed-forward half: "silu", or "gelu" (tanh form)
    attention_scale: float = 0.0  # factor of logits; 0: 1/sqrt(head_dim)
    embedding_scale: float = 1.0  # factor of embeddings, not of a tied unembedding
    window: Components = None  # positions that a token sees, itself included; one number or one
    # per layer, 0: all; None: all in every layer
    positions: str = "rope"  # "rope", "alibi", "learned" (added to embeddings), "none"
    max_positions: int = 0  # rows of the table of "learned" positions
    rope_theta: float = 500_000.0
    layer_thetas: tuple[float, ...] | None = None  # a `rope_theta` per layer, 0: not rotated;
    # None: `rope_theta` in every layer. With it, layers with a window have no `rope_scaling`
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_embeddings: bool = True
    dtype: str = "auto"  # of products and, except on the "cpu" backend, activations: "float32",
    # "bfloat16", or "auto": bfloat16 wherever the hardware multiplies it faster
    # of products: "xla", "cpu" (forms that XLA's CPU compiler runs fast), "auto"
    backend: str = "auto"
    attention_kernel: str = "auto"  # "einsum" (stores T x T), "chunked" (any platform, long
    # contexts), "cpu", "cudnn" (GPU), "splash" (TPU), "auto": see ops.resolve.resolve
    # what the backward pass recomputes, see transformer.remat: "none", "dots", "full"
    remat: str = "none"
    scan_unroll: int = 1  # layers per iteration of the scan over layers
    loss_chunk: int = 256  # MiB of float32 logits on a device at the same time; 0: no limit

    def components(self, side: Side) -> tuple[int, ...]:
        """Return the number of component heads of `side` in each layer, length L."""
        value = self.key_components if side == Side.KEY else self.value_components
        if value is None:
            value = self.n_kv_heads
        return (value,) * self.n_layers if isinstance(value, int) else tuple(value)

    def windows(self) -> tuple[int, ...]:
        """Return the window of each layer, length L; 0 is none."""
        value = self.window or 0
        return (value,) * self.n_layers if isinstance(value, int) else tuple(value)

    def thetas(self) -> tuple[float, ...]:
        """Return the base of each layer's rotary frequencies, length L; 0 is no rotation."""
        return self.layer_thetas or (self.rope_theta,) * self.n_layers

    def longest_context(self) -> int | None:
        """Return the number of positions that the model can compute; None means no limit."""
        if self.positions == "learned":
            return self.max_positions
        dynamic = self.positions == "rope" and self.rope_scaling.kind == "dynamic"
        return self.rope_scaling.original_context if dynamic else None

    def limit_reason(self) -> str:
        """Return the option that `longest_context` is, and why, as the end of an error message."""
        if self.positions == "learned":
            return "config.model.max_positions, which the model learned"
        return (
            "config.model.rope_scaling.original_context, beyond which the frequencies of "
            "kind='dynamic' would change with the length of a sequence"
        )

    def mixes(self, side: Side) -> bool:
        """Return whether W_lc exists for the heads of `side`."""
        return side[0] in self.hlc if self.hlc != "none" else False

    def bits(self, side: Side) -> tuple[str, ...] | None:
        """Return `key_bits` or `value_bits`."""
        return self.key_bits if side == Side.KEY else self.value_bits

    def slots(self, side: Side) -> tuple[int, ...] | None:
        """Return the features of (C, H) that `key_slots` or `value_slots` keeps; None: all."""
        row = self.key_slots if side == Side.KEY else self.value_slots
        return tuple(i for i, digit in enumerate(row) if digit == "1") if row else None

    def mixing_kind(self, side: Side) -> str:
        """Return the kind of mixing of `side` (ops/hlc.py)."""
        return self.key_mixing if side == Side.KEY else self.value_mixing


def layer_configs(model: "ModelConfig") -> list["ModelConfig"]:
    """Return a config for each layer of `model`: that of a model of such layers only.

    Its `rope_theta` may be 0. Equal layers have equal configs.
    """
    rows = zip(
        *(model.components(side) for side in Side), model.windows(), model.thetas(), strict=True
    )
    found = []
    for key, value, window, theta in rows:
        scaling = model.rope_scaling
        if window and model.layer_thetas is not None:
            scaling = RopeScaling()
        found.append(
            replace(
                model,
                key_components=key,
                value_components=value,
                window=window or None,
                layer_thetas=None,
                rope_theta=theta,
                rope_scaling=scaling,
            )
        )
    return found


@dataclass(frozen=True)
class ResolvedModel(ModelConfig):
    """A `ModelConfig` whose "auto" options `ops.resolve.resolve` has set for some devices."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents."""

    source: str = "python_stdlib"  # or "text", "jsonl" (also .gz, .zst), "parquet", "tfds:<name>"
    path: str = ""  # file, folder or glob of files; data_dir of "tfds:"
    field: str = "text"  # the field of "jsonl" and "tfds:", or column of "parquet", with the text;
    # "meta.text" is the field "text" inside the field "meta"
    split: str = "train"  # of "tfds:"
    weight: float = 1.0  # share of training windows drawn from this source, relative to the others
    held_out: bool = False  # the entire source is held-out text; all others are then for training


@dataclass(frozen=True)
class DataConfig:
    """The sources of text, and how text becomes windows of tokens."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    tokenizer: str = "bpe:2048"  # "bytes", "bpe:<size>" (trained on the text), *.json, *.model
    context_length: int = 256  # T, positions of a window
    held_out_fraction: float = 0.03  # of each source's text; 0: none. Ignored if any source is
    # held_out
    cache_dir: str = ""  # of prepared windows; "": $MEA_JAX_CACHE, or ~/.cache/mea_jax
    prefetch: int = 8  # batches read ahead
    read_threads: int = 1  # per host
    bad_input: str = "stop"  # at documents, files and prepared windows that cannot be read, or
    # "skip" and count them


@dataclass(frozen=True)
class StartConfig:
    """The start of a run: initial parameters, a teacher, and which parameters are trained.

    A path is a run directory, of which the newest undamaged checkpoint is used, or one of its
    steps, `<run>/checkpoints/<step>`.
    """

    checkpoint: str = ""  # with the initial parameters; moments and steps start from 0. "": fresh
    # parameters. Read at step 0 only: a resumed run does not need it
    trainable: str = "all"  # or "attention": the layers' attention modules; the rest is frozen
    teacher: str = ""  # a model to distil next-token distributions from; "": none
    # w in loss = (1 - w) * cross-entropy + w * KL(teacher || model), both
    # at temperature 1; in [0, 1], above 0 if there is a teacher
    distillation: float = 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-3  # peak
    schedule: str = "cosine"  # "cosine", "constant", or "wsd" (warmup, stable, decay)
    warmup_steps: int = 100
    final_fraction: float = 0.1  # of the peak, reached at the last step
    decay_fraction: float = 0.2  # of all steps, at the end: the decay phase of "wsd"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    decay_mixing: bool = False  # weight decay on W_lc as well
    clip_norm: float = 1.0  # of the global gradient; 0: no clipping
    z_loss: float = 0.0  # weight of mean(logsumexp(logits)^2)
    # weight of E sum_e (share of choices)(mean probability), averaged over layers
    load_balance: float = 0.0
    router_z_loss: float = 0.0  # weight of mean(logsumexp(router logits)^2), averaged over layers


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1 is all devices that the other axes leave."""

    data: int = -1  # parameters replicated, batch sharded
    fsdp: int = 1  # parameters sharded, batch sharded
    tensor: int = 1  # heads, feed-forward and vocabulary sharded
    sequence: int = 1  # each window's positions sharded, attention gathers keys and values;
    # parameters sharded too
    slices: int = 1  # TPU slices, connected only by a data-centre network: `data` spans them and
    # must be a multiple of their number
    expert: int = 1  # experts and batch sharded, tokens exchanged; other parameters sharded too


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out windows."""

    every: int = 500  # steps; 0: only at the end
    batches: int = 8  # per evaluation during training; the last one uses all held-out windows
    sample_prompt: str = ""  # continued at the end of the run
    sample_tokens: int = 128
    sample_temperature: float = 0.6


@dataclass(frozen=True)
class CheckpointConfig:
    """Options for saving checkpoints."""

    every: int = 1000  # steps; 0: by time only; the last step is always saved
    minutes: float = 10.0  # the most time between two checkpoints; 0: by steps only
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # checkpoints of steps divisible by this are kept too; 0: none


@dataclass(frozen=True)
class GuardConfig:
    """Options for handling gradients that are not finite, and loss spikes."""

    max_skipped: int = 10  # updates skipped because of their gradient, among the last 1000, before
    # the run stops; 0: it stops at the first one
    spike_margin: float = 1.0  # nats: a spike is `spike_steps` consecutive losses that all exceed
    # the lowest loss before them by this much
    spike_steps: int = 5  # 0: no detection
    spike_smoothing: int = 10  # the lowest loss is the lowest mean of this many losses
    rewind: bool = False  # at a spike, return to the last checkpoint before it and skip its batches
    max_rewinds: int = 3  # per run, before it stops


@dataclass(frozen=True)
class TrainConfig:
    """All options of one run."""

    name: str = "run"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 8  # windows per step, over all devices
    accumulate: int = 1  # parts that a batch is split into, computed one after another
    log_every: int = 10  # steps between lines of metrics.jsonl
    model: ModelConfig = field(default_factory=ModelConfig)
    start: StartConfig = field(default_factory=StartConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain tree of JSON values (tuples as lists)."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def default_config() -> config_dict.ConfigDict:
    """Return all options at their defaults, locked so that a misspelt key raises an error."""

    def convert(value):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return config_dict.ConfigDict({f.name: convert(getattr(value, f.name)) for f in fields})
        if isinstance(value, tuple):
            return tuple(dataclasses.asdict(v) for v in value)  # sources
        return config_dict.placeholder(object) if value is None else value

    return convert(TrainConfig()).lock()


# Keys that change how a run is executed, not what it computes: a resumed run may change them.
EXECUTION_KEYS = (
    "log_every",
    "accumulate",
    "mesh.",
    "checkpoint.",
    "guards.",
    "evaluate.",
    "data.cache_dir",
    "data.prefetch",
    "data.read_threads",
    "data.bad_input",
    "model.backend",
    "model.attention_kernel",
    "model.hlc_form",
    "model.remat",
    "model.scan_unroll",
    "model.loss_chunk",
)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dict as {"a.b.c": leaf}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return lines `key: old -> new` for keys of `to_dict` trees that change the computation."""
    a, b = flatten(old), flatten(new)
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not key.startswith(EXECUTION_KEYS)
    ]
