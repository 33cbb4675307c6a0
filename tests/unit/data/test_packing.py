"""Tests of packing: every target once, documents in separate segments, hardly any padding."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_jax.data import packing

SEPARATOR = 99
# The ids of document d are 1 + 100 d .. 40 + 100 d, so that a token identifies its document.
LENGTHS = st.lists(st.integers(0, 40), max_size=12)


def make(lengths):
    return [[1 + 100 * d + i for i in range(n)] for d, n in enumerate(lengths)]


def pack(documents, length):
    return [packing.fields(*row) for row in packing.rows(documents, length, SEPARATOR)]


@given(lengths=LENGTHS, length=st.integers(1, 17), chunk=st.sampled_from([1, 20, 1 << 18]))
@settings(deadline=None, max_examples=200)
def test_inputs_and_targets_are_those_of_the_documents(lengths, length, chunk):
    documents = make(lengths)
    old, packing._CHUNK = packing._CHUNK, chunk  # the chunk size must not change the result
    try:
        windows = pack(documents, length)
    finally:
        packing._CHUNK = old
    pairs = [
        (int(x), int(y))
        for window in windows
        for x, y, real in zip(
            window["inputs"], window["targets"], window["segment_ids"] > 0, strict=True
        )
        if real
    ]
    expected = [
        pair
        for document in documents
        for pair in zip([SEPARATOR, *document], [*document, SEPARATOR], strict=True)
    ]
    assert pairs == expected


@given(lengths=LENGTHS, length=st.integers(1, 17))
@settings(deadline=None, max_examples=200)
def test_segments_are_one_document_and_positions_restart(lengths, length):
    windows = pack(make(lengths), length)
    for number, window in enumerate(windows):
        for array in window.values():
            assert array.shape == (length,)
            assert array.dtype == np.int32
        ids = window["segment_ids"]
        real = int(np.count_nonzero(ids))
        if number < len(windows) - 1:
            assert real == length  # padding only in the last window
        assert real > 0
        assert all((array[real:] == 0).all() for array in window.values())
        assert ids[0] == 1
        assert set(np.diff(ids[:real])) <= {0, 1}
        for segment in range(1, ids.max() + 1):
            (where,) = np.nonzero(ids == segment)
            np.testing.assert_array_equal(window["positions"][where], np.arange(len(where)))
            tokens = {*window["inputs"][where], *window["targets"][where]} - {SEPARATOR}
            assert len({(int(token) - 1) // 100 for token in tokens}) <= 1
            # A separator ends its segment, so that no later token attends to it.
            assert SEPARATOR not in window["targets"][where[:-1]]


def test_one_window_by_hand():
    (first, second) = pack([[11, 12], [], [13, 14, 15, 16]], 6)
    np.testing.assert_array_equal(first["inputs"], [99, 11, 12, 99, 99, 13])
    np.testing.assert_array_equal(first["targets"], [11, 12, 99, 99, 13, 14])
    np.testing.assert_array_equal(first["segment_ids"], [1, 1, 1, 2, 3, 3])
    np.testing.assert_array_equal(first["positions"], [0, 1, 2, 0, 0, 1])
    np.testing.assert_array_equal(second["inputs"], [14, 15, 16, 0, 0, 0])
    np.testing.assert_array_equal(second["targets"], [15, 16, 99, 0, 0, 0])
    np.testing.assert_array_equal(second["segment_ids"], [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(second["positions"], [0, 1, 2, 0, 0, 0])


def test_a_document_may_hold_the_separator_itself():
    (window,) = pack([[5, SEPARATOR, 6]], 4)
    np.testing.assert_array_equal(window["segment_ids"], [1, 1, 1, 1])
    np.testing.assert_array_equal(window["positions"], [0, 1, 2, 3])


def test_waste_is_at_most_one_window():
    rng = np.random.default_rng(0)
    documents = [list(range(1, n)) for n in rng.integers(2, 2000, 300)]
    windows = list(packing.rows(documents, 256, SEPARATOR))
    real = sum(np.count_nonzero(ids) for _, ids in windows)
    assert real == sum(len(document) + 1 for document in documents)
    assert len(windows) == -(-real // 256)


def test_fields_of_a_batch_are_those_of_its_windows():
    stored = list(packing.rows(make([5, 30, 2, 9]), 8, SEPARATOR))
    batch = packing.fields(*(np.stack(arrays) for arrays in zip(*stored, strict=True)))
    for row, window in enumerate(pack(make([5, 30, 2, 9]), 8)):
        for name, array in window.items():
            np.testing.assert_array_equal(batch[name][row], array)
