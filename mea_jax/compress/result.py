"""Write a compressed model as a run directory."""

import dataclasses
import shutil
from pathlib import Path

from mea_jax.checkpoint.files import disk_errors, write_json
from mea_jax.checkpoint.layerwise import StoredModel, Writer


def write_run(source: StoredModel, writer: Writer, run: Path, method: str) -> None:
    """Write the parameters of `writer` to the new run directory `run`, over what is there.

    The data, the tokenizer and the options that select how a model runs are those of `source`.
    Raise `UserError` if the disk is full or not writable.
    """
    shutil.rmtree(run, ignore_errors=True)
    checkpoint = run / "checkpoints" / str(source.step)
    with disk_errors(run):
        checkpoint.parent.mkdir(parents=True)
        shutil.copytree(source.run / "tokenizer", run / "tokenizer")
    own = source.config.model
    kept = {n: getattr(own, n) for n in ("dtype", "backend", "attention_kernel", "hlc_form")}
    model = dataclasses.replace(writer.model, **kept)
    config = dataclasses.replace(source.config, name=f"{source.config.name}_{method}", model=model)
    writer.save(checkpoint, config, source.digest)
    with disk_errors(run):
        write_json(run / "config.json", config.to_dict())
