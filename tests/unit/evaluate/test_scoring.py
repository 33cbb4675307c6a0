"""Tests of the scores of right and wrong answers, by greedy decoding and by likelihood."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.data.tokenizers import BytesTokenizer
from mea_jax.errors import UserError
from mea_jax.evaluate import scoring
from mea_jax.evaluate.arithmetic import arithmetic, arithmetic_examples
from mea_jax.evaluate.retrieval import passkey_examples, retrieval, shortest_context
from mea_jax.evaluate.scoring import CachedAnswerer, Encoded, encode, number, score
from mea_jax.evaluate.tasks import Example
from mea_jax.generate.generator import Generator
from tests.helpers import apply_logits, params_of, tiny_model

TOKENIZER = BytesTokenizer()
MODEL = tiny_model(key_components=2, value_components=1)
PARAMS = params_of(MODEL, noise=0.3)


class Stub:
    """A model whose output for each example is `answer` applied to the right answer."""

    def __init__(self, examples, answer):
        self.written = {tuple(e.prompt): answer(e.text) for e in examples}

    def generate(self, prompts, count):
        return [list(self.written[tuple(prompt)].encode())[:count] for prompt in prompts]

    def nats(self, prompts, answers):
        return np.arange(len(prompts), dtype=float)


@pytest.mark.parametrize(
    ("answer", "exact"),
    [
        (lambda text: text, 1.0),
        (lambda text: f"{text}. And so on", 1.0),
        (lambda text: text.strip(), 1.0),
        (lambda text: f" {int(text) + 1}", 0.0),
        (lambda text: f"{text.rstrip()}7", 0.0),  # a longer number
        (lambda text: text.rstrip()[:-1], 0.0),  # a shorter one
        (lambda text: "", 0.0),
        (lambda text: " is" + text, 0.0),
    ],
)
@pytest.mark.parametrize("task", ["passkey", "arithmetic"])
def test_only_the_right_number_counts(task, answer, exact):
    if task == "passkey":
        examples = encode(TOKENIZER, passkey_examples(TOKENIZER, 256, samples=2))
    else:
        examples = encode(TOKENIZER, arithmetic_examples("+", 3, samples=8))
    scores = score(TOKENIZER, examples, Stub(examples, answer))
    found = scoring.summary(scores)
    assert found["exact"] == exact
    assert found["samples"] == len(examples)
    assert found["nats"] == pytest.approx((len(examples) - 1) / 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" 12", "12"), ("\n-3 x", "-3"), ("12.5", "12"), ("x 12", None), ("", None), ("- 3", None)],
)
def test_the_number_that_a_text_begins_with(text, expected):
    assert number(text) == expected


class Merging(BytesTokenizer):
    """A tokenizer with "= " as one token, which joins a prompt's end and an answer's space."""

    def encode_batch(self, texts):
        return [list(text.replace("= ", "~").encode()) for text in texts]


def test_an_answer_is_what_it_adds_to_its_prompt():
    (plain,) = encode(TOKENIZER, [Example("1 + 1 =", " 2\n")])
    assert plain.prompt == [256, *b"1 + 1 ="]
    assert plain.answer == list(b" 2\n")
    (merged,) = encode(Merging(), [Example("1 + 1 =", " 2\n")])
    assert merged == plain


@pytest.mark.slow
def test_nats_through_the_cache_are_those_of_one_forward_pass():
    """The nats agree to 1e-4 in float32, for prompts and answers of five lengths, in 3 batches."""
    rng = np.random.default_rng(0)
    examples = [
        Encoded(rng.integers(0, 256, 5 + 4 * i).tolist(), rng.integers(0, 256, 1 + i).tolist(), "")
        for i in range(5)
    ]
    prompts, answers = [e.prompt for e in examples], [e.answer for e in examples]
    served = CachedAnswerer(Generator(MODEL, PARAMS, length=48), rows=2)
    found = served.nats(prompts, answers)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = np.array([prompt + answer], np.int32)
        inputs = tokens, np.arange(tokens.size, dtype=np.int32)[None], np.ones_like(tokens)
        log_p = jax.nn.log_softmax(apply_logits(MODEL, PARAMS, *map(jnp.asarray, inputs))[0])
        steps = range(len(prompt) - 1, tokens.size - 1)
        expected = -sum(float(log_p[t, tokens[0, t + 1]]) for t in steps)
        assert found[i] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_batches_give_every_example_its_own_tokens():
    served = CachedAnswerer(Generator(MODEL, PARAMS, length=48), rows=2)
    prompts = [[i, i + 1, i + 2] for i in range(5)]
    alone = CachedAnswerer(Generator(MODEL, PARAMS, length=48), rows=1)
    assert served.generate(prompts, 6) == alone.generate(prompts, 6)


@pytest.mark.slow
def test_the_cache_that_is_judged_is_the_one_that_is_asked_for():
    """The nats of an int8 cache differ slightly; if `cache_dtype` were ignored, they would not."""
    kept: dict[str, Any] = {"lengths": [256], "depths": [0.0, 1.0], "samples": 2}
    whole = retrieval(MODEL, PARAMS, TOKENIZER, **kept)
    rounded = retrieval(MODEL, PARAMS, TOKENIZER, cache_dtype="int8", **kept)
    for a, b in zip(whole, rounded, strict=True):
        assert a["nats"] != b["nats"]
        assert a["nats"] == pytest.approx(b["nats"], rel=0.1)


@pytest.mark.slow
def test_contexts_have_their_length_and_their_cells():
    lengths, depths = [200, 333], [0.0, 0.5, 1.0]
    rows = retrieval(MODEL, PARAMS, TOKENIZER, lengths=lengths, depths=depths, samples=2)
    assert [(row["length"], row["depth"]) for row in rows] == [
        (length, depth) for length in lengths for depth in depths
    ]
    for length in lengths:
        examples = encode(TOKENIZER, passkey_examples(TOKENIZER, length, depths, samples=4))
        assert len(examples) == 12
        for e in examples:  # shorter by at most one sentence of filler
            assert length - 100 < len(e.prompt) + len(e.answer) + scoring.MARGIN <= length
    assert rows == retrieval(MODEL, PARAMS, TOKENIZER, lengths=lengths, depths=depths, samples=2)


@pytest.mark.parametrize("needles", [1, 3])
def test_the_shortest_context_is_long_enough(needles):
    length = shortest_context(TOKENIZER, needles)
    assert len(passkey_examples(TOKENIZER, length, samples=10, needles=needles)) == 50
    with pytest.raises(UserError, match=f"length={length // 2} is too short .*: size .* too short"):
        passkey_examples(TOKENIZER, length // 2, needles=needles)


def test_sums_are_scored_by_kind():
    rows = arithmetic(MODEL, PARAMS, TOKENIZER, samples=3)
    assert [(row["operation"], row["digits"]) for row in rows] == [
        (operation, digits) for operation in "+-" for digits in (1, 2, 3)
    ]
    assert all(row["samples"] == 3 for row in rows)
    # An untrained model's digits are as good as any byte: about log 264 = 5.6 nats a token.
    assert all(3 < row["nats"] / (2 + row["digits"]) < 12 for row in rows)
