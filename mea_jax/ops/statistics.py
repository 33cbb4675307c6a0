"""Statistics of sums over documents."""

from math import sqrt

import numpy as np


def ratio_of_sums(nats_U: np.ndarray, tokens_U: np.ndarray) -> tuple[float, float]:
    """Return nats per token and its standard error as a ratio of sums.

    The sums run over independent units: documents, or batches. The error is nan for a single unit
    with tokens, and both are nan without tokens.
    """
    total, count = tokens_U.sum(), int((tokens_U > 0).sum())
    if not total:
        return float("nan"), float("nan")
    mean = nats_U.sum() / total
    if count < 2:
        return float(mean), float("nan")
    squares = ((nats_U - mean * tokens_U) ** 2).sum()
    return float(mean), float(sqrt(count / (count - 1) * squares) / total)
