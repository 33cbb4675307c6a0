"""What head-level linear composition learned: W_lc of a trained model, layer by layer.

    python -m mea_jax.study.heads --checkpoint runs/quickstart --out runs/quickstart/heads

Of every checkpoint that a run keeps: how far the mixing of keys and of values is from block
identity, its singular values, whether its rows or columns fall into clusters (against chance), and
how alike the heads are before and after mixing over held-out text. Prints a table of the newest,
writes `heads.json` (all of it; head_measures.py and clusters.py say what each number is) and
figures. One step, `runs/quickstart/checkpoints/500`, is looked at alone.
"""

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors, make_writable, write_json
from mea_jax.checkpoint.layerwise import StoredModel
from mea_jax.checkpoint.load import open_trained, unresolved
from mea_jax.checkpoint.manager import find_checkpoint
from mea_jax.compress.calibration import CalibrationTexts
from mea_jax.compress.options import Options
from mea_jax.compress.stream import Stream, progress
from mea_jax.config.schema import ModelConfig
from mea_jax.errors import UserError
from mea_jax.model.layer_spec import LayerSpec, layer_specs
from mea_jax.ops import hlc
from mea_jax.ops.backend import resolve
from mea_jax.ops.rms_norm import rms_norm
from mea_jax.study import head_figures, head_table
from mea_jax.study import head_measures as measures
from mea_jax.study.clusters import clusters
from mea_jax.study.head_table import Row

Tree = dict[str, Any]
Say = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class AnalysisOptions:
    """See the flags of the command."""

    held_out_tokens: int = 32_768
    shuffles: int = 999
    seed: int = 0


def mixed(model: ModelConfig, path: Path) -> tuple[str, ...]:
    """Which of "key" and "value" heads the model mixes. Raises `UserError` where it is neither."""
    found = tuple(which for which in ("key", "value") if model.mixes(which))
    if not found:
        what = "plain attention (hlc='none')" if model.variant == "mea" else repr(model.variant)
        raise UserError(
            f"--checkpoint {path} has no mixing of heads: it is {what}, and has no W_lc to look "
            "at; give a model trained with config.model.hlc='kv'"
        )
    return found


def steps_of(path: Path, say: Say) -> list[Path]:
    """The checkpoints to look at, the oldest first: all good ones of a run directory, or the one
    step that `path` is. Raises `UserError`."""
    run, step = find_checkpoint(path)
    newest = open_trained(path, say)
    mixed(newest.config.model, path)
    folders = []
    for older in [] if step is not None else newest.checkpoints.steps():
        if older < newest.step:
            if problem := newest.checkpoints.damage(older):
                say(f"the checkpoint of step {older} is damaged: {problem}: left out")
            else:
                folders.append(run / "checkpoints" / str(older))
    return [*folders, run / "checkpoints" / str(newest.step)]


def begun_elsewhere(source: StoredModel) -> str | None:
    """Why the mixing did not begin at block identity; None where it did."""
    if (source.run / "compression.json").exists():
        return "a compression made its mixing"
    if start := source.config.start.checkpoint:
        return f"it was trained on from {start}"
    return None


def composites_are_linear(model: ModelConfig, which: str) -> bool:
    """Whether composite heads are one projection of the layer's input.

    Keys that are normed before they are mixed are not.
    """
    return not (which == "key" and model.qk_norm and model.hlc_order == "after")


@functools.partial(jax.jit, static_argnums=0)
def _input_sums(epsilon: float, scale_D, x_BTD, batch):
    """Sums over tokens of x x^T and x, x the input of an attention, and the number of tokens."""
    weight_BT1 = (batch["segment_ids"] > 0).astype(jnp.float32)[..., None]
    normed_BTD = rms_norm(x_BTD, scale_D, epsilon).astype(jnp.float32) * weight_BT1
    flat = normed_BTD.reshape(-1, normed_BTD.shape[-1])
    square_DD = jnp.dot(flat.T, flat, precision=jax.lax.Precision.HIGHEST)
    return square_DD, flat.sum(axis=0), weight_BT1.sum()


def input_covariance(stream: Stream, spec: LayerSpec, layer: Tree) -> np.ndarray:
    """Of what the next layer's attention reads, (D, D), float64.

    Keys and values, mixed or not, are projections of it, so it is all that is needed of the text.
    """
    scale_D = stream.place(layer["attention_norm"]["scale"])
    width = spec.model.d_model
    square_DD, sum_D, tokens = np.zeros((width, width)), np.zeros(width), 0.0
    with jax.set_mesh(stream.mesh):
        for number, batch in enumerate(stream.batches):
            x_BTD = stream.residual(number, spec.model)
            new = _input_sums(spec.model.norm_eps, scale_D, x_BTD, stream.put(batch))
            square, total, count = jax.device_get(new)
            square_DD, sum_D, tokens = square_DD + square, sum_D + total, tokens + float(count)
    mean_D = sum_D / tokens
    return square_DD / tokens - np.outer(mean_D, mean_D)


def tests(
    kind: str, mix: np.ndarray, start: np.ndarray | None, asked: AnalysisOptions
) -> dict[str, dict[str, Any] | None]:
    """Clusters of what training changed, outside block identity, whose own pattern is not learned.

    Of a mixing that did not begin there: of all of it.
    """
    x_CK = measures.by_pair(kind, mix if start is None else mix - start)
    shown_CK = np.ones(x_CK.shape, bool)
    if start is not None:
        shown_CK = np.asarray(hlc.block_identity(*x_CK.shape)) == 0
    found: dict[str, dict[str, Any] | None] = {}
    for side, x, shown in zip(
        head_table.SIDES, (x_CK, x_CK.T), (shown_CK, shown_CK.T), strict=True
    ):
        result = clusters(x, shown, kind == "heads", asked.shuffles, asked.seed)
        found[side] = dataclasses.asdict(result) if result else None
    return found


def analyse_layer(
    model: ModelConfig,
    which: str,
    attention: Tree,
    inputs_DD: np.ndarray,
    began: bool,
    asked: AnalysisOptions,
) -> Row:
    """All measures of one layer's keys or values. `began`: whether at block identity."""
    kind, kernel_DCH = model.mixing_kind(which), np.asarray(attention[which])
    mix = measures.as_mixing(kind, attention[f"{which}_mixing"])
    c, k, h = kernel_DCH.shape[1], model.n_kv_heads, model.head_dim
    start = measures.starting(kind, c, k, h) if began else None
    values = measures.singular_values(kind, mix)
    row: Row = {
        "which": which,
        "kind": kind,
        "components": c,
        "composites": k,
        "mixing": measures.by_pair(kind, mix),
        "distance": None if start is None else measures.distance(mix, start),
        "own": measures.own_weight(kind, mix),
        "from_others": measures.from_others(kind, mix),
        "head_level": measures.head_level(kind, mix),
        "singular_values": values.mean(axis=0) if kind == "frequency" else values,
        "effective_rank": measures.rank_in_heads(kind, values, h),
        **tests(kind, mix, start, asked),
    }
    # Not `hlc.composite_heads`: components are measured times a key norm's weight, as these are.
    parameter = jnp.asarray(attention[f"{which}_mixing"])
    folded_DKH = np.asarray(hlc.fold(kind, jnp.asarray(kernel_DCH), parameter))
    if not composites_are_linear(model, which):
        return row | {"composite_rank": None, "before": None, "after": None, "chance": None}
    before = measures.covariance_of(kernel_DCH, inputs_DD)
    after = measures.covariance_of(folded_DKH, inputs_DD)
    composite = measures.composite_values(kind, after, k)
    return row | {
        "composite_rank": measures.rank_in_heads(kind, composite, h),
        "before": measures.redundancy(before, c),
        "after": measures.redundancy(after, k),
        "chance": measures.chance(inputs_DD, k, h, asked.seed),
    }


class RunAnalysis:
    """The checkpoints of a run, looked at on one choice of text."""

    def __init__(self, folders: list[Path], scratch: Path, asked: AnalysisOptions, say: Say):
        self.sources = [StoredModel(folder, say) for folder in folders]
        self.scratch, self.asked = scratch, asked
        newest = self.sources[-1]
        auto = unresolved(newest.config.model)
        self.model = resolve(auto, jax.devices(), newest.config.data.context_length)
        self.which = mixed(self.model, folders[-1])
        self.elsewhere = begun_elsewhere(newest)
        self.texts = None
        if asked.held_out_tokens:
            options = Options(held_out_tokens=asked.held_out_tokens)
            self.texts = CalibrationTexts(newest, options, say)
        self.tokens = 0

    def layers(self, source: StoredModel) -> Iterator[tuple[int, Tree, np.ndarray]]:
        """Each layer: its parameters, and the covariance of its attention's inputs."""
        stream = self.texts.held_out(self.scratch) if self.texts is not None else None
        if stream is not None:
            stream.embed(self.model, source.top())
            self.tokens = int(sum((b["segment_ids"] > 0).sum() for b in stream.batches))
        for index, spec in enumerate(layer_specs(self.model)):
            tree = source.layer(index)
            if stream is None:
                scale_D = np.asarray(tree["attention_norm"]["scale"], np.float64)
                yield index, tree, np.diag(np.square(scale_D))
                continue
            yield index, tree, input_covariance(stream, spec, tree)
            if index + 1 < self.model.n_layers:
                stream.advance(spec, tree)

    def at(self, source: StoredModel) -> Iterator[Row]:
        """A row for each layer's keys and values at one checkpoint."""
        for index, tree, inputs_DD in self.layers(source):
            for which in self.which:
                numbers = (tree["attention"][which], tree["attention"][f"{which}_mixing"])
                if not all(np.isfinite(x).all() for x in numbers) or not numbers[1].any():
                    raise UserError(
                        f"{source.folder}: the {which} heads of layer {index} hold numbers that "
                        "are not finite, or a mixing of zeros; take an earlier step"
                    )
                row = analyse_layer(
                    self.model,
                    which,
                    tree["attention"],
                    inputs_DD,
                    self.elsewhere is None,
                    self.asked,
                )
                yield {"step": source.step, "layer": index} | row

    def rows(self) -> list[Row]:
        """Of all checkpoints, as JSON takes them."""
        sources = progress(self.sources, "looking, checkpoints")
        return [plain(row) for source in sources for row in self.at(source)]

    def notes(self) -> list[str]:
        """What cannot be said of this model, and what a reader could take wrongly."""
        said = []
        if self.elsewhere is not None:
            said.append(
                f"no distance: the mixing did not begin at block identity ({self.elsewhere}); "
                "clusters are those of the whole mixing"
            )
        if "key" in self.which and not composites_are_linear(self.model, "key"):
            said.append(
                "nothing of key heads before and after mixing: they are normed before they are "
                "mixed (hlc_order='after'), and are no projection of the layer's input"
            )
        elif "key" in self.which and self.model.qk_norm:
            said.append("key heads are compared before their norm")
        if any(self.model.mixing_kind(which) != "heads" for which in self.which):
            said.append(
                "frequency and dense mixing: clusters and pictures are of each pair's size alone; "
                "ranks are means over frequencies, or ranks of the features' map over H"
            )
        if self.texts is None:
            said.append("no text: heads are compared by their weights, as if inputs were white")
        return said


def plain(value: Any) -> Any:
    """Arrays as lists, numbers to six digits."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def study(checkpoint: Path, out: Path, asked: AnalysisOptions, say: Say) -> dict[str, Any]:
    """Analyses all checkpoints of a run; writes heads.json and figures into `out`; what it wrote.

    Raises `UserError`.
    """
    folders = steps_of(checkpoint, say)
    with disk_errors(out):
        make_writable(out)
    with disk_errors(out), tempfile.TemporaryDirectory(prefix=".residuals-", dir=out) as scratch:
        looks = RunAnalysis(folders, Path(scratch), asked, say)
        rows = looks.rows()
    report = {
        "checkpoint": str(checkpoint),
        "steps": [source.step for source in looks.sources],
        "held_out_tokens": looks.tokens,
        "shuffles": asked.shuffles,
        "seed": asked.seed,
        "notes": looks.notes(),
        "rows": rows,
    }
    write_json(out / "heads.json", report)
    with disk_errors(out):
        head_figures.draw(rows, out, text_of(report))
    return report


def text_of(report: dict[str, Any]) -> str:
    """What heads were compared on."""
    tokens = report["held_out_tokens"]
    return f"over {tokens:,} tokens of held-out text" if tokens else "by their weights alone"


def main() -> None:
    if CHECKPOINT.value is None:
        raise UserError("no model given: add --checkpoint runs/quickstart")
    if HELD_OUT.value < 0:
        raise UserError(f"--held_out_tokens={HELD_OUT.value} must be 0 (weights alone) or more")
    if SHUFFLES.value < 19:
        raise UserError(f"--shuffles={SHUFFLES.value} must be 19 or more, or no p is below 0.05")
    if SEED.value < 0:
        raise UserError(f"--seed={SEED.value} must be 0 or more")
    checkpoint = Path(CHECKPOINT.value)
    cli.enable_compilation_cache()
    out = Path(OUT.value) if OUT.value else find_checkpoint(checkpoint)[0] / "heads"
    asked = AnalysisOptions(HELD_OUT.value, SHUFFLES.value, SEED.value)
    report = study(checkpoint, out, asked, lambda line: print(line, file=sys.stderr, flush=True))
    newest = [row for row in report["rows"] if row["step"] == report["steps"][-1]]
    steps = ", ".join(map(str, report["steps"]))
    print(f"{checkpoint}, step {report['steps'][-1]} (in heads.json: {steps})")
    print(f"heads compared {text_of(report)}\n\n{head_table.table(newest)}\n")
    print("\n".join([head_table.LEGEND, "", head_table.summary(newest), *report["notes"]]))
    print(f"\n{out}: heads.json, and figures as PNG and SVG")


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, "run directory, or one of its steps")
    OUT = flags.DEFINE_string("out", None, "folder for heads.json and figures; default RUN/heads")
    HELD_OUT = flags.DEFINE_integer(
        "held_out_tokens",
        AnalysisOptions.held_out_tokens,
        "looked at, at most; 0: the weights alone",
    )
    SHUFFLES = flags.DEFINE_integer(
        "shuffles", AnalysisOptions.shuffles, "of each test of clusters"
    )
    SEED = flags.DEFINE_integer(
        "seed", AnalysisOptions.seed, "of shuffles and of random projections"
    )
    cli.run(main, "stopped")
