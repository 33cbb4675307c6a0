"""Every option of a run, once: frozen dataclasses and their defaults.

A config file's `get_config(arg)` starts from `default_config()`, a locked `ConfigDict` with all
options below, and sets what it changes; `--config.key=value` overrides on the command line come
on top. `from_config_dict` turns the result into the frozen dataclasses that the rest of the
package reads, and raises `UserError` for anything that cannot work.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ml_collections import config_dict

REMAT_POLICIES = ("none", "dots", "full")
SCHEDULES = ("cosine", "constant", "wsd")
VARIANTS = ("mea", "differential_v1", "differential_v2", "talking_heads", "collaborative")
POSITIONS = ("rope", "alibi", "learned", "none")
TRAINABLE = ("all", "attention")
ATTENTION_KERNELS = ("auto", "einsum", "chunked", "cpu", "cudnn", "splash")
Components = int | tuple[int, ...] | None


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1 and later for rotary positions."""

    factor: float = 1.0  # 1.0: no scaling
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of LLaMA-3.2 shape whose attention is MEA, plain MHA/GQA/MQA, or a rival."""

    vocab_size: int = 2048
    d_model: int = 256  # D
    n_layers: int = 6  # L
    n_heads: int = 8  # N, query heads
    n_kv_heads: int = 8  # K, composite key/value heads; N for MHA, fewer for GQA, 1 for MQA
    head_dim: int = 32  # H
    d_ff: int = 704  # F; of no effect where there are experts
    n_experts: int = 0  # E, of a mixture in place of each feed-forward half; 0: dense
    experts_per_token: int = 0  # k, the most probable ones; every token gets all of them
    d_expert: int = 0  # F of an expert
    normalise_router: bool = True  # the k probabilities of a token divided by their sum
    variant: str = "mea"  # with hlc "none" and no head norm: MHA, GQA, MQA. The rivals of
    # model/variants.py: "differential_v1", "differential_v2", "talking_heads", "collaborative"
    hlc: str = "kv"  # heads mixed by W_lc: "kv", "k", "v", or "none" (plain attention)
    key_components: Components = None  # C_k: cached key heads, one number or one a layer; None: K
    value_components: Components = None  # C_v: likewise for values
    key_mixing: str = "heads"  # "heads": W_lc, (C, K); "frequency": one complex (C, K) for each
    # rotary frequency
    value_mixing: str = "heads"  # "heads"; "dense": one map from all C heads' features per head
    hlc_order: str = "before"  # keys are mixed "before" or "after" their norm and rotation: the
    # same function unless qk_norm
    # fresh mixing: a fresh model is MHA or GQA; or "normal": any mixture
    hlc_init: str = "identity"
    hlc_form: str = "auto"  # of training: "folded" (W_lc into the projection), "explicit" (per
    # token), "auto": what moves fewer bytes (hlc.choose_form)
    head_norm: bool = True  # RMSNorm on each head's output
    qk_norm: bool = False  # RMSNorm on each query and key head, before positions
    gate: str = "none"  # heads' outputs times sigmoid(x W_g): one number a "head", or a "feature"
    norm_eps: float = 1e-5
    positions: str = "rope"  # "rope", "alibi", "learned" (added to embeddings), "none"
    max_positions: int = 0  # rows of the table of "learned" positions
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_embeddings: bool = True
    dtype: str = "auto"  # of products and, but for the "cpu" backend, activations: "float32",
    # "bfloat16", or "auto": bfloat16 wherever the hardware multiplies it faster
    # products: "xla", "cpu" (forms that XLA's CPU compiler runs fast), "auto"
    backend: str = "auto"
    attention_kernel: str = "auto"  # "einsum" (holds T x T), "chunked" (any platform, long
    # contexts), "cpu", "cudnn" (GPU), "splash" (TPU), "auto": see ops.backend.resolve
    # what the backward pass recomputes: none, dots or full: see transformer.remat
    remat: str = "none"
    scan_unroll: int = 1  # layers per iteration of the scan over layers
    loss_chunk: int = 256  # MiB of float32 logits that a device holds at one time; 0: all of them

    def components(self, which: str) -> tuple[int, ...]:
        """Component heads of every layer, length L. `which` is "key" or "value"."""
        value = self.key_components if which == "key" else self.value_components
        if value is None:
            value = self.n_kv_heads
        return (value,) * self.n_layers if isinstance(value, int) else tuple(value)

    def mixes(self, which: str) -> bool:
        """Return whether W_lc exists for "key" or "value" heads."""
        return which[0] in self.hlc if self.hlc != "none" else False

    def mixing_kind(self, which: str) -> str:
        """Return the kind of mixing of "key" or "value" heads (ops/hlc.py)."""
        return self.key_mixing if which == "key" else self.value_mixing


@dataclass(frozen=True)
class ResolvedModel(ModelConfig):
    """A `ModelConfig` whose "auto" options `ops.backend.resolve` has settled for some devices."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents."""

    source: str = "python_stdlib"  # or "text", "jsonl" (also .gz, .zst), "parquet", "tfds:<name>"
    path: str = ""  # file, folder or glob of files; data_dir of "tfds:"
    field: str = "text"  # the field of "jsonl" and "tfds:", or column of "parquet", with the text;
    # "meta.text" is the field "text" inside the field "meta"
    split: str = "train"  # of "tfds:"
    weight: float = 1.0  # share of training windows drawn from this source, relative to the others
    held_out: bool = False  # the entire source is held-out text; the others are then for training


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes windows of tokens."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    tokenizer: str = "bpe:2048"  # "bytes", "bpe:<size>" (trained on the spot), *.json, *.model
    context_length: int = 256  # T, positions of a window
    held_out_fraction: float = 0.03  # of each source's text; 0: none. No part of it where a source
    # is named as held_out
    cache_dir: str = ""  # of prepared windows; "": $MEA_JAX_CACHE, else ~/.cache/mea_jax
    prefetch: int = 8  # batches read ahead
    read_threads: int = 1  # per host
    bad_input: str = "stop"  # at documents, files and prepared windows that cannot be read; or
    # "skip": they are left out and counted


@dataclass(frozen=True)
class StartConfig:
    """The start of a run: parameters, a teacher, and which parameters are trained.

    A path is a run directory, whose newest checkpoint that is not damaged counts, or one of its
    steps, `<run>/checkpoints/<step>`.
    """

    checkpoint: str = ""  # whose parameters are the first; moments and steps begin anew. "": fresh
    # parameters. Read for step 0 only: a run that goes on needs it no more
    trainable: str = "all"  # or "attention": the layers' attention modules; the rest stays as it is
    teacher: str = ""  # a model whose next-token distributions are imitated; "": none
    # w in loss = (1 - w) * cross-entropy + w * KL(teacher || model), both
    # at temperature 1; in [0, 1], above 0 where there is a teacher
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
    # weight of E sum_e (share of choices)(mean probability), mean of layers
    load_balance: float = 0.0
    router_z_loss: float = 0.0  # weight of mean(logsumexp(router logits)^2), mean of layers


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1 takes what the other axes leave."""

    data: int = -1  # copies of the parameters, batch split
    fsdp: int = 1  # parameters split, batch split
    tensor: int = 1  # heads, feed-forward and vocabulary split
    sequence: int = 1  # each window's positions split, attention gathers its keys and values;
    # parameters split too
    slices: int = 1  # TPU slices that only a data-centre network joins: `data` runs over them, and
    # must be a multiple of their number
    expert: int = 1  # experts split, batch split, tokens exchanged; other parameters split too


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out windows."""

    every: int = 500  # steps; 0: only at the end
    batches: int = 8  # of an evaluation during training; the last one takes every held-out window
    sample_prompt: str = ""  # continued at the end of the run
    sample_tokens: int = 128
    sample_temperature: float = 0.6


@dataclass(frozen=True)
class CheckpointConfig:
    """Options for saving checkpoints."""

    every: int = 1000  # steps; 0: by time only; the last step is always saved
    minutes: float = 10.0  # at most so many between two checkpoints; 0: by steps only
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # those of steps divisible by it are kept as well; 0: none


@dataclass(frozen=True)
class GuardConfig:
    """Options for handling gradients that are not finite, and loss spikes."""

    max_skipped: int = 10  # updates left out because of their gradient, among the last 1000, until
    # the run stops; 0: it stops at the first
    spike_margin: float = 1.0  # nats: a spike is `spike_steps` losses in a row that all lie so far
    # above the lowest loss before them
    spike_steps: int = 5  # 0: no detection
    spike_smoothing: int = 10  # the lowest loss is the lowest mean of so many
    rewind: bool = False  # at a spike, back to the last checkpoint before it, without its batches
    max_rewinds: int = 3  # of a run, until it stops


@dataclass(frozen=True)
class TrainConfig:
    """One run."""

    name: str = "run"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 8  # windows per step, over all devices
    accumulate: int = 1  # parts that a batch is split into, one after another
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
        """A plain tree of JSON values (tuples as lists)."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def default_config() -> config_dict.ConfigDict:
    """Every option at its default, locked: a misspelt key raises instead of being ignored."""

    def convert(value):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return config_dict.ConfigDict({f.name: convert(getattr(value, f.name)) for f in fields})
        if isinstance(value, tuple):
            return tuple(dataclasses.asdict(v) for v in value)  # sources
        return config_dict.placeholder(object) if value is None else value

    return convert(TrainConfig()).lock()


# Keys that say how a run is executed, not what it computes: a resumed run may change them.
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
    """A nested dict as {"a.b.c": leaf}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: old -> new` for keys of two `to_dict` trees that change what is computed."""
    a, b = flatten(old), flatten(new)
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not key.startswith(EXECUTION_KEYS)
    ]
