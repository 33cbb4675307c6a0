"""Import a published model as a run directory, one tensor after another.

Sources and targets (`layerwise.Writer`) are memory-mapped files, so memory holds only a few
megabytes in addition. The config, the shards, their index and the tokenizer are checked before the
first number is read.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mea_jax.checkpoint.files import disk_errors, write_json
from mea_jax.checkpoint.layerwise import Writer
from mea_jax.checkpoint.published import is_gguf, refuse_unpublished
from mea_jax.cli import progress
from mea_jax.config.checks import validate
from mea_jax.config.schema import DataConfig, ModelConfig, TrainConfig
from mea_jax.convert import (
    config_reading,
    families,
    folders,
    gguf_tokenizer,
    shards,
    slow_tokenizers,
    tensors,
)
from mea_jax.convert.casting import casts
from mea_jax.convert.gguf_file import GGUFModel, stored_name
from mea_jax.data import end_tokens, sources
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.errors import UserError
from mea_jax.ops.resolve import resolve

DTYPES = ("float32", "bfloat16")
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model")
_HELD_OUT = 0.1  # fraction of the text: none of it trains the model, and there may be little
_WINDOW = 2048  # positions of a window, if the model supports as many
# Buffers that old versions of transformers wrote: constants that follow from the config.
_UNUSED = re.compile(
    r"(.*\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|(.*\.)?self_attn\.masked_bias"
)
_PER_TOKEN = ("embedding", "head")  # parameters with a row for each token
_MAX_NEW_TOKENS = 64  # tokens that a tokenizer may have beyond the embedding
_SPARE = 1 << 28  # bytes of disk in addition to the arrays


def locate(model: str) -> Path:
    """Return the folder of a model on disk, or of that name on the hub, downloaded if necessary.

    Raise `UserError` if there is neither, or `model` is a run directory or a file.
    """
    path = Path(model).expanduser()
    refuse_unpublished(path, "--model")
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(
            f"--model {model}: no such folder, and no name of the hub: give a folder or OWNER/NAME"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"--model {model}: no such folder; to download it, first pip install 'mea_jax[hf]'"
        ) from error
    try:
        return Path(snapshot_download(model, allow_patterns=list(_PATTERNS)))
    except Exception as error:  # of many kinds: no network, no such model, no permission
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--model {model}: no such folder, and it cannot be downloaded from the hub ({reason})"
            ": check the name and the network"
        ) from error


class Source:
    """A published model, checked.

    Attributes:
      path: its folder or file, for messages.
      where: the place of its config, for messages.
      config: the content of config.json.
      model: our config of the same model, with rows for `new_tokens`.
      tokenizer: the tokenizer, with its companion files.
      new_tokens: tokens that were added to the tokenizer and have no row in the embedding.
      family: its architecture.
      entries: the tensors of `model`, in the published order.
    """

    def __init__(
        self,
        path: Path,
        where: str,
        config: dict[str, Any],
        tokenizer: Callable[[], Tokenizer],
        arrays: Callable[[], Mapping[str, Any]],
        stored_name: Callable[[str], str] = str,
    ):
        """Check that config, tokenizer and tensors are of one model; raise `UserError` if not.

        `tokenizer` and `arrays` are called in that order once the config is known to be supported.
        Arrays are given by their names in transformers, each with a `shape` and an `array()`;
        `stored_name` returns the name of one in its file, for messages.
        """
        self._stored_name = stored_name
        self.path, self.where, self.config = path, where, config
        self.model: ModelConfig = config_reading.model_config(self.config, self.where)
        self.tokenizer = _check_tokenizer(tokenizer(), path, self.model)
        self.new_tokens = _new_tokens(self.tokenizer, self.model.vocab_size)
        size = self.model.vocab_size + len(self.new_tokens)
        self.model = dataclasses.replace(self.model, vocab_size=size)
        self._tensors = arrays()
        self.family = families.family_of(self.config, self.where)
        self.entries = tensors.entries(self.model, self.family.norm_offset)
        self._check()

    @property
    def _described_in(self) -> str:
        return "config.json" if self.where.endswith("config.json") else "its metadata"

    def _check(self) -> None:
        known = set()
        for entry in self.entries:
            name, found = self._find(entry)
            known.add(name)
            wanted = entry.hf_shape
            if entry.path[0] in _PER_TOKEN:
                wanted = (wanted[0] - len(self.new_tokens), wanted[1])
            if found.shape != wanted:
                raise UserError(
                    f"{self.path}: {self._stored_name(name)} has shape {found.shape}, "
                    f"{self._described_in} asks for {wanted}: fetch the model again"
                )
        for name in self._tensors:
            if name not in known and not _UNUSED.fullmatch(name):
                self._check_surplus(name)

    def _check_surplus(self, name: str) -> None:
        if name != "lm_head.weight":
            raise UserError(
                f"{self.path}: contains {self._stored_name(name)}, which the model of "
                f"{self._described_in} does not have: give a model without it"
            )
        head, embedding = (
            self._tensors[n].array().view(np.uint8) for n in (name, "model.embed_tokens.weight")
        )
        if not np.array_equal(head, embedding):
            raise UserError(
                f"{self.path}: config.json sets tie_word_embeddings, but {name} is not the "
                "embedding: set the key to false"
            )

    def _find(self, entry: tensors.Entry) -> tuple[str, "_Part"]:
        """Return the name of the tensor that contains `entry`, and the part that `entry` is."""
        if (tensor := self._tensors.get(entry.name)) is not None:
            return entry.name, _Part(tensor)
        if entry.expert is not None:  # as transformers 5 keeps them in memory: all in one tensor
            base, ours = entry.name.partition(".experts.")[0], entry.path[-1]
            name = f"{base}.experts.{'down_proj' if ours == 'down' else 'gate_up_proj'}"
            if (tensor := self._tensors.get(name)) is not None:
                half = {"gate": 0, "up": 1}.get(ours)
                return name, _Part(tensor, (entry.expert, self.model.n_experts), half)
        name = self._stored_name(entry.name)
        raise UserError(f"{self.path}: {name} is missing: fetch the model again")

    def arrays(self) -> Iterator[tuple[tensors.Entry, np.ndarray]]:
        """Yield each entry with its published tensor, memory-mapped, in the order of `entries`."""
        for entry in self.entries:
            yield entry, self._find(entry)[1].array()


class _Part:
    """A tensor, or one expert's part of a tensor of all experts (E, out, in).

    `expert` is (index, E). `half` is 0 for gate and 1 for up, which are concatenated along `out`.
    """

    def __init__(
        self,
        tensor: shards.Tensor,
        expert: tuple[int, int] | None = None,
        half: int | None = None,
    ):
        self.tensor, self.expert, self.half = tensor, expert, half

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.tensor.shape
        if self.expert is None:
            return shape
        if len(shape) != 3 or shape[0] != self.expert[1]:
            return shape
        out = shape[1] if self.half is None else shape[1] / 2
        return (int(out) if out == int(out) else shape[1], shape[2])

    def array(self) -> np.ndarray:
        array = self.tensor.array()
        if self.expert is None:
            return array
        array = array[self.expert[0]]
        return array if self.half is None else np.split(array, 2)[self.half]


def open_source(model: Path) -> Source:
    """Return the published model of a folder, or of a GGUF file.

    Raise `UserError` if anything is wrong with it.
    """
    if is_gguf(model):
        found = GGUFModel(model)
        config = found.config()
        read = functools.partial(gguf_tokenizer.read, model, found.fields, config)
        return Source(model, str(model), config, read, lambda: found.tensors, stored_name)
    config = config_reading.read_config(model)
    published = {end_tokens.MODEL_CONFIG: (model / "config.json").read_bytes()}
    read = functools.partial(slow_tokenizers.read, model, published)
    arrays = functools.partial(shards.read_folder, model)
    return Source(model, str(model / "config.json"), config, read, arrays)


def _check_tokenizer(tokenizer: Tokenizer, path: Path, model: ModelConfig) -> Tokenizer:
    """Return `tokenizer`. Raise `UserError` if it is another model's."""
    beyond = tokenizer.vocab_size - model.vocab_size
    named = set(range(model.vocab_size, tokenizer.vocab_size)) <= tokenizer.added
    if beyond > 0 and not (named and beyond <= _MAX_NEW_TOKENS):
        raise UserError(
            f"{path}: the tokenizer does not match: it has ids up to {tokenizer.vocab_size - 1}, "
            f"the model has vocab_size={model.vocab_size}: fetch the model's own tokenizer"
        )
    return tokenizer


def _new_tokens(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Return the tokens whose ids are beyond a model's vocabulary, in order."""
    return [tokenizer.decode([i]) for i in range(vocab_size, tokenizer.vocab_size)]


def run_config(source: Source, out: Path, context_length: int, text: str) -> TrainConfig:
    """Return the config of the checkpoint; the arguments are those of `import_model`.

    Raise `UserError` if the model does not have that many positions, the text cannot be read, or
    the model cannot run here.
    """
    longest = config_reading.context_of(source.config, source.where)
    if context_length > longest:
        raise UserError(
            f"--context_length {context_length} is beyond the model's max_position_embeddings="
            f"{longest}: give at most that"
        )
    given = sources.named(text)
    try:
        next(sources.documents(given))  # checks that it has text, and the field of a jsonl source
    except UserError as error:
        raise UserError(f"--text {text}: {error}") from error
    data = DataConfig(
        sources=(given,),
        tokenizer=str(out.absolute() / "tokenizer"),
        context_length=context_length or min(longest, _WINDOW),
        held_out_fraction=_HELD_OUT,
    )
    config = TrainConfig(name=out.absolute().name, model=source.model, data=data)
    try:
        validate(config)
        model = resolve(source.model, jax.devices(), data.context_length)
    except UserError as error:
        raise UserError(f"{source.where}: {error}") from error
    return dataclasses.replace(config, model=model)


def import_model(
    model: Path,
    out: Path,
    dtype: str = "float32",
    context_length: int = 0,
    text: str = "python_stdlib",
) -> Mapping[str, Any]:
    """Import a model as the run directory `out`.

    Args:
      model: a folder as transformers saves it, or a GGUF file.
      out: the run directory, which must not exist.
      dtype: the dtype of the stored parameters, float32 or bfloat16.
      context_length: the positions of a window in the checkpoint's config; 0: the model's maximum,
        at most 2048.
      text: a replacement for the training data, which a published model does not include, such as
        "text:FOLDER" or "jsonl:FILE"; the default exists on every machine.

    Returns:
      The model's architecture, sizes, window, new tokens and limit of positions, if it has one.

    Raises:
      UserError: if anything is wrong with the arguments or the model; then there is no `out`.
    """
    with folders.atomic_folder(out) as part:
        source = open_source(model)
        config = run_config(source, out, context_length, text)
        writer = Writer(part / "arrays", config.model, dtype)
        folders.check_space(part, 2 * writer.bytes + _SPARE)  # mapped files, then the checkpoint
        for entry, array in progress(source.arrays(), "reading tensors", len(source.entries)):
            _fill(entry, array, writer)
        run = part / "result"
        with disk_errors(run):
            (run / "checkpoints").mkdir()
            (run / "tokenizer").mkdir()
            source.tokenizer.save(run / "tokenizer")
        writer.save(run / "checkpoints" / "0", config, digest="")
        write_json(run / "config.json", config.to_dict())
    return {
        "new_tokens": source.new_tokens,
        "vocab_size": source.model.vocab_size,
        "architecture": source.family.architecture,
        "parameters": writer.parameters,
        "tensors": len(source.entries),
        "bytes": writer.bytes,
        "context_length": config.data.context_length,
        "limit": config.model.longest_context(),
        "limit_reason": config.model.limit_reason(),
    }


def _fill(entry: tensors.Entry, array: np.ndarray, writer: Writer) -> None:
    ours = writer.open(entry.path, entry.layer)
    target = entry.to_hf(ours if entry.expert is None else ours[entry.expert])
    known, new = target[: len(array)], target[len(array) :]
    total = np.zeros(target.shape[1:])
    for where, piece in casts(entry.name, array, target.dtype):
        known[where] = piece + entry.offset if entry.offset else piece
        if len(new):
            total += piece.sum(axis=0, dtype=np.float64)
    # Rows of tokens that are new to the model. With the mean of all rows, their logit is the mean
    # of all logits, so they are never the most likely token, as they could be with zeros.
    new[:] = total / len(array)
