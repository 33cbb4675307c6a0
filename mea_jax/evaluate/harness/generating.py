"""Texts that tasks ask a model to write: prompts of like length together, through its KV cache."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from mea_jax.config.schema import ModelConfig
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.errors import UserError, shown
from mea_jax.generate.generator import Decoding, Generator, continuation
from mea_jax.ops.backend import resolve
from mea_jax.ops.sampling import Sampling
from mea_jax.parallel import sharding

_GRAIN = 16  # prompts are filled up to a multiple of it
_FILLED = 0.9  # a batch whose longest prompt fills so much of the last one's length keeps that
_LOOK = 16  # tokens between two looks at the texts that end an answer

NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_READ = ("until", "do_sample", "temperature", "top_k", "top_p", *NEW_TOKENS, "max_length")
# Options that are not implemented, with the value that switches each of them off.
_NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "n", "best_of"), 1),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "typical_p"), 1),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "diversity_penalty"), 0),
    **dict.fromkeys(("no_repeat_ngram_size", "penalty_alpha", "min_p", "early_stopping"), 0),
    **dict.fromkeys(("min_length", "min_new_tokens", "min_tokens"), 0),
    "use_cache": True,
}


@dataclass(frozen=True)
class Prompt:
    """A prompt to continue by at most `count` tokens, up to the first text of `until`."""

    tokens: list[int]
    until: tuple[str, ...]
    count: int
    sampling: Sampling


@dataclasses.dataclass
class Written:
    """The cost of answers, in tokens."""

    requests: int = 0
    prompt_real: int = 0
    prompt_computed: int = 0
    new_real: int = 0  # up to each answer's end
    new_computed: int = 0  # steps of whole batches, until the last row's end was seen
    programs: int = 0


def check_options(task: str, options: Mapping[str, Any]) -> None:
    """Raise `UserError` if a task asks for a generation option that is not implemented.

    An option that is None, or has the value that switches it off, is accepted.
    """
    for name, value in options.items():
        off = name in _NEUTRAL and value == _NEUTRAL[name]
        if name not in _READ and value is not None and not off:
            only = f"only {name}={_NEUTRAL[name]} is; " if name in _NEUTRAL else ""
            raise UserError(
                f"task {task}: the generation option {name}={shown(value)} is not supported; "
                f"{only}supported options: {', '.join(_READ)}"
            )


def read_number(task: str, options: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return the option `name` as an int or a float. Raise `UserError` if it is not one."""
    value = options.get(name)
    try:
        number = kind(default if value is None else value)
        if isinstance(value, float) and number != value:
            raise ValueError  # int would drop the fraction
    except (TypeError, ValueError, OverflowError) as error:
        what = "a whole number" if kind is int else "a number"
        raise UserError(
            f"task {task}: the generation option {name}={shown(value)} must be {what}"
        ) from error
    return number


def cut(text: str, until: Sequence[str]) -> tuple[str, bool]:
    """`text` before the first of `until`, and whether there was one."""
    found = [text.index(stop) for stop in until if stop and stop in text]
    return (text[: min(found)], True) if found else (text, False)


class Writer:
    """A model that answers prompts; arguments as of `likelihood.Scorer`."""

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        mesh: Mesh,
        tokenizer: Tokenizer,
        budget: int,
        cache_dtype: str | None = None,
    ):
        self.model, self.params, self.mesh, self.budget = model, params, mesh, budget
        self.tokenizer, self.cache_dtype = tokenizer, cache_dtype
        with jax.set_mesh(mesh):
            self.ways = sharding.shard_count("batch")
        self._generators: dict[int, Generator] = {}

    def _generator(self, length: int) -> Generator:
        if length not in self._generators:
            devices, tensor = list(self.mesh.devices.flat), self.mesh.shape["tensor"]
            model = resolve(self.model, devices, length, tensor=tensor)
            self._generators = {  # one at a time: each has its own copy of the parameters
                length: Generator(
                    model, self.params, length=length, cache_dtype=self.cache_dtype, mesh=self.mesh
                )
            }
        return self._generators[length]

    def write(
        self,
        prompts: Sequence[Prompt],
        written: Written | None = None,
        on_done: Callable[[int], Any] = lambda count: None,
    ) -> list[str]:
        """The answer to each prompt, in order; sampled ones do not depend on their neighbours."""
        written = Written() if written is None else written
        groups: dict[tuple[int, Sampling, tuple[str, ...]], list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault((prompt.count, prompt.sampling, prompt.until), []).append(i)
        texts = [""] * len(prompts)
        for (count, sampling, until), members in groups.items():
            longest = max(len(prompts[i].tokens) for i in members)
            length = math.ceil((longest + count) / _GRAIN) * _GRAIN
            if self.model.positions == "learned":
                length = min(length, self.model.max_positions)
            with jax.set_mesh(self.mesh):
                generator = self._generator(length)
                before = len(generator._compiled)
                decoding = Decoding(
                    count,
                    sampling,
                    stop=self.tokenizer.stops,
                    ends=self._ends(until),
                    chunk=_LOOK,
                )
                for done in self._group(generator, prompts, members, decoding, texts, written):
                    on_done(done)
                written.programs += len(generator._compiled) - before
        written.requests += len(prompts)
        return texts

    def _group(self, generator, prompts, members, decoding, texts, written) -> Iterator[int]:
        """Writes answers that are drawn in one way into `texts`; yields how many are new."""
        members = sorted(members, key=lambda i: -len(prompts[i].tokens))
        most = max(self.ways, self.budget * self.ways // generator.length // self.ways * self.ways)
        batches = math.ceil(len(members) / most)
        size = math.ceil(math.ceil(len(members) / batches) / self.ways) * self.ways
        padded = generator.length
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            longest = len(prompts[batch[0]].tokens)
            if longest < _FILLED * padded:
                padded = min(math.ceil(longest / _GRAIN) * _GRAIN, generator.length)
            new = self._batch(generator, prompts, batch, size, padded, decoding)
            written.prompt_computed += size * padded
            written.new_computed += size * max(map(len, new))
            for i, tokens in zip(batch, new, strict=False):
                texts[i], used = self._answer(prompts[i], tokens)
                written.prompt_real += len(prompts[i].tokens)
                written.new_real += used
            yield len(batch)

    def _batch(self, generator, prompts, batch, size, padded, decoding) -> list[list[int]]:
        rows = batch + batch[-1:] * (size - len(batch))

        def ended(new: list[list[int]]) -> list[bool]:
            return [
                row >= len(batch) or self._text(prompts[i], new[row])[1]
                for row, i in enumerate(rows)
            ]

        return generator.run(
            [prompts[i].tokens for i in rows],
            dataclasses.replace(decoding, padded=padded),
            rows=rows,
            on_tokens=ended,
        )

    @functools.cached_property
    def _words(self) -> list[str]:
        """The text of each token."""
        return [self.tokenizer.decode([i]) for i in range(self.tokenizer.vocab_size)]

    def _ends(self, until: tuple[str, ...]) -> list[int]:
        """Tokens that hold a whole text of `until`: after one nothing need be drawn, which the
        device sees by itself. What spans several tokens is found when texts are looked at."""
        return [i for i, word in enumerate(self._words) if any(u and u in word for u in until)]

    def _text(self, prompt: Prompt, tokens: list[int]) -> tuple[str, bool]:
        return cut(continuation(self.tokenizer, prompt.tokens, tokens), prompt.until)

    def _answer(self, prompt: Prompt, tokens: list[int]) -> tuple[str, int]:
        """The answer in `tokens`, and how many of them it took with what ends it."""
        text, ended = self._text(prompt, tokens)
        used = len(tokens)
        while ended and used and self._text(prompt, tokens[: used - 1])[1]:
            used -= 1  # drawn after the end, before anyone looked
        return text, used
