"""Generates the answers to tasks' prompts through the KV cache, batched by similar length."""

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
from mea_jax.ops.resolve import resolve_on
from mea_jax.ops.sampling import Sampling
from mea_jax.parallel import sharding

_GRAIN = 16  # prompts are padded to a multiple of this
# A batch reuses the previous batch's padded length if its longest prompt fills this share of it.
_FILLED = 0.9
_LOOK = 16  # tokens between two checks for the texts that end an answer

NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_READ = ("until", "do_sample", "temperature", "top_k", "top_p", *NEW_TOKENS, "max_length")
# Options that are not implemented, with the value that disables each of them.
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
    """A prompt to continue by at most `count` tokens, up to the first occurrence of an `until`."""

    tokens: list[int]
    until: tuple[str, ...]
    count: int
    sampling: Sampling


@dataclasses.dataclass
class GenerationCost:
    """The cost of generating answers, in tokens."""

    requests: int = 0
    prompt_real: int = 0
    prompt_computed: int = 0
    new_real: int = 0  # up to each answer's end
    new_computed: int = 0  # for all rows of a batch, until the end of the last one is detected
    programs: int = 0


def check_options(task: str, options: Mapping[str, Any]) -> None:
    """Raise `UserError` if a task sets a generation option that is not implemented.

    An option that is None, or has the value that disables it, is accepted.
    """
    for name, value in options.items():
        off = name in _NEUTRAL and value == _NEUTRAL[name]
        if name not in _READ and value is not None and not off:
            only = f"set {name}={_NEUTRAL[name]} or " if name in _NEUTRAL else ""
            raise UserError(
                f"task {task}: the generation option {name}={shown(value)} is not supported: "
                f"{only}remove it; supported options: {', '.join(_READ)}"
            )


def read_number(task: str, options: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return the option `name`, or `default` if it is None, as `kind`, which is int or float.

    Raise `UserError` if the value is not a number of that kind.
    """
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
    """Return `text` up to the first occurrence of any of `until`, and whether there was one."""
    found = [text.index(stop) for stop in until if stop and stop in text]
    return (text[: min(found)], True) if found else (text, False)


class AnswerGenerator:
    """A model that generates answers to prompts.

    `model`, `params`, `mesh` and `budget` are those of `likelihood.Scorer`. `cache_dtype` is the
    dtype of cached keys and values; None stands for the compute dtype.
    """

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
            self.batch_shards = sharding.shard_count("batch")
        self._generators: dict[int, Generator] = {}

    def _generator(self, length: int) -> Generator:
        if length not in self._generators:
            model = resolve_on(self.model, self.mesh, length)
            self._generators = {  # keep only one: each has its own copy of the parameters
                length: Generator(
                    model, self.params, length=length, cache_dtype=self.cache_dtype, mesh=self.mesh
                )
            }
        return self._generators[length]

    def write(
        self,
        prompts: Sequence[Prompt],
        written: GenerationCost | None = None,
        on_done: Callable[[int], Any] = lambda count: None,
    ) -> list[str]:
        """Return the answer to each prompt, in order.

        Sampled answers do not depend on the other prompts of their batch. `written` accumulates the
        cost. `on_done` is called with the number of answers finished since the last call.
        """
        written = GenerationCost() if written is None else written
        groups: dict[tuple[int, Sampling, tuple[str, ...]], list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault((prompt.count, prompt.sampling, prompt.until), []).append(i)
        texts = [""] * len(prompts)
        for (count, sampling, until), members in groups.items():
            longest = max(len(prompts[i].tokens) for i in members)
            length = math.ceil((longest + count) / _GRAIN) * _GRAIN
            length = min(length, self.model.longest_context() or length)
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
        """Write the answers to `members` into `texts`; yield the number of new ones per batch.

        All `members` share the options in `decoding`.
        """
        members = sorted(members, key=lambda i: -len(prompts[i].tokens))
        most = max(
            self.batch_shards,
            self.budget
            * self.batch_shards
            // generator.length
            // self.batch_shards
            * self.batch_shards,
        )
        batches = math.ceil(len(members) / most)
        size = math.ceil(math.ceil(len(members) / batches) / self.batch_shards) * self.batch_shards
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
        """Return the tokens whose text contains one of `until`, at which the device can stop.

        An `until` that spans several tokens is found when the texts are checked on the host.
        """
        return [i for i, word in enumerate(self._words) if any(u and u in word for u in until)]

    def _text(self, prompt: Prompt, tokens: list[int]) -> tuple[str, bool]:
        return cut(continuation(self.tokenizer, prompt.tokens, tokens), prompt.until)

    def _answer(self, prompt: Prompt, tokens: list[int]) -> tuple[str, int]:
        """Return the answer in `tokens`, and the number of tokens up to and including its end."""
        text, ended = self._text(prompt, tokens)
        used = len(tokens)
        while ended and used and self._text(prompt, tokens[: used - 1])[1]:
            used -= 1  # generated after the end, before the next check
        return text, used
