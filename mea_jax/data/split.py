"""The division of a source into training and held-out text.

The hash of a document's name decides, so that the split does not change when documents are added.
If this holds out a fraction of the bytes that is far from the configured one (one file, few
documents, very different sizes), the split is made by size instead. Documents longer than the
entire held-out share are then cut, and their last part is held out. Of the other documents, those
with the lowest hashes are held out until their share is reached. The decision depends only on the
documents and the fraction.
"""

import array
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mea_jax.config.schema import DataConfig
from mea_jax.data import sources
from mea_jax.data.bad_input import LeftOut
from mea_jax.data.corpus import Corpus, Document, unit_hash

# Larger sources, in bytes, are not measured: a single line or row cannot unbalance them.
MEASURED = 8 << 30
_FACTOR = 4  # largest accepted ratio between the configured and the actual fraction of bytes


@dataclass(frozen=True)
class Split:
    """A division of a source's documents into training and held-out text.

    Attributes:
      fraction: the held-out part of each document that is cut.
      threshold: other documents are held out if the hash of their name is below this.
      longest: longer documents, in bytes, are cut; None cuts no document.
    """

    fraction: float
    threshold: float
    longest: int | None = None

    def parts(self, document: Document) -> tuple[str, str]:
        """Return the training text and the held-out text of `document`; one may be empty."""
        text = document.text
        if self.longest is not None and len(text.encode()) > self.longest:
            at = _cut(text, self.fraction)
            return text[:at], text[at:]
        return ("", text) if unit_hash(document.name) < self.threshold else (text, "")

    @property
    def by_names(self) -> bool:
        """True if the hashes alone decide, with the configured fraction as threshold."""
        return self.longest is None and self.threshold == self.fraction


NOTHING, EVERYTHING = Split(0.0, 0.0), Split(1.0, 1.0)


def has_held_out(config: DataConfig) -> bool:
    """Return whether the config requires held-out text."""
    return config.held_out_fraction > 0 or any(source.held_out for source in config.sources)


def is_balanced(held_out: float, total: float, fraction: float) -> bool:
    """Return whether `held_out` bytes are close enough to `fraction` of `total` bytes."""
    if fraction in (0, 1):
        return True
    train, least = total - held_out, fraction / _FACTOR
    enough = held_out >= least * total and train >= (1 - fraction) / _FACTOR * total
    return enough and 0 < held_out <= _FACTOR * fraction * total


def is_current(config: DataConfig, corpus: Corpus, held_out: int, train: int) -> bool:
    """Return whether data of an older version, with these bytes, is split as `decide` would."""
    measured = corpus.size <= MEASURED or corpus.document_sizes() is not None
    return not measured or is_balanced(held_out, held_out + train, config.held_out_fraction)


def decide(
    config: DataConfig, corpus: Corpus, on_progress: Callable[[int], Any] = lambda size: None
) -> Split:
    """Return the split of one of the config's sources.

    Args:
      config: the data options.
      corpus: the opened source.
      on_progress: called with the bytes of each document, if documents must be read for this.

    Raises:
      UserError: a document cannot be read.
    """
    if corpus.source.held_out:
        return EVERYTHING
    # If a source is marked as held-out, the others are for training.
    fraction = 0.0 if any(s.held_out for s in config.sources) else config.held_out_fraction
    if fraction == 0:
        return NOTHING
    skip = config.bad_input == "skip"
    known = None if skip else corpus.document_sizes()  # the sizes of unreadable files do not count
    if known is None and corpus.size > MEASURED:
        return Split(fraction, fraction)
    sizes, hashes = array.array("q"), array.array("d")
    if known is not None:
        sizes.extend(known.values())
        hashes.extend(map(unit_hash, known))
    else:
        for document in sources.documents(corpus.source, LeftOut(skip)):
            sizes.append(len(document.text.encode()))
            hashes.append(unit_hash(document.name))
            on_progress(sizes[-1])
    return _decide(np.array(sizes), np.array(hashes), fraction)


def _decide(sizes: np.ndarray, hashes: np.ndarray, fraction: float) -> Split:
    """Return the split of documents of these `sizes` in bytes."""
    total = int(sizes.sum())
    if not total or is_balanced(sizes[hashes < fraction].sum(), total, fraction):
        return Split(fraction, fraction)
    longest = math.ceil(fraction * total)
    whole = sizes <= longest
    sizes, hashes = sizes[whole], hashes[whole]
    order = np.argsort(hashes, kind="stable")
    sums = np.cumsum(sizes[order])
    if not len(order):
        return Split(fraction, 0.0, longest)
    last = np.searchsorted(sums, fraction * sums[-1])
    threshold = float(np.nextafter(hashes[order[last]], 2))  # includes all copies of the document
    if whole.all() and (hashes < threshold).all():
        return Split(fraction, 0.0, 0)  # all copies of one document, for example
    return Split(fraction, threshold, longest)


def _cut(text: str, fraction: float) -> int:
    """Return the index of the last `fraction` of `text`, at the start of a line if one is near."""
    at = max(min(round(len(text) * (1 - fraction)), len(text) - 1), 1)
    near = text.rfind("\n", at - (len(text) - at) // 2, at) + 1
    return near or at
