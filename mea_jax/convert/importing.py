"""A published model becomes a run directory: one tensor after another, from map to map.

Sources are mapped files, targets are mapped files (`layerwise.Writer`): beside them memory holds a
few megabytes. Everything is checked before the first number is read: the config, the shards, their
index, the tokenizer.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mea_jax.checkpoint.files import disk_errors, write_json
from mea_jax.checkpoint.layerwise import Writer
from mea_jax.checkpoint.published import refuse_unpublished
from mea_jax.config.checks import validate
from mea_jax.config.schema import DataConfig, ModelConfig, SourceConfig, TrainConfig
from mea_jax.convert import families, folders, shards, slow_tokenizers, tensors
from mea_jax.convert.casting import casts
from mea_jax.data import tokenizers
from mea_jax.data.sources import documents
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.errors import UserError
from mea_jax.ops.backend import resolve

DTYPES = ("float32", "bfloat16")
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model")
_HELD_OUT = 0.1  # of the text: none of it trains the model, and there may be little
_WINDOW = 2048  # positions of a window, of models that take as many
# Buffers that old versions of transformers wrote: constants, made anew from the config.
_UNUSED = re.compile(
    r"(.*\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|(.*\.)?self_attn\.masked_bias"
)
_WORDS = ("embedding", "head")  # parameters with a row for each token
_NEW = 64  # tokens that a tokenizer may have beyond the embedding
_SPARE = 1 << 28  # bytes of disk beside the arrays


def locate(model: str) -> Path:
    """The folder of a model: one on disk, or the hub's of that name, fetched if need be.

    Raises `UserError`.
    """
    path = Path(model).expanduser()
    refuse_unpublished(path, "--model")
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(f"--model {model}: no such folder, and no name of the hub (OWNER/NAME)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"--model {model}: no such folder; fetching it needs pip install 'mea_jax[hf]'"
        ) from error
    try:
        return Path(snapshot_download(model, allow_patterns=list(_PATTERNS)))
    except Exception as error:  # of many kinds: no network, no such model, no permission
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--model {model}: no such folder, and the hub does not give it ({reason})"
        ) from error


class Source:
    """A model's folder, checked; `arrays` gives its tensors in our shapes' order.

    Attributes:
      config: its config.json.
      model: the same as ours, with rows for `new_tokens`.
      tokenizer: with the files that come along.
      new_tokens: tokens that were added to the tokenizer and have no row in the embedding.
    """

    def __init__(self, folder: Path):
        """Raises `UserError` for whatever is wrong with it."""
        self.folder, self.where = folder, str(folder / "config.json")
        self.config = families.read_config(folder)
        self.model: ModelConfig = families.model_config(self.config, self.where)
        self.tokenizer = _tokenizer(folder, self.model)
        self.new_tokens = _new_tokens(self.tokenizer, self.model.vocab_size)
        size = self.model.vocab_size + len(self.new_tokens)
        self.model = dataclasses.replace(self.model, vocab_size=size)
        self._tensors = shards.read_folder(folder)
        self.entries = tensors.entries(self.model)
        self._check()

    def _check(self) -> None:
        known = set()
        for entry in self.entries:
            name, found = self._find(entry)
            known.add(name)
            wanted = entry.theirs
            if entry.path[0] in _WORDS:
                wanted = (wanted[0] - len(self.new_tokens), wanted[1])
            if found.shape != wanted:
                raise UserError(
                    f"{self.folder}: {name} has shape {found.shape}, config.json asks for {wanted}"
                )
        for name in self._tensors:
            if name not in known and not _UNUSED.fullmatch(name):
                self._check_surplus(name)

    def _check_surplus(self, name: str) -> None:
        if name != "lm_head.weight":
            raise UserError(f"{self.folder}: holds {name}, which config.json has no place for")
        head, embedding = (
            self._tensors[n].array().view(np.uint8) for n in (name, "model.embed_tokens.weight")
        )
        if not np.array_equal(head, embedding):
            raise UserError(
                f"{self.folder}: config.json says tie_word_embeddings, but {name} is not the "
                "embedding: set the key to false"
            )

    def _find(self, entry: tensors.Entry) -> tuple[str, "_Part"]:
        """The tensor that holds `entry`, and which part of it."""
        if (tensor := self._tensors.get(entry.name)) is not None:
            return entry.name, _Part(tensor)
        if entry.expert is not None:  # as transformers 5 holds them in memory: all in one
            base, ours = entry.name.partition(".experts.")[0], entry.path[-1]
            name = f"{base}.experts.{'down_proj' if ours == 'down' else 'gate_up_proj'}"
            if (tensor := self._tensors.get(name)) is not None:
                half = {"gate": 0, "up": 1}.get(ours)
                return name, _Part(tensor, (entry.expert, self.model.n_experts), half)
        raise UserError(f"{self.folder}: {entry.name} is missing")

    def arrays(self) -> Iterator[tuple[tensors.Entry, np.ndarray]]:
        """Each entry with its tensor, theirs, mapped."""
        for entry in self.entries:
            yield entry, self._find(entry)[1].array()


class _Part:
    """A tensor, or one expert's part of one that holds them all (E, out, in).

    `half`: gate (0) and up (1) lie behind one another along `out`.
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


def _tokenizer(folder: Path, model: ModelConfig) -> Tokenizer:
    """Return the model's tokenizer, with its companions. Raises `UserError` if it is another's."""
    config = {tokenizers.MODEL_CONFIG: (folder / "config.json").read_bytes()}
    tokenizer = slow_tokenizers.read(folder, config)
    beyond = tokenizer.vocab_size - model.vocab_size
    named = set(range(model.vocab_size, tokenizer.vocab_size)) <= tokenizer.added
    if beyond > 0 and not (named and beyond <= _NEW):
        raise UserError(
            f"{folder}: the tokenizer does not match: it has ids up to {tokenizer.vocab_size - 1}, "
            f"config.json has vocab_size={model.vocab_size}"
        )
    return tokenizer


def _new_tokens(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Return the tokens whose ids are beyond a model's vocabulary, in order."""
    return [tokenizer.decode([i]) for i in range(vocab_size, tokenizer.vocab_size)]


def run_config(source: Source, out: Path, context_length: int, text: str) -> TrainConfig:
    """The config inside the checkpoint; arguments as those of `import_model`.

    Raises `UserError` for what cannot be.
    """
    longest = families.context_of(source.config, source.where)
    if context_length > longest:
        raise UserError(
            f"--context_length {context_length} is beyond the model's max_position_embeddings="
            f"{longest}"
        )
    kind, _, path = text.partition(":")
    given = SourceConfig(source=kind, path=str(Path(path).expanduser().absolute()) if path else "")
    try:
        next(documents(given))  # it has text, and the field that is asked for
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
    folder: Path,
    out: Path,
    dtype: str = "float32",
    context_length: int = 0,
    text: str = "python_stdlib",
) -> Mapping[str, Any]:
    """Makes the run directory `out` of a model's folder; a summary of it.

    Args:
      folder: as transformers saves a model.
      dtype: of the stored parameters.
      context_length: windows of the checkpoint's config; 0: chosen.
      text: what stands for the data of its training, which a published model does not bring, such
        as "text:FOLDER" or "jsonl:FILE"; the default is there on every machine.

    Raises `UserError`; then there is no `out`.
    """
    with folders.whole(out) as part:
        source = Source(folder)
        config = run_config(source, out, context_length, text)
        writer = Writer(part / "arrays", config.model, dtype)
        folders.check_space(part, 2 * writer.bytes + _SPARE)  # mapped files, then the checkpoint
        for entry, array in tqdm.tqdm(
            source.arrays(), "reading tensors", len(source.entries), disable=None, leave=False
        ):
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
        "architecture": families.family_of(source.config, source.where).architecture,
        "parameters": writer.bytes // jnp.dtype(dtype).itemsize,
        "tensors": len(source.entries),
        "bytes": writer.bytes,
        "context_length": config.data.context_length,
    }


def _fill(entry: tensors.Entry, array: np.ndarray, writer: Writer) -> None:
    ours = writer.open(entry.path, entry.layer)
    target = entry.to_theirs(ours if entry.expert is None else ours[entry.expert])
    known, new = target[: len(array)], target[len(array) :]
    total = np.zeros(target.shape[1:])
    for where, piece in casts(entry.name, array, target.dtype):
        known[where] = piece
        if len(new):
            total += piece.sum(axis=0, dtype=np.float64)
    # Rows of tokens that the model does not know. With the mean of all rows, their logit is the
    # mean of all logits, so they are never the most likely token, as they may be with zeros.
    new[:] = total / len(array)
