"""Compress a checkpoint: calibrate, divide the cache, compress each layer, evaluate the loss.

Every result that takes long is stored in `<out>.part` as soon as it is computed, so the same
command continues after a kill. The result appears at `<out>` by one rename.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mea_jax.checkpoint.files import disk_errors, write_json
from mea_jax.checkpoint.layerwise import StoredModel, Writer
from mea_jax.checkpoint.load import unresolved
from mea_jax.cli import progress
from mea_jax.compress import (
    bits,
    budgets,
    damage,
    dividing,
    expected,
    joint,
    methods,
    repair,
    step_sizes,
)
from mea_jax.compress import layer as layers
from mea_jax.compress.calibration import CalibrationTexts
from mea_jax.compress.dividing import Shares
from mea_jax.compress.measurements import Measurements
from mea_jax.compress.moments import unseen
from mea_jax.compress.options import (
    Options,
    check,
    fitting_tokens,
    joint_tokens,
    repairs_layers,
)
from mea_jax.compress.probe import assemble
from mea_jax.compress.result import write_run
from mea_jax.compress.stream import Losses, Stream
from mea_jax.config.schema import Side
from mea_jax.errors import UserError
from mea_jax.model.layer_spec import layer_specs
from mea_jax.ops.resolve import resolve

Tree = dict[str, Any]


class CompressionPass:
    """One compression of a checkpoint.

    `log` logs a line. `measurements` is a folder of `Measurements` that is kept; without it they
    are in the work folder. Creating a pass raises `UserError` for options or a model that cannot
    work, and if `out` exists.
    """

    def __init__(
        self,
        checkpoint: Path,
        out: Path,
        options: Options,
        log: Callable[[str], Any],
        measurements: Path | None = None,
    ):
        check(options)
        self.options, self.out, self.log = options, out, log
        self.part = out.with_name(f"{out.name}.part")
        if out.exists():
            raise UserError(f"--out {out} exists: choose another --out, or remove it")
        self.source = StoredModel(checkpoint, log)
        config = self.source.config
        auto = dataclasses.replace(unresolved(config.model), dtype=options.dtype)
        length = config.data.context_length
        self.model = resolve(auto, jax.devices(), length)
        methods.check_model(self.model, options.method)
        self.chosen = budgets.choose_layers(options.layers, self.model.n_layers)
        self.count = self.model.n_kv_heads
        dividing.kept(self.model, options, self.chosen)
        self._check_part()
        self.texts = CalibrationTexts(self.source, options, log)
        self._claim()
        folder = measurements or self.part / "measurements"
        self.measurements = Measurements(folder, self.source, self.model, self.texts, options)

    @property
    def _settings(self) -> dict[str, Any]:
        checkpoint = str(self.source.folder.absolute())
        return dataclasses.asdict(self.options) | {"checkpoint": checkpoint}

    def _check_part(self) -> None:
        """Raise `UserError` if the work folder is that of another command."""
        settings = self.part / "settings.json"
        if not settings.exists():
            return
        if json.loads(settings.read_text()) != self._settings:
            raise UserError(
                f"{self.part} contains an unfinished compression with other options: remove it, or "
                "choose another --out"
            )
        self.log(f"continuing the compression in {self.part}")

    def _claim(self) -> None:
        """Create the work folder, once everything that was asked for is known to exist."""
        with disk_errors(self.part):
            self.part.mkdir(parents=True, exist_ok=True)
            write_json(self.part / "settings.json", self._settings)

    # -- the stages ------------------------------------------------------------------------

    def calibrate(self) -> Losses:
        """Compute the moments of all layers, and return the original's held-out losses."""
        return self.measurements.calibrate()

    def divide(self) -> Shares:
        """Return what each layer keeps."""
        found = dividing.divide(
            self.model, self.options, self.chosen, self.measurements, self._solved, self.log
        )
        self.shares = found
        return found

    def _solved(
        self, index: int, attention: Tree | None = None, counts: tuple[int, int] | None = None
    ) -> methods.Solved:
        """Return a layer's solution with the numbers `counts` of heads; none means all heads."""
        attention = attention or self.source.layer(index)["attention"]
        heads, moments = layers.split_heads(self.model, attention), self.measurements.moments(index)
        information = None
        if self.options.method == "bits":
            information = self.measurements.information(index)
        whole = counts or (self.count, self.count)
        return methods.solve(self.options.method, heads, moments, whole, information)

    def compress(self) -> tuple[Writer, list[dict[str, Any]]]:
        """Compress every layer into the work folder; return the writer and a row per layer."""
        options, keys, values = self.options, self.shares.keys, self.shares.values
        target = self.shares.target(self.model, options.method)
        writer = Writer(self.part / "arrays", target)
        rows: list[dict[str, Any]] = []
        while self._row_file(len(rows)).exists():
            rows.append(json.loads(self._row_file(len(rows)).read_text()))
        text = None
        if tokens := fitting_tokens(options):
            text = self.texts.training(self.part / "repair", tokens)
            text.start(self.model, self.source.top(), len(rows), self.source.layer)
        followed = None
        if options.repair == "blockwise":
            followed = self.texts.training(self.part / "followed", fitting_tokens(options))
            followed.start(target, self.source.top(), len(rows), writer.layer)
        writer.write_non_layer(self.source.top())
        rest = range(len(rows), self.model.n_layers)
        for index in progress(rest, "compressing, layers"):
            tree = self.source.layer(index)
            counts = keys[index], values[index]
            # Before the first layer with fewer heads, the two models are the same.
            apart = min(*keys[: index + 1], *values[: index + 1]) < self.count or (
                self.shares.partial
            )
            behind = followed if apart else None
            row = self._compress_layer(index, tree, counts, writer, text, behind)
            write_json(self._row_file(index), row)
            rows.append(row)
            if text is not None:
                text.advance(layer_specs(self.model)[index], tree)
            if followed is not None:
                followed.advance(layer_specs(target)[index], writer.layer(index))
        for name in ("repair", "followed"):
            shutil.rmtree(self.part / name, ignore_errors=True)
        return writer, rows

    def _row_file(self, index: int) -> Path:
        return self.part / f"layer-{index}.json"

    def _compress_layer(
        self,
        index: int,
        tree: Tree,
        counts: tuple[int, int],
        writer: Writer,
        text: Stream | None,
        followed: Stream | None,
    ) -> dict[str, Any]:
        options, solved = self.options, self._solved(index, tree["attention"], counts)
        attention = assemble(solved.heads, solved.keys, solved.values, tree["attention"])
        row: dict[str, Any] = {
            "layer": index,
            "keys": counts[0],
            "values": counts[1],
            "key_residual": solved.keys.residual,
            "value_residual": solved.values.residual,
            "unseen": unseen(solved.moments.keys) + unseen(solved.moments.values),
        }
        if self.shares.slots:
            row |= self._dropped(solved)
        if self.shares.bits:
            row |= self._quantise(index, solved.variances, attention)
        if self.shares.partial:
            attention = layers.as_float32(layers.balanced(attention, tree["attention"]))
        if text is not None and (counts != (self.count, self.count) or self.shares.partial):
            spec, scale = layer_specs(writer.model)[index], layers.input_scale(tree)
            original = repair.OriginalLayer(
                layer_specs(self.model)[index], tree["attention"], scale, text
            )
            if options.method in methods.SHARPENED and (
                counts[0] < self.count or self.shares.slots
            ):
                found = repair.temperature(original, (spec, attention))
                attention = repair.sharpened(attention, found)
                row["temperature"] = found
            if self.shares.bits:
                attention = step_sizes.fitted(original, (spec, attention))
            if repairs_layers(options):
                before = original.error((spec, attention))
                attention, after = self._repaired(original, (spec, attention), before)
                row["repair"] = [before, after]
        new = tree | {"attention": attention}
        if text is not None and followed is not None:
            blocks = repair.RepairedBlock((layer_specs(self.model)[index], tree), text, followed)
            words = f"repairing block {index}"
            steps = options.repair_steps
            new = blocks.rebuild(
                (layer_specs(writer.model)[index], layers.as_float32(new)), steps, words
            )
        writer.write_layer(index, layers.as_float32(new))
        return row

    def _dropped(self, solved: methods.Solved) -> dict[str, Any]:
        """Return the heads that slots amount to, and the energy lost with those dropped."""
        row: dict[str, Any] = {}
        residuals = solved.keys.residual, solved.values.residual
        for side, whole, x_CH in zip(Side, residuals, solved.variances, strict=True):
            kept_X = np.asarray([digit == "1" for digit in self.shares.slots[side]])
            share = float(x_CH.ravel()[kept_X].sum() / x_CH.sum())
            heads = float(kept_X.sum()) / x_CH.shape[1]
            row |= {f"{side}s": heads, f"{side}_residual": 1 - (1 - whole) * share}
        return row

    def _quantise(self, index: int, variances: tuple, attention: Tree) -> dict[str, Any]:
        """Set the steps of a layer's slots in `attention`; return what the report says of them."""
        row: dict[str, Any] = {}
        for side, x_CH in zip(Side, variances, strict=True):
            own_X = np.asarray([int(digit) for digit in self.shares.bits[side][index]])
            step_X = bits.steps(x_CH.ravel(), own_X)
            attention[f"{side}_steps"] = np.float32(step_X.reshape(x_CH.shape))
            lost = float(x_CH.ravel() @ np.asarray(bits.DISTORTIONS)[own_X] / x_CH.sum())
            row |= {f"{side}_bits": float(own_X.mean()), f"{side}_residual": lost}
        return row

    def _repaired(
        self, original: repair.OriginalLayer, compressed: repair.Layer, before: float
    ) -> tuple[Tree, float]:
        """Return the attention with the least error of those before and after each repair."""
        spec, best, least = *compressed, before
        refitted = repair.refit_output(original, compressed)
        candidates = [refitted]
        if self.options.repair != "output":
            words = f"repairing layer {original.index}"
            steps = self.options.repair_steps
            candidates.append(repair.reconstruct(original, (spec, refitted), steps, words))
        for attention in candidates:
            if (error := original.error((spec, attention))) < least:
                best, least = attention, error
        if least == before:  # too few steps, or a layer that has lost next to nothing
            self.log(
                f"layer {original.index}: no fit of its attention lowers its error, so none is kept"
            )
        return best, least

    def look(self, writer: Writer, name: str = "look") -> Losses:
        """Return the compressed model's held-out losses and divergences from the original.

        They are stored in the work folder as `name`.
        """
        file = self.part / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text())
        stream, top = self.texts.held_out(self.part / "held_out"), self.source.top()
        stream.embed(writer.model, top)
        for index in progress(range(writer.model.n_layers), "evaluating, layers"):
            stream.advance(layer_specs(writer.model)[index], writer.layer(index))
        losses = stream.losses(writer.model, top, self.measurements.held_out())
        write_json(file, losses)
        shutil.rmtree(self.part / "held_out")
        return losses

    def train_jointly(self, writer: Writer) -> dict[str, Any]:
        """Train the attention of all layers together; return what was spent and won.

        If the divergence on held-out text does not fall, the training is left out.
        """
        before = self._domains(writer, "before_joint")
        start = self.part / "unjoined"
        if not (self.part / "joint").exists():
            write_run(self.source, writer, start, self.options.method)
        text, devices = self.texts.data, len(jax.devices())
        config = joint.config_of(self.source, self.options, start, text, devices)
        facts = joint.repair(config, self.part / "joint", writer, self.log)
        after = self._domains(writer, "after_joint")
        moved = [np.mean([d["divergence"] for d in of.values()]) for of in (before, after)]
        helps = bool(moved[1] < moved[0])
        self.log(f"joint repair: divergence {moved[0]:.4f} > {moved[1]:.4f}")
        if not helps:
            self.log("joint repair did not lower the divergence of held-out text; it is left out")
            unjoined = StoredModel(start, self.log)
            for index in range(self.model.n_layers):
                writer.write_layer(index, {"attention": unjoined.layer(index)["attention"]})
        return facts | {"before": before, "after": after, "kept": helps}

    def _domains(self, writer: Writer, name: str) -> dict[str, dict[str, float]]:
        return damage.domains(self.measurements.calibrate(), self.look(writer, name))

    def finish(self, writer: Writer, summary: dict[str, Any], draw: Callable[[Path], Any]) -> None:
        """Write the run directory in the work folder, rename it to `out`, remove the work folder.

        `draw(path)` draws the figure. Raise `UserError` if the disk is full or not writable.
        """
        run = self.part / "run"
        write_run(self.source, writer, run, self.options.method)
        with disk_errors(run):
            write_json(run / "compression.json", summary)
        draw(run / "compression.png")
        with disk_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            run.rename(self.out)
            shutil.rmtree(self.part)


def compress(
    checkpoint: Path, out: Path, options: Options, measurements: Path | None = None
) -> dict:
    """Compress `checkpoint` into the run directory `out`; return `damage.summarise`'s summary.

    Measurements of the original are stored in the folder `measurements` and reused from there.
    Raise `UserError` for options, a model or data that cannot work.
    """

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    began = time.monotonic()
    work = CompressionPass(checkpoint, out, options, log, measurements)
    length = work.source.config.data.context_length
    log(expected.describe(work.model, options, len(work.chosen), work.texts.batch, length))

    def stage(words: str) -> None:
        log(f"{time.monotonic() - began:6.0f} s  {words}")

    stage(f"calibrating {work.model.n_layers} layers on {options.calibration_tokens:,} tokens")
    before = work.calibrate()
    if options.method == "bits":
        stage("measuring the information of keys and values")
        work.measurements.information(0)
    stage(f"dividing the cache: {options.budget}")
    shares = work.divide()
    stage(f"compressing: {options.method}, repair {options.repair}")
    writer, rows = work.compress()
    facts = {}
    if options.repair == "joint":
        stage(f"training all layers jointly on {joint_tokens(options):,} tokens")
        facts = {"joint": work.train_jointly(writer)}
    stage("evaluating the held-out loss")
    after = work.look(writer)
    summary = damage.summarise(
        options,
        (budgets.cache_bytes(work.model), shares.cache_bytes(work.model, options.method)),
        rows,
        (before, after),
        shares.sensitivities,
        work.count,
    )
    summary |= facts
    stage("writing the checkpoint")
    work.finish(writer, summary, lambda path: damage.draw(summary, path))
    return summary
