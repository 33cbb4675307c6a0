"""Tests of pre-tokenizers, which bound pieces only if the text contains long runs."""

import hashlib
import json
import random

import pytest

from mea_jax.config.schema import SourceConfig
from mea_jax.data import pre_tokenizers, sources, tokenizers

LONGEST = pre_tokenizers.LONGEST
RUNS = {"letters": "a", "marks": "\u0301", "signs": "#", "spaces": " ", "tabs": "\t", "lines": "\n"}


def pieces(text, bounded):
    return [piece for piece, _ in pre_tokenizers.splitter(bounded).pre_tokenize_str(text)]


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("length", [1, 2, LONGEST - 1, LONGEST])
def test_runs_up_to_the_bound_are_cut_as_without_it(run, length):
    text = f"a1{run * length}1a"
    assert pieces(text, True) == pieces(text, False)
    watched = pre_tokenizers.LongRunDetector(iter([text]))
    assert list(watched)
    assert not watched.long_runs


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_longer_runs_are_noticed_and_cut(run):
    text = f"a1{run * 10_000}1a"
    watched = pre_tokenizers.LongRunDetector(iter(["first", text, "last"]))
    assert list(watched) == ["first", text, "last"]
    assert watched.long_runs
    # A piece may have a sign or space before its letters, or a line end after its signs.
    assert max(map(len, pieces(text, True))) <= 2 * LONGEST + 2  # bytes: a mark has two
    assert max(map(len, pieces(text, False))) >= 9_999


def test_digits_and_signs_without_space_are_no_long_run():
    watched = pre_tokenizers.LongRunDetector(iter(["abc123+/" * 10_000]))
    assert list(watched)
    assert not watched.long_runs


@pytest.mark.parametrize("letters", ["ACGT", "".join(map(chr, range(0x4E00, 0x4E80)))])
def test_a_line_without_end_trains_and_encodes(letters):
    """200,000 letters without a space take seconds; without the bound they take minutes."""
    text = "".join(random.Random(0).choices(letters, k=200_000))
    tokenizer = tokenizers.train_bpe(iter([text]), 1000)
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()) / 2
    again = tokenizers.HuggingFaceTokenizer(
        tokenizers.hf.Tokenizer.from_str(tokenizer.content.decode()), "the saved one"
    )
    assert again.encode_batch([text]) == [ids]
    # The saved tokenizer contains the bound, so that training and encoding cut in the same places.
    assert (
        f"{{1,{LONGEST}}}"
        in json.loads(tokenizer.content)["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    )


def test_ordinary_text_gives_the_tokenizer_that_it_gave_without_a_bound(monkeypatch):
    texts = [d.text for _, d in zip(range(60), sources.documents(SourceConfig()), strict=False)]
    found = tokenizers.train_bpe(iter(texts), 600)
    splitter = pre_tokenizers.splitter
    monkeypatch.setattr(pre_tokenizers, "splitter", lambda bounded: splitter(False))
    assert tokenizers.train_bpe(iter(texts), 600).content == found.content


def test_the_unbounded_pattern_is_the_one_of_earlier_versions():
    """Tokenizers, and therefore the digests of prepared data, do not change."""
    found = hashlib.sha256(pre_tokenizers._UNBOUNDED.encode()).hexdigest()
    assert found == "caf2f0d944cd1a66cdb5aeccc68bb93b00fbcab8837bf5893577c114bd34777a"
