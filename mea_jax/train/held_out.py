"""Measure the held-out loss and diagnostics of a run, during training and at its end."""

import math
from typing import Any

import jax
import numpy as np

from mea_jax.config.schema import TrainConfig
from mea_jax.data.pipeline import held_out_batches
from mea_jax.data.prepare import Prepared
from mea_jax.parallel.batches import BatchPlacer
from mea_jax.train.diagnostics import compile_diagnostics
from mea_jax.train.step import compile_eval_step


class HeldOut:
    """The held-out windows of a run, with functions that measure a model on them."""

    def __init__(
        self, config: TrainConfig, mesh: jax.sharding.Mesh, prepared: Prepared, place: BatchPlacer
    ):
        self.config, self.prepared, self.place = config, prepared, place
        self.evaluate_step = compile_eval_step(config, mesh)
        self.diagnose = compile_diagnostics(config, mesh)
        self.sample = self.read(config.evaluate.batches)

    def read(self, batches: int | None) -> list[dict[str, np.ndarray]]:
        """Return this process's rows of at most `batches` held-out batches; None: of all."""
        return list(
            held_out_batches(
                self.prepared,
                batch_size=self.config.batch_size,
                max_batches=batches,
                rows=self.place.rows,
                skip_bad=self.config.data.bad_input == "skip",
            )
        )

    def bits_per_nat(self) -> float | None:
        """Return the bits per held-out byte of one nat per held-out token; None without text."""
        tokens = sum(source.held_out_tokens for source in self.prepared.sources)
        size = sum(source.held_out_bytes for source in self.prepared.sources)
        return tokens / size / math.log(2) if size else None

    def loss(self, params, batches) -> dict[str, float]:
        """Return {"loss", "bits_per_byte"} over `batches`; {} if they contain no token.

        "loss" is in nats per token.
        """
        sums = [jax.device_get(self.evaluate_step(params, self.place(b))) for b in batches]
        tokens = sum(float(s["tokens"]) for s in sums)
        if not tokens:
            return {}
        values = {"loss": sum(float(s["nll"]) for s in sums) / tokens}
        if (ratio := self.bits_per_nat()) is not None:
            values["bits_per_byte"] = values["loss"] * ratio
        return values

    def report(self, step: int, params, batches, writer) -> dict[str, Any]:
        """Write the rows "held_out" and "diagnostics" of `step` and return the held-out values.

        These are the values of `loss` and, if the model has W_lc, the mean "mixing_distance". If
        `batches` contain no token, the result is {} and no row is written.
        """
        values: dict[str, Any] = self.loss(params, batches) if batches else {}
        if not values:
            return {}
        writer.write(step, "held_out", values)
        statistics = jax.device_get(self.diagnose(params, self.place(batches[0])))
        writer.write(step, "diagnostics", statistics)
        distances = [np.mean(v) for k, v in statistics.items() if k.startswith("mixing_distance")]
        return values | ({"mixing_distance": float(np.mean(distances))} if distances else {})
