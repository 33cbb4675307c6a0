"""A small sample of the JSON-lines and tokenizer files of `tests.campaigns.fuzz`."""

from hypothesis import HealthCheck, example, given, settings

from tests.campaigns.fuzz import data, tokenizers

# Found by long campaigns: the library panics when it reads the first, and when it encodes with the
# second.
PANICS = [
    b'{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "ABQAAAEAAAACAAAA"}, ',
    b'{"pre_tokenizer": {"type": "FixedLength", "length": 0}, ',
]
REST = b'"model": {"type": "BPE", "vocab": {"</s>": 0, "a": 1}, "merges": []}}'


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=data.STRATEGY)
@example(file=data.Example(".jsonl", b"\n".join(data.ODD_LINES)))
@example(file=data.Example(".jsonl.gz", data.compress(".jsonl.gz", b"{}" * 500)[:-9]))
@example(file=data.Example(".jsonl.zst", data.compress(".jsonl.zst", b"{}" * 500)[:-9]))
def test_json_lines_give_documents_or_one_line(file, tmp_path):
    assert data.check(file, tmp_path) in ("documents", "refused: one line", "refused: no text")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=tokenizers.STRATEGY)
@example(file=tokenizers.Example("tokenizer.json", PANICS[0] + REST))
@example(file=tokenizers.Example("tokenizer.json", PANICS[1] + REST))
def test_a_tokenizer_file_works_or_gives_one_line(file, tmp_path):
    assert tokenizers.check(file, tmp_path) in ("works", "refused: one line")
