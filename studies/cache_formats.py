r"""Measure a model whose KV cache is in another number format: the baselines of a compression.

    python -m studies.cache_formats --checkpoint runs/smollm2 --formats int4_g32,kivi2 \
        --held_out_source text:FILE,jsonl:FILE --held_out_tokens 131072 \
        --measurements measurements --out formats

Compares the held-out loss of the original model with that of the same model reading keys and values
in each format (`studies.number_formats`), and writes the summary of `mea_jax.compress` as
`FORMAT.json` in `--out`. A finished format is not computed again and a stopped one continues after
its last layer. `--measurements` is a folder of `mea_jax.compress`, which is shared with its
compressions if the options of the texts are equal.
"""

import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors, write_json
from mea_jax.checkpoint.layerwise import StoredModel
from mea_jax.checkpoint.load import unresolved
from mea_jax.cli import progress
from mea_jax.compress import budgets, damage, option_flags
from mea_jax.compress.calibration import WINDOWS, CalibrationTexts
from mea_jax.compress.measurements import SHARED, Measurements
from mea_jax.compress.options import Options
from mea_jax.compress.stream import context_of
from mea_jax.errors import UserError
from mea_jax.model.attention_layer import AttentionLayer
from mea_jax.model.layer_spec import LayerSpec, layer_specs
from mea_jax.model.transformer import Block
from mea_jax.ops.resolve import resolve
from studies import number_formats
from studies.number_formats import CacheFormat

Tree = dict[str, Any]


def reading(form: CacheFormat) -> Callable[..., Any]:
    """Return an interceptor for `nn.intercept_methods`: attention reads a cache of format `form`.

    It replaces the keys and values of `AttentionLayer.attend` while a model is traced.
    """

    def intercept(proceed, args, kwargs, called: nn.module.InterceptorContext):
        if called.method_name != "attend" or not isinstance(called.module, AttentionLayer):
            return proceed(*args, **kwargs)
        q_BTNH, k_BTKH, v_BTKH, context = args[:4]
        positions_BT = context.positions_BT
        key_BTKH = number_formats.stored(form, k_BTKH, positions_BT, keys=True)
        value_BTKH = number_formats.stored(form, v_BTKH, positions_BT, keys=False)
        if not form.recent:
            new = (key_BTKH.astype(k_BTKH.dtype), value_BTKH.astype(v_BTKH.dtype))
            return proceed(q_BTNH, *new, *args[3:], **kwargs)
        o_BTNH = number_formats.attend_recent(
            q_BTNH,
            (k_BTKH, key_BTKH),
            (v_BTKH, value_BTKH),
            positions_BT,
            context.segment_ids_BT,
            called.module.logit_scale,
            form.recent,
        ).astype(q_BTNH.dtype)
        norm = kwargs.get("norm")
        return o_BTNH if norm is None else norm.apply(o_BTNH)

    return intercept


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_block(form: CacheFormat, spec: LayerSpec, params: Tree, x_BTD, batch, index):
    """Return the residual (B, T, D) after a layer whose cache has the format `form`."""
    block = Block(spec.alone, *spec.components)
    with nn.intercept_methods(reading(form)):
        out: Any = block.apply({"params": params}, x_BTD, context_of(spec.model, batch), index)
    return out[0]


class FormatStudy:
    """The number formats of one checkpoint's cache, measured on the same held-out windows.

    `windows` is the number of windows in a batch, for each device. Standard errors are over
    batches, so fewer windows give errors for fewer tokens. The default is that of compressions,
    which read the same measurements only then. Creating a study raises `UserError` if the model
    cannot have one of the formats, or if `out` contains results with other options.
    """

    def __init__(
        self,
        checkpoint: Path,
        out: Path,
        forms: list[CacheFormat],
        options: Options,
        measurements: Path | None = None,
        windows: int = WINDOWS,
    ):
        self.out, self.forms, self.options = out, forms, options
        self.source = StoredModel(checkpoint, _log)
        config = self.source.config
        auto = dataclasses.replace(unresolved(config.model), dtype=options.dtype)
        self.model = resolve(auto, jax.devices(), config.data.context_length)
        for form in forms:
            number_formats.check_model(form, self.model)
        self.texts = CalibrationTexts(self.source, options, _log)
        self.texts.batch = windows * len(jax.devices())
        self._claim()
        folder = measurements or out / "measurements"
        self.measurements = Measurements(folder, self.source, self.model, self.texts, options)

    def _claim(self) -> None:
        asked = dataclasses.asdict(self.options)
        wanted = {name: asked[name] for name in SHARED}
        wanted |= {"checkpoint": str(self.source.folder.absolute()), "batch": self.texts.batch}
        wanted |= {"text": self.texts.prepared.digest}
        settings = self.out / "settings.json"
        with disk_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        if not settings.exists():
            write_json(settings, wanted)
            return
        stored = json.loads(settings.read_text())
        if differing := [name for name in wanted if stored.get(name) != wanted[name]]:
            raise UserError(
                f"--out {self.out} was made with another {differing[0]} "
                f"({stored.get(differing[0])}): choose another folder"
            )

    def run(self) -> list[dict[str, Any]]:
        """Return the summary of each format, as `damage.summarise` returns it."""
        before = self.measurements.calibrate()
        return [self._summary(form, before) for form in progress(self.forms, "formats")]

    def _summary(self, form: CacheFormat, before: Any) -> dict[str, Any]:
        file, part = self.out / f"{form.name}.json", self.out / f"{form.name}.part"
        if file.exists():
            shutil.rmtree(part, ignore_errors=True)  # left over if a study was killed
            return json.loads(file.read_text())
        layers, model = self.model.n_layers, self.model
        side = number_formats.bytes_per_position(form, model.n_kv_heads, model.head_dim)
        summary = damage.summarise(
            dataclasses.replace(self.options, method=form.name, keep=number_formats.share(form)),
            (budgets.cache_bytes(model), [(side, side)] * layers),
            [{"layer": index} for index in range(layers)],
            (before, self._pass(form, part)),
            [],
            model.n_kv_heads,
        )
        write_json(file, summary | {"format": dataclasses.asdict(form)})
        shutil.rmtree(part)
        return json.loads(file.read_text())

    def _pass(self, form: CacheFormat, folder: Path) -> Any:
        """Return the losses of the model with a cache of this format; continue in `folder`."""
        stream, top, specs = self.texts.held_out(folder), self.source.top(), layer_specs(self.model)
        if not any(stream.resume(layer) for layer in range(len(specs), -1, -1)):
            stream.embed(self.model, top)
        block = functools.partial(run_block, form)
        for index in progress(range(stream.done, len(specs)), f"{form.name}, layers"):
            stream.advance(specs[index], self.source.layer(index), block=block)
        return stream.losses(self.model, top, self.measurements.held_out())


def table(summaries: list[dict[str, Any]]) -> str:
    """Return a Markdown table: a row for each format, with the increase and KL of each source.

    Both are in nats per token, with standard errors over batches if there is more than one.
    """

    def cell(value: float, error: float | None, sign: str = "") -> str:
        known = error is not None and error == error
        return f"{value:{sign}.4f}" + (f" ±{error:.4f}" if known else "")

    domains = list(summaries[0]["held_out"]["domains"])
    short = [Path(name).name for name in domains]
    head = ["format", "exact first", "bytes/token", "kept"]
    head += [f"{what}, {name}" for name in short for what in ("increase", "KL")]
    rows = [head, ["---"] * len(head)]
    for summary in summaries:
        form, cache = summary["format"], summary["cache_bytes_per_token"]
        kept = f"{summary['cache_kept']:.1%}"
        row = [form["name"], str(form["sinks"]), f"{cache['after']:,.0f}", kept]
        for name in domains:
            d = summary["held_out"]["domains"][name]
            row.append(cell(d["increase"], d["error"], "+"))
            row.append(cell(d["divergence"], d["divergence_error"]))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    if CHECKPOINT.value is None or OUT.value is None or not FORMATS.value:
        raise UserError(
            "--checkpoint, --out or --formats is missing: give all three, such as --checkpoint "
            "runs/quickstart --out formats --formats int4_g32,kivi2"
        )
    options = option_flags.options()
    forms = number_formats.named(FORMATS.value, EXACT_SINKS.value)
    cli.enable_compilation_cache()
    folder = Path(MEASUREMENTS.value) if MEASUREMENTS.value else None
    paths = Path(CHECKPOINT.value), Path(OUT.value)
    summaries = FormatStudy(*paths, forms, options, folder, BATCH_WINDOWS.value).run()
    print(table(summaries))
    print(f"\n{OUT.value} contains a file FORMAT.json for each format")


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, option_flags.CHECKPOINT)
    OUT = flags.DEFINE_string("out", None, "folder for a JSON file per format")
    FORMATS = flags.DEFINE_string(
        "formats", None, f"formats, separated by commas, of {', '.join(number_formats.FORMATS)}"
    )
    EXACT_SINKS = flags.DEFINE_bool(
        "sinks", True, "keep the first positions of a text exact, as --method bits does"
    )
    MEASUREMENTS = flags.DEFINE_string("measurements", None, option_flags.MEASUREMENTS)
    BATCH_WINDOWS = flags.DEFINE_integer(
        "windows", WINDOWS, "windows per batch and device; errors are over batches", lower_bound=1
    )
    option_flags.define(*SHARED)
    cli.run(main, "stopped; run the same command again to continue", training=False)
