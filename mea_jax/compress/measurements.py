"""Measure the original model before anything is compressed.

The measurements are the moments of every layer, the held-out loss with the last residuals, and the
cost of each layer's keys and values at each number of heads. Each is written to a file in one
folder as soon as it is computed, so a killed pass can continue. None depends on how much is kept,
so several compressions of a checkpoint can share the folder.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mea_jax.checkpoint.files import disk_errors, write_json
from mea_jax.checkpoint.layerwise import StoredModel
from mea_jax.cli import progress
from mea_jax.compress import fisher, methods, rates
from mea_jax.compress import layer as layers
from mea_jax.compress.bits_probe import BitsProbe
from mea_jax.compress.calibration import CalibrationTexts
from mea_jax.compress.moments import Moments, of_weights
from mea_jax.compress.options import Options
from mea_jax.compress.probe import Sensitivity, SensitivityProbe, plain_layer, residuals
from mea_jax.compress.stream import Losses, Stream, moments_of
from mea_jax.config.schema import ModelConfig
from mea_jax.errors import UserError
from mea_jax.model.layer_spec import LayerSpec, layer_specs, plain_specs

SHARED = (
    "calibration_tokens",
    "calibration_source",
    "held_out_source",
    "held_out_tokens",
    "dtype",
    "seed",
)


class Measurements:
    """The measurements of one checkpoint on one choice of text (the options named in `SHARED`).

    Creating one raises `UserError` if `folder` contains measurements with other options.
    """

    def __init__(
        self,
        folder: Path,
        source: StoredModel,
        model: ModelConfig,
        texts: CalibrationTexts,
        options: Options,
    ):
        self.folder, self.source, self.model = folder, source, model
        self.texts, self.options = texts, options
        self._claim()

    def _claim(self) -> None:
        asked = dataclasses.asdict(self.options)
        wanted = {name: asked[name] for name in SHARED}
        wanted |= {"checkpoint": str(self.source.folder.absolute())}
        wanted |= {"text": self.texts.prepared.digest}
        wanted |= {"moments": [field.name for field in dataclasses.fields(Moments)]}
        settings = self.folder / "settings.json"
        if not settings.exists():
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(settings, wanted)
            return
        stored = json.loads(settings.read_text())
        # Older folders have no `held_out_source`.
        if differing := [name for name in wanted if stored.get(name, "") != wanted[name]]:
            raise UserError(
                f"--measurements {self.folder} was made with another {differing[0]} "
                f"({stored.get(differing[0])}): choose another folder"
            )

    def calibrate(self) -> Losses:
        """Write the moments of every layer to the folder, and return the held-out losses."""
        # The held-out windows depend on the batch size, and so on the number of devices.
        before = self.folder / f"losses-{self.texts.batch}.json"
        total, calibration = self.model.n_layers, self.folder / "calibration"
        if before.exists():
            shutil.rmtree(calibration, ignore_errors=True)  # left over if a pass was killed
            return json.loads(before.read_text())
        done = 0
        while self._moments_file(done).exists():
            done += 1
        text = None
        if (tokens := self.options.calibration_tokens) and done < total:
            text = self.texts.training(calibration, tokens)
        held_out = self.texts.held_out(self._held_out_folder())
        for stream in filter(None, (text, held_out)):
            stream.start(self.model, self.source.top(), done, self.source.layer)
        for index in progress(range(done, total), "calibrating, layers", total - done):
            tree, spec = self.source.layer(index), layer_specs(self.model)[index]
            if text is not None:
                sums = text.advance(spec, tree, collect=True)
                assert sums is not None
                moments = moments_of(sums, self.model.n_kv_heads)
            else:
                heads = layers.split_heads(self.model, tree["attention"])
                moments = of_weights(heads.query_DNH, heads.key_DKH, heads.value_DKH)
            held_out.advance(spec, tree)
            self._save_moments(index, moments)
        losses = held_out.losses(self.model, self.source.top())
        write_json(before, losses)
        shutil.rmtree(calibration, ignore_errors=True)
        return losses

    def _held_out_folder(self) -> Path:
        return self.folder / f"held_out-{self.texts.batch}"

    def held_out(self) -> Stream:
        """Return the held-out stream after the original's last layer, where `calibrate` left it."""
        stream = self.texts.held_out(self._held_out_folder())
        stream.start(self.model, self.source.top(), self.model.n_layers, self.source.layer)
        return stream

    def _moments_file(self, index: int) -> Path:
        return self.folder / f"moments-{index}.npz"

    def _save_moments(self, index: int, moments: Moments) -> None:
        scratch = self.folder / "moments.npz"
        with disk_errors(scratch):
            np.savez(scratch, **dataclasses.asdict(moments))
            scratch.rename(self._moments_file(index))

    def moments(self, index: int) -> Moments:
        """Read the moments of layer `index`."""
        with np.load(self._moments_file(index)) as stored:
            return Moments(
                **{n: stored[n] for n in stored.files[:-1]}, tokens=int(stored["tokens"])
            )

    def information(self, index: int) -> fisher.Information:
        """Return the Fisher information of layer `index`; the first call measures all layers."""
        if not all((self.folder / f"information-{i}.npz").exists() for i in range(len(self.specs))):
            tokens = min(self.options.calibration_tokens, fisher.TOKENS)
            stream = self.texts.training(self.folder / "information", tokens)
            specs, top, seed = self.specs, self.source.top(), self.options.seed
            fisher.measure(self.model, specs, self._plain, top, stream, seed, self.folder)
        return fisher.read(self.folder, index)

    @property
    def specs(self) -> list[LayerSpec]:
        """The specs of the layers without mixing."""
        return plain_specs(self.model)

    def _plain(self, index: int) -> dict[str, Any]:
        tree = self.source.layer(index)
        return plain_layer(layers.split_heads(self.model, tree["attention"]), tree)

    def sensitivities(self, chosen: list[int]) -> list[Sensitivity]:
        """Return the sensitivities of keys and of values of the layers `chosen`.

        Those that the folder does not contain yet are measured first.
        """
        missing = [index for index in chosen if not self._sensitivity_file(index).exists()]
        if missing:
            self._residuals(missing) if self.options.budget == "residual" else self._measure(
                missing
            )
        found = []
        for index in chosen:
            rows = json.loads(self._sensitivity_file(index).read_text())
            found += [Sensitivity(**row) for row in rows]
        return found

    def _sensitivity_file(self, index: int) -> Path:
        asked = self.options
        text = "" if asked.budget == "residual" else f"-divergence-{asked.measure_tokens}"
        return self.folder / f"{asked.budget}{text}-{asked.method}-{index}.json"

    def _keep(self, found: list[Sensitivity]) -> None:
        rows = [dataclasses.asdict(row) for row in found]
        write_json(self._sensitivity_file(found[0].layer), rows)

    def _residuals(self, missing: list[int]) -> None:
        for index in progress(missing, "residuals, layers"):
            heads = layers.split_heads(self.model, self.source.layer(index)["attention"])
            self._keep(residuals(self.options.method, heads, self.moments(index), index))

    def _measure(self, missing: list[int]) -> None:
        """Measure each layer in `missing` within the full model; earlier layers run only once."""
        options, top = self.options, self.source.top()
        streams = [self.texts.training(self.folder / "measure", options.measure_tokens)]
        if options.budget == "repaired":
            trying = self.texts.training(self.folder / "trying", options.calibration_tokens)
            streams.append(trying)
        for stream in streams:
            stream.embed(self.model, top)
        trees: list[dict[str, Any]] = [self.source.layer(i) for i in range(self.model.n_layers)]
        parts = [layers.split_heads(self.model, tree["attention"]) for tree in trees]
        plain = [plain_layer(heads, tree) for heads, tree in zip(parts, trees, strict=True)]
        measurer = SensitivityProbe(self.model, top, plain, *streams)
        count, in_bits = self.model.n_kv_heads, None
        if options.method == "bits":
            solved = [
                methods.solve("bits", heads, self.moments(i), (count, count), self.information(i))
                for i, heads in enumerate(parts)
            ]
            in_bits = BitsProbe(measurer, solved, rates.POINTS)
        for index in progress(range(max(missing) + 1), "measuring, layers"):
            if index in missing and in_bits is not None:
                self._keep(in_bits.sensitivity())
            elif index in missing:
                self._keep(measurer.sensitivity(options.method, parts[index], self.moments(index)))
            measurer.advance()
        for stream in streams:
            shutil.rmtree(stream.folder)
