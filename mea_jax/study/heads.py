"""Analyse the learned head-level linear composition, W_lc, of a trained model, layer by layer.

    python -m mea_jax.study.heads --checkpoint runs/quickstart --out runs/quickstart/heads

For every checkpoint of a run, and for its keys and values, it measures the distance of the mixing
from block identity, its singular values, whether its rows or columns form clusters (against
chance), and the similarity of heads before and after mixing, over held-out text. It prints a table
of the newest checkpoint, and writes figures and `heads.json` with all numbers, which
head_measures.py and clusters.py define. Pass `runs/quickstart/checkpoints/500` to analyse only one
step.
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
from mea_jax.cli import progress
from mea_jax.compress.calibration import CalibrationTexts
from mea_jax.compress.layer import input_scale
from mea_jax.compress.options import Options
from mea_jax.compress.stream import Stream, normed_input
from mea_jax.config.schema import ModelConfig, Side
from mea_jax.errors import UserError
from mea_jax.model.layer_spec import LayerSpec, layer_specs
from mea_jax.ops import hlc
from mea_jax.ops.resolve import resolve
from mea_jax.study import head_figures, head_table
from mea_jax.study import head_measures as measures
from mea_jax.study.clusters import clusters
from mea_jax.study.head_table import Row

Tree = dict[str, Any]
LogFn = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class AnalysisOptions:
    """The options of an analysis; the command's flags describe them."""

    held_out_tokens: int = 32_768
    shuffles: int = 999
    seed: int = 0


def mixed(model: ModelConfig, path: Path) -> tuple[Side, ...]:
    """Return the sides whose heads are mixed; raise `UserError` if none are."""
    found = tuple(side for side in Side if model.mixes(side))
    if not found:
        what = "plain attention (hlc='none')" if model.variant == "mea" else repr(model.variant)
        raise UserError(
            f"--checkpoint={path} has no mixing of heads (W_lc), it is {what}: choose a model "
            "trained with config.model.hlc='kv'"
        )
    return found


def steps_of(path: Path, log: LogFn) -> list[Path]:
    """Return the checkpoints to analyse, oldest first.

    They are all undamaged ones if `path` is a run directory, and `path` if it is a single step.
    Raise `UserError` if there is none, or if the model mixes no heads.
    """
    run, step = find_checkpoint(path)
    newest = open_trained(path, log)
    mixed(newest.config.model, path)
    folders = []
    for older in [] if step is not None else newest.checkpoints.steps():
        if older < newest.step:
            if problem := newest.checkpoints.damage(older):
                log(f"the checkpoint of step {older} is damaged: {problem}: skipping it")
            else:
                folders.append(run / "checkpoints" / str(older))
    return [*folders, run / "checkpoints" / str(newest.step)]


def why_not_block_identity(source: StoredModel) -> str | None:
    """Return why the mixing did not begin at block identity; None if it did."""
    if (source.run / "compression.json").exists():
        return "it was computed by a compression"
    if start := source.config.start.checkpoint:
        return f"its training started from {start}"
    return None


def composites_are_linear(model: ModelConfig, side: Side) -> bool:
    """Return whether composite heads are linear projections of the layer's input.

    Keys that are normalised before they are mixed are not.
    """
    return not (side == Side.KEY and model.qk_norm and model.hlc_order == "after")


@functools.partial(jax.jit, static_argnums=0)
def _input_sums(spec: LayerSpec, scale_D, x_BTD, batch):
    """Sum x x^T and x, with x the input of an attention, over tokens; also count the tokens."""
    weight_BT1 = (batch["segment_ids"] > 0).astype(jnp.float32)[..., None]
    normed_BTD = normed_input(spec, scale_D, x_BTD).astype(jnp.float32) * weight_BT1
    flat = normed_BTD.reshape(-1, normed_BTD.shape[-1])
    square_DD = jnp.dot(flat.T, flat, precision=jax.lax.Precision.HIGHEST)
    return square_DD, flat.sum(axis=0), weight_BT1.sum()


def input_covariance(stream: Stream, spec: LayerSpec, layer: Tree) -> np.ndarray:
    """Return the covariance of the attention inputs of the stream's next layer, (D, D), float64.

    Keys and values, mixed or not, are projections of these inputs, so no other statistic of the
    text is needed.
    """
    scale_D = stream.place(input_scale(layer))
    width = spec.model.d_model
    square_DD, sum_D, tokens = np.zeros((width, width)), np.zeros(width), 0.0
    with jax.set_mesh(stream.mesh):
        for number, batch in enumerate(stream.batches):
            x_BTD = stream.residual(number, spec.model)
            new = _input_sums(spec, scale_D, x_BTD, stream.put(batch))
            square, total, count = jax.device_get(new)
            square_DD, sum_D, tokens = square_DD + square, sum_D + total, tokens + float(count)
    mean_D = sum_D / tokens
    return square_DD / tokens - np.outer(mean_D, mean_D)


def tests(
    kind: str, mix: np.ndarray, start: np.ndarray | None, analysis_options: AnalysisOptions
) -> dict[str, dict[str, Any] | None]:
    """Test the rows and the columns of a mixing for clusters; None where no test is possible.

    The test uses `mix - start` outside the entries of block identity, whose pattern is not learned.
    It uses the entire mixing if `start` is None: the mixing did not begin at block identity.
    """
    x_CK = measures.by_pair(kind, mix if start is None else mix - start)
    shown_CK = np.ones(x_CK.shape, bool)
    if start is not None:
        shown_CK = np.asarray(hlc.block_identity(*x_CK.shape)) == 0
    found: dict[str, dict[str, Any] | None] = {}
    for axis, x, shown in zip(head_table.AXES, (x_CK, x_CK.T), (shown_CK, shown_CK.T), strict=True):
        result = clusters(
            x, shown, kind == "heads", analysis_options.shuffles, analysis_options.seed
        )
        found[axis] = dataclasses.asdict(result) if result else None
    return found


def analyse_layer(
    model: ModelConfig,
    side: Side,
    attention: Tree,
    inputs_DD: np.ndarray,
    began: bool,
    analysis_options: AnalysisOptions,
) -> Row:
    """Compute all measures of one layer's keys or values.

    Args:
      model: the resolved config of the model.
      side: keys or values.
      attention: the parameters of the layer's attention.
      inputs_DD: the covariance of the attention's inputs.
      began: whether the mixing began at block identity.
      analysis_options: the options of the analysis.
    """
    kind, kernel_DCH = model.mixing_kind(side), np.asarray(attention[side])
    mix = measures.as_mixing(kind, attention[f"{side}_mixing"])
    c, k, h = kernel_DCH.shape[1], model.n_kv_heads, model.head_dim
    start = measures.block_identity_redundancy(kind, c, k, h) if began else None
    values = measures.singular_values(kind, mix)
    row: Row = {
        "which": side,
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
        **tests(kind, mix, start, analysis_options),
    }
    # `hlc.composite_heads` would divide out a key norm's weight, which the components include.
    parameter = jnp.asarray(attention[f"{side}_mixing"])
    folded_DKH = np.asarray(hlc.fold(kind, jnp.asarray(kernel_DCH), parameter))
    if not composites_are_linear(model, side):
        return row | {"composite_rank": None, "before": None, "after": None, "chance": None}
    before = measures.covariance_of(kernel_DCH, inputs_DD)
    after = measures.covariance_of(folded_DKH, inputs_DD)
    composite = measures.composite_values(kind, after, k)
    return row | {
        "composite_rank": measures.rank_in_heads(kind, composite, h),
        "before": measures.redundancy(before, c),
        "after": measures.redundancy(after, k),
        "chance": measures.chance(inputs_DD, k, h, analysis_options.seed),
    }


class RunAnalysis:
    """The analysis of a run's checkpoints, all on the same text."""

    def __init__(
        self, folders: list[Path], scratch: Path, analysis_options: AnalysisOptions, log: LogFn
    ):
        self.sources = [StoredModel(folder, log) for folder in folders]
        self.scratch, self.analysis_options = scratch, analysis_options
        newest = self.sources[-1]
        auto = unresolved(newest.config.model)
        self.model = resolve(auto, jax.devices(), newest.config.data.context_length)
        self.sides = mixed(self.model, folders[-1])
        self.elsewhere = why_not_block_identity(newest)
        self.texts = None
        if analysis_options.held_out_tokens:
            options = Options(held_out_tokens=analysis_options.held_out_tokens)
            self.texts = CalibrationTexts(newest, options, log)
        self.tokens = 0

    def layers(self, source: StoredModel) -> Iterator[tuple[int, Tree, np.ndarray]]:
        """Yield each layer's index, its parameters and the covariance of its attention inputs.

        Without text, the inputs are assumed to be white before the scale of the attention norm.
        """
        stream = self.texts.held_out(self.scratch) if self.texts is not None else None
        if stream is not None:
            stream.embed(self.model, source.top())
            self.tokens = int(sum((b["segment_ids"] > 0).sum() for b in stream.batches))
        for index, spec in enumerate(layer_specs(self.model)):
            tree = source.layer(index)
            if stream is None:
                scale_D = input_scale(tree)
                ones_D = np.ones(self.model.d_model)
                scale_D = ones_D if scale_D is None else np.asarray(scale_D, np.float64)
                yield index, tree, np.diag(np.square(scale_D))
                continue
            yield index, tree, input_covariance(stream, spec, tree)
            if index + 1 < self.model.n_layers:
                stream.advance(spec, tree)

    def at(self, source: StoredModel) -> Iterator[Row]:
        """Yield a row for each layer's keys and values at one checkpoint.

        Raise `UserError` if heads have values that are not finite, or a mixing of zeros.
        """
        for index, tree, inputs_DD in self.layers(source):
            for side in self.sides:
                numbers = (tree["attention"][side], tree["attention"][f"{side}_mixing"])
                if not all(np.isfinite(x).all() for x in numbers) or not numbers[1].any():
                    raise UserError(
                        f"{source.folder}: the {side} heads of layer {index} have values that "
                        "are not finite, or a mixing of zeros: choose an earlier step"
                    )
                row = analyse_layer(
                    self.model,
                    side,
                    tree["attention"],
                    inputs_DD,
                    self.elsewhere is None,
                    self.analysis_options,
                )
                yield {"step": source.step, "layer": index} | row

    def rows(self) -> list[Row]:
        """Return the rows of all checkpoints as JSON values."""
        sources = progress(self.sources, "analysing checkpoints")
        return [plain(row) for source in sources for row in self.at(source)]

    def notes(self) -> list[str]:
        """Return notes on measures that this model lacks or that are easy to misread."""
        said = []
        if self.elsewhere is not None:
            said.append(
                f"no distance: the mixing did not begin at block identity ({self.elsewhere}); "
                "clusters are those of the entire mixing"
            )
        if Side.KEY in self.sides and not composites_are_linear(self.model, Side.KEY):
            said.append(
                "key heads are not compared: they are normalised before they are mixed "
                "(hlc_order='after'), so they are not projections of the layer's input"
            )
        elif Side.KEY in self.sides and self.model.qk_norm:
            said.append("key heads are compared before their norm")
        if any(self.model.mixing_kind(side) != "heads" for side in self.sides):
            said.append(
                "frequency and dense mixing: clusters and figures use only each pair's magnitude; "
                "ranks are means over frequencies, or ranks of the map of features divided by H"
            )
        if self.texts is None:
            said.append("no text: heads are compared by their weights, as if inputs were white")
        return said


def plain(value: Any) -> Any:
    """Return `value` with arrays as lists and floats rounded to six significant digits."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def study(
    checkpoint: Path, out: Path, analysis_options: AnalysisOptions, log: LogFn
) -> dict[str, Any]:
    """Analyse a run's checkpoints, or one step, and write heads.json and figures into `out`.

    Return the content of heads.json. Raise `UserError` if there is no checkpoint with a mixing, if
    its values are not finite, or if `out` cannot be written.
    """
    folders = steps_of(checkpoint, log)
    with disk_errors(out):
        make_writable(out)
    with disk_errors(out), tempfile.TemporaryDirectory(prefix=".residuals-", dir=out) as scratch:
        analysis = RunAnalysis(folders, Path(scratch), analysis_options, log)
        rows = analysis.rows()
    report = {
        "checkpoint": str(checkpoint),
        "steps": [source.step for source in analysis.sources],
        "held_out_tokens": analysis.tokens,
        "shuffles": analysis_options.shuffles,
        "seed": analysis_options.seed,
        "notes": analysis.notes(),
        "rows": rows,
    }
    write_json(out / "heads.json", report)
    with disk_errors(out):
        head_figures.draw(rows, out, text_of(report))
    return report


def text_of(report: dict[str, Any]) -> str:
    """Describe the inputs on which heads were compared."""
    tokens = report["held_out_tokens"]
    return f"over {tokens:,} tokens of held-out text" if tokens else "by their weights alone"


def main() -> None:
    """Run the command `heads` with its flags."""
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
    analysis_options = AnalysisOptions(HELD_OUT.value, SHUFFLES.value, SEED.value)
    report = study(
        checkpoint, out, analysis_options, lambda line: print(line, file=sys.stderr, flush=True)
    )
    newest = [row for row in report["rows"] if row["step"] == report["steps"][-1]]
    steps = ", ".join(map(str, report["steps"]))
    print(f"{checkpoint}, step {report['steps'][-1]} (in heads.json: {steps})")
    print(f"heads compared {text_of(report)}\n\n{head_table.table(newest)}\n")
    print("\n".join([head_table.LEGEND, "", head_table.summary(newest), *report["notes"]]))
    print(f"\n{out}: heads.json, and figures as PNG and SVG")


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, "run directory, or one of its steps")
    OUT = flags.DEFINE_string("out", None, "output directory (default: RUN/heads)")
    HELD_OUT = flags.DEFINE_integer(
        "held_out_tokens",
        AnalysisOptions.held_out_tokens,
        "maximum number of held-out tokens to compare heads on; 0 compares their weights alone",
    )
    SHUFFLES = flags.DEFINE_integer(
        "shuffles", AnalysisOptions.shuffles, "number of shuffles per cluster test"
    )
    SEED = flags.DEFINE_integer(
        "seed", AnalysisOptions.seed, "seed of shuffles and random projections"
    )
    cli.run(main, "stopped")
