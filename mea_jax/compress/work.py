"""The pass over a checkpoint: calibrate, divide the cache, compress each layer, look at the loss.

Everything that takes long is kept below `<out>.part` as soon as it is known, so the same command
goes on after a kill; the result appears at `<out>` by one rename.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mea_jax import sharding
from mea_jax.backends import resolve
from mea_jax.compress import budgets, methods, repair
from mea_jax.compress import layer as layers
from mea_jax.compress.measure import Measurer, Sensitivity, assemble, plain_layer, residuals
from mea_jax.compress.moments import Moments, of_weights, unseen
from mea_jax.compress.options import Options, check
from mea_jax.compress.stored import StoredModel, Writer
from mea_jax.compress.sweep import Stream, moments_of, progress, specs
from mea_jax.config import DataConfig, MeshConfig, ModelConfig, SourceConfig
from mea_jax.data.pipeline import held_out_batches, train_batches
from mea_jax.data.prepare import Prepared, prepare
from mea_jax.errors import UserError
from mea_jax.report import disk_errors, write_json
from mea_jax.trained import unresolved

Tree = dict[str, Any]


class Pass:
    """One compression. `say` takes lines for the user."""

    def __init__(self, checkpoint: Path, out: Path, options: Options, say: Callable[[str], Any]):
        check(options)
        self.options, self.out, self.say = options, out, say
        self.part = out.with_name(f"{out.name}.part")
        if out.exists():
            raise UserError(f"--out {out} exists: choose another, or remove it")
        self.source = StoredModel(checkpoint, say)
        config = self.source.config
        length = config.data.context_length
        auto = dataclasses.replace(unresolved(config.model), dtype=options.dtype)
        self.model: ModelConfig = resolve(auto, jax.devices(), length)
        methods.check_model(self.model, options.method)
        self.chosen = budgets.choose_layers(options.layers, self.model.n_layers)
        self.count = self.model.n_kv_heads
        self.uniform = budgets.uniform(options.keep, self.count)
        self.mesh: Mesh = sharding.make_mesh(MeshConfig(), jax.devices())
        self.batch = 8 * len(jax.devices())
        self._claim()
        self.prepared = self._prepare(config.data)

    def _claim(self) -> None:
        """The work folder: a new one, or one that this very command has left."""
        wanted = dataclasses.asdict(self.options) | {
            "checkpoint": str(self.source.folder.absolute())
        }
        settings = self.part / "settings.json"
        if settings.exists():
            if json.loads(settings.read_text()) != wanted:
                raise UserError(
                    f"{self.part} holds an unfinished compression with other options: remove it, "
                    "or choose another --out"
                )
            self.say(f"going on with what {self.part} holds")
            return
        with disk_errors(self.part):
            self.part.mkdir(parents=True, exist_ok=True)
            write_json(settings, wanted)

    def _prepare(self, data: DataConfig) -> Prepared:
        """The windows of the checkpoint's own data, by its own tokenizer."""
        found = prepare(data, self.model.vocab_size, log=lambda line: None)
        if found.digest == self.source.digest:
            return found
        # A tokenizer that is trained on the spot would be another one.
        self.say("the data are not as they were in training: taking what is there now")
        own = dataclasses.replace(data, tokenizer=str(self.source.run / "tokenizer"))
        return prepare(own, self.model.vocab_size, log=lambda line: None)

    # -- streams ---------------------------------------------------------------------------

    def _calibration(self) -> Prepared:
        words = self.options.calibration_source
        if not words:
            return self.prepared
        kind, _, path = words.partition(":")
        data = dataclasses.replace(
            self.source.config.data,
            sources=(SourceConfig(source=kind, path=path),),
            tokenizer=str(self.source.run / "tokenizer"),
        )
        return prepare(data, self.model.vocab_size, log=lambda line: None)

    def _text(self, name: str, tokens: int) -> Stream:
        """A stream of so many training tokens, always the same."""
        prepared, length = self._calibration(), self.source.config.data.context_length
        windows = sum(source.train_windows for source in prepared.sources)
        count = max(math.ceil(tokens / (self.batch * length)), 1)
        if count * self.batch > windows:
            raise UserError(
                f"{tokens:,} tokens of calibration need {count * self.batch:,} windows of "
                f"{length}, the text has {windows:,}: give more text, or at most "
                f"--calibration_tokens {windows // self.batch * self.batch * length}"
            )
        batches = train_batches(
            prepared, seed=self.options.seed, batch_size=self.batch, threads=0, prefetch=0
        )
        found = [next(batches) for _ in range(count)]
        return Stream(found, ["text"] * count, self.part / name, self.mesh)

    def _held_out(self, name: str) -> Stream:
        """Held-out windows, a share of each source's, labelled by source."""
        batches, labels = [], []
        share = max(self.options.held_out_windows // len(self.prepared.sources), self.batch)
        for source in self.prepared.sources:
            one = dataclasses.replace(self.prepared, sources=(source,))
            most = share // self.batch
            found = list(held_out_batches(one, batch_size=self.batch, max_batches=most))
            batches += found
            labels += [source.name] * len(found)
        if not batches:
            raise UserError("the checkpoint's data have no held-out windows to look at")
        return Stream(batches, labels, self.part / name, self.mesh)

    def _start(self, stream: Stream, done: int, layers_done: Callable[[int], Tree]) -> None:
        """The residuals of `stream` after `done` layers: found, or made anew."""
        if stream.resume(done):
            return
        stream.embed(self.model, self.source.top())
        for index in range(done):
            stream.advance(specs(self.model)[index], layers_done(index))

    # -- the stages ------------------------------------------------------------------------

    def calibrate(self) -> dict[str, tuple[float, float]]:
        """Moments of every layer, into the work folder; the original's held-out loss."""
        before, total = self.part / "before.json", self.model.n_layers
        if before.exists():
            return json.loads(before.read_text())
        done = 0
        while self._moments_file(done).exists():
            done += 1
        text = None
        if self.options.calibration_tokens:
            text = self._text("calibration", self.options.calibration_tokens)
        held_out = self._held_out("held_out")
        for stream in filter(None, (text, held_out)):
            self._start(stream, done, self.source.layer)
        for index in progress(range(done, total), "calibrating, layers", total - done):
            tree, spec = self.source.layer(index), specs(self.model)[index]
            if text is not None:
                sums = text.advance(spec, tree, watch=True)
                assert sums is not None
                moments = moments_of(sums, self.count)
            else:
                heads = layers.take_apart(self.model, tree["attention"])
                moments = of_weights(heads.query_DNH, heads.key_DKH, heads.value_DKH)
            held_out.advance(spec, tree)
            self._save_moments(index, moments)
        losses = held_out.losses(self.model, self.source.top())
        write_json(before, losses)
        shutil.rmtree(self.part / "calibration", ignore_errors=True)
        shutil.rmtree(self.part / "held_out")
        return losses

    def _moments_file(self, index: int) -> Path:
        return self.part / f"moments-{index}.npz"

    def _save_moments(self, index: int, moments: Moments) -> None:
        scratch = self.part / "moments.npz"
        with disk_errors(scratch):
            np.savez(scratch, **dataclasses.asdict(moments))
            scratch.rename(self._moments_file(index))

    def moments(self, index: int) -> Moments:
        with np.load(self._moments_file(index)) as stored:
            return Moments(
                **{n: stored[n] for n in stored.files[:-1]}, tokens=int(stored["tokens"])
            )

    def divide(self) -> tuple[list[int], list[int], list[Sensitivity]]:
        """C_k and C_v of every layer, and what was measured on the way."""
        file = self.part / "budget.json"
        if file.exists():
            stored = json.loads(file.read_text())
            found = [Sensitivity(**row) for row in stored["sensitivities"]]
            return stored["keys"], stored["values"], found
        keys, values = [self.count] * self.model.n_layers, [self.count] * self.model.n_layers
        for index in self.chosen:
            keys[index] = values[index] = self.uniform
        found = self._sensitivities()
        if self.options.budget != "uniform" and self.uniform < self.count:
            self._allot(found, keys, values)
        rows = [dataclasses.asdict(s) for s in found]
        write_json(file, {"keys": keys, "values": values, "sensitivities": rows})
        return keys, values, found

    def _sensitivities(self) -> list[Sensitivity]:
        options, found = self.options, []
        if options.budget == "uniform":
            return []
        if options.budget == "residual":
            for index in progress(self.chosen, "residuals, layers"):
                heads = layers.take_apart(self.model, self.source.layer(index)["attention"])
                found += residuals(options.method, heads, self.moments(index), index)
            return found
        streams = [self._text("measure", options.measure_tokens)]
        if options.budget == "repaired":
            streams.append(self._text("trying", options.calibration_tokens))
        top = self.source.top()
        for stream in streams:
            stream.embed(self.model, top)
        trees = [self.source.layer(index) for index in range(self.model.n_layers)]
        parts = [layers.take_apart(self.model, tree["attention"]) for tree in trees]
        plain = [plain_layer(heads, tree) for heads, tree in zip(parts, trees, strict=True)]
        measurer = Measurer(self.model, top, plain, *streams)
        for index in progress(range(self.model.n_layers), "measuring, layers"):
            if index in self.chosen:
                found += measurer.sensitivity(options.method, parts[index], self.moments(index))
            measurer.advance()
        for stream in streams:
            shutil.rmtree(stream.folder)
        return found

    def cache_of(self, keys: list[int], values: list[int]) -> list[tuple[int, int]]:
        """Bytes per position of each layer's keys and values. Under `latent` what the latents would
        take: its keys cannot be read as they are."""
        if self.options.method == "latent":
            width = 2 * self.model.head_dim
            scalars = 4 * self.count if self.model.qk_norm else 0
            return [
                (c * width + scalars * (c < self.count), v * width)
                for c, v in zip(keys, values, strict=True)
            ]
        return budgets.cache_bytes(
            methods.target_model(self.model, self.options.method, keys, values)
        )

    def _allot(self, found: list[Sensitivity], keys: list[int], values: list[int]) -> None:
        """Puts the best division at the bytes of the uniform one into `keys` and `values`."""
        total = sum(map(sum, (self.cache_of(keys, values)[i] for i in self.chosen)))
        layers_of = self.model.n_layers
        by_count = [
            self.cache_of([c] * layers_of, [c] * layers_of) for c in range(1, self.count + 1)
        ]
        costs = [[row[s.layer][s.which == "value"] for row in by_count] for s in found]
        losses = [s.losses or s.residuals for s in found]
        for s, option in zip(found, budgets.allot(costs, losses, total), strict=True):
            (keys if s.which == "key" else values)[s.layer] = option + 1

    def compress(self, keys: list[int], values: list[int]) -> tuple[Writer, list[dict[str, Any]]]:
        """Every layer, into the work folder; a row about each."""
        options = self.options
        target = methods.target_model(self.model, options.method, keys, values)
        writer = Writer(self.part / "arrays", target)
        rows: list[dict[str, Any]] = []
        while self._row_file(len(rows)).exists():
            rows.append(json.loads(self._row_file(len(rows)).read_text()))
        text = None
        if options.calibration_tokens and (
            options.repair != "none" or options.method in methods.SHARPENED
        ):
            tokens = options.calibration_tokens
            text = self._text("repair", tokens if options.repair != "none" else min(tokens, 4096))
            self._start(text, len(rows), self.source.layer)
        writer.write_top(self.source.top())
        rest = range(len(rows), self.model.n_layers)
        for index in progress(rest, "compressing, layers"):
            tree = self.source.layer(index)
            row = self._compress_layer(index, tree, (keys[index], values[index]), writer, text)
            write_json(self._row_file(index), row)
            rows.append(row)
            if text is not None:
                text.advance(specs(self.model)[index], tree)
        shutil.rmtree(self.part / "repair", ignore_errors=True)
        return writer, rows

    def _row_file(self, index: int) -> Path:
        return self.part / f"layer-{index}.json"

    def _compress_layer(
        self, index: int, tree: Tree, counts: tuple[int, int], writer: Writer, text: Stream | None
    ) -> dict[str, Any]:
        options, moments = self.options, self.moments(index)
        heads = layers.take_apart(self.model, tree["attention"])
        keys = methods.solve_keys(options.method, heads, moments, counts[0])
        values = methods.solve_values(options.method, heads, moments, counts[1])
        attention = assemble(heads, keys, values, tree["attention"])
        row: dict[str, Any] = {
            "layer": index,
            "keys": counts[0],
            "values": counts[1],
            "key_residual": keys.residual,
            "value_residual": values.residual,
            "unseen": unseen(moments.keys) + unseen(moments.values),
        }
        if text is not None and counts != (self.count, self.count):
            spec, original = (
                specs(writer.model)[index],
                (specs(self.model)[index], tree["attention"]),
            )
            scale = tree["attention_norm"]["scale"]
            if options.method in methods.SHARPENED and counts[0] < self.count:
                found = repair.temperature(original, (spec, attention), text, scale)
                attention = repair.sharpened(attention, found)
                row["temperature"] = found
            if options.repair != "none":
                before = repair.error(original, (spec, attention), text, scale)
                attention = self._repaired(original, (spec, attention), text, scale, index)
                row["repair"] = [before, repair.error(original, (spec, attention), text, scale)]
        writer.write_layer(index, layers.as_float32(tree | {"attention": attention}))
        return row

    def _repaired(self, original, compressed, text: Stream, scale, index: int) -> Tree:
        spec, options = compressed[0], self.options
        attention = repair.refit_output(original, compressed, text, scale)
        if options.repair == "output":
            return attention
        steps, words = options.repair_steps, f"repairing layer {index}"
        return repair.reconstruct(original, (spec, attention), text, scale, steps, words)

    def look(self, writer: Writer) -> dict[str, tuple[float, float]]:
        """The compressed model's held-out loss."""
        file = self.part / "after.json"
        if file.exists():
            return json.loads(file.read_text())
        stream, top = self._held_out("held_out"), self.source.top()
        stream.embed(writer.model, top)
        for index in progress(range(writer.model.n_layers), "evaluating, layers"):
            stream.advance(specs(writer.model)[index], writer.layer(index))
        losses = stream.losses(writer.model, top)
        write_json(file, losses)
        shutil.rmtree(self.part / "held_out")
        return losses

    def finish(self, writer: Writer, summary: dict[str, Any], draw: Callable[[Path], Any]) -> None:
        """Writes the run directory, and puts it where it was asked for."""
        run = self.part / "run"
        shutil.rmtree(run, ignore_errors=True)
        checkpoint = run / "checkpoints" / str(self.source.step)
        with disk_errors(run):
            checkpoint.parent.mkdir(parents=True)
            shutil.copytree(self.source.run / "tokenizer", run / "tokenizer")
        own = self.source.config.model  # how it runs is no matter of compression
        kept = {n: getattr(own, n) for n in ("dtype", "backend", "attention_kernel", "hlc_form")}
        model = dataclasses.replace(writer.model, **kept)
        name = f"{self.source.config.name}_{self.options.method}"
        config = dataclasses.replace(self.source.config, name=name, model=model)
        writer.save(checkpoint, config, self.source.digest)
        write_json(run / "config.json", config.to_dict())
        write_json(run / "compression.json", summary)
        draw(run / "compression.png")
        with disk_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            run.rename(self.out)
            shutil.rmtree(self.part)
