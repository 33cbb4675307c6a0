"""Packing of documents into windows of equal length.

All documents form one stream, with a separator before each and one at the end:

    sep a1 a2 a3 sep b1 b2 sep ...

A window of T positions is a stretch of T + 1 tokens of the stream: `inputs` are all but the last,
`targets` all but the first. So each document has inputs [sep, t1..tn] and targets [t1..tn, sep].
A document cut at the end of a window continues in the next one, whose first input is the last
target of the window before; every target occurs exactly once. Padding exists only at the end of the
last window. Attention must not cross documents: `segment_ids` separates them.

If a tokenizer has a beginning-of-text and an end-of-text token, `sep` is the beginning, and each
document already contains the end as its last token.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_CHUNK = 1 << 18  # tokens collected before they are cut into windows


def rows(
    documents: Iterable[Sequence[int]], length: int, separator: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield windows in the compact form that is stored; `fields` computes the other arrays.

    Args:
      documents: token ids of each document, without separators.
      length: T, positions of a window.
      separator: the id before each document and at the end.

    Yields:
      tokens: int32 (T + 1,), the inputs and, shifted by one, the targets; 0 for padding.
      segment_ids: int32 (T,), 1, 2, .. for the documents in the window, 0 for padding.
    """
    pieces: list[np.ndarray] = []  # of the stream, in order
    begins: list[int] = []  # offsets in the pieces of the separators before documents
    size = 0
    for document in documents:
        begins.append(size)
        pieces += [np.array([separator], np.int32), np.asarray(document, np.int32)]
        size += 1 + len(document)
        if size > max(_CHUNK, length):
            stream = np.concatenate(pieces)
            count = (size - 1) // length
            yield from _cut(stream, begins, count, length)
            kept = count * length  # the last target is the first input of the next window
            pieces, begins = [stream[kept:]], [begin - kept for begin in begins if begin >= kept]
            size -= kept
    if not pieces:
        return
    stream = np.concatenate([*pieces, np.array([separator], np.int32)])
    count = -(-size // length)
    padding = count * length - size
    stream = np.pad(stream, (0, padding))
    for number, (tokens, segment_ids) in enumerate(_cut(stream, begins, count, length), start=1):
        if number == count:
            segment_ids[length - padding :] = 0
        yield tokens, segment_ids


def _cut(
    stream: np.ndarray, begins: list[int], count: int, length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the first `count` windows of `stream`, whose documents begin at `begins`."""
    first = np.zeros((count, length), np.int32)
    first.flat[[begin for begin in begins if begin < count * length]] = 1
    first[:, 0] = 1  # a document that continues from the window before is a new segment
    segment_ids = np.cumsum(first, axis=1, dtype=np.int32)
    for window in range(count):
        start = window * length
        yield stream[start : start + length + 1], segment_ids[window]


def fields(tokens: np.ndarray, segment_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays that a training step reads, of one window or of a batch of windows.

    Args:
      tokens: int32 (..., T + 1), as `rows` yields them.
      segment_ids: int32 (..., T).

    Returns:
      Arrays int32 (..., T): `inputs`, `targets`, `segment_ids`, and `positions`, which start at 0
      in each segment. All are 0 for padding.
    """
    length = segment_ids.shape[-1]
    real = segment_ids > 0
    index = np.arange(length, dtype=np.int32)
    begins = np.zeros(segment_ids.shape, bool)
    begins[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    start = np.maximum.accumulate(np.where(begins, index, 0), axis=-1)
    return {
        "inputs": tokens[..., :-1] * real,  # the last target is at the first position of padding
        "targets": tokens[..., 1:],
        "segment_ids": segment_ids,
        "positions": (index - start).astype(np.int32) * real,
    }
