"""Tests of prefix trees and their packing: the tokens that a request sees, and the padding."""

import numpy as np
import pytest

from mea_jax.evaluate.harness import prefix_trees
from mea_jax.evaluate.harness.prefix_trees import Request, build_trees, fill, plan


def multiple_choice(rng, count, context, answer, choices=4, before=()):
    """Return `choices` requests for each of `count` questions; all begin with `before`."""
    found = []
    for _ in range(count):
        question = [*before, *rng.integers(0, 50, rng.integers(*context)).tolist()]
        for _ in range(choices):
            new = rng.integers(0, 50, rng.integers(*answer)).tolist()
            found.append(Request((question + new)[:-1], new))
    return found


def seen(tree, place):
    """Return the tokens that position `place` of a tree sees, by the rule of `tree_attention`."""
    return [tree.tokens_n[s] for s in range(place + 1) if place < tree.reach_n[s]]


@pytest.mark.parametrize("branches", [True, False])
def test_every_scored_token_follows_exactly_its_request(branches):
    rng = np.random.default_rng(0)
    requests = multiple_choice(rng, 20, (2, 30), (1, 6), before=[7] * 12)
    requests += [requests[3], Request([1, 2, 3], [3]), Request([1, 2, 3, 4], [4, 9])]
    trees = build_trees(requests, 150, branches)
    found = set()
    for tree in trees:
        assert tree.size <= 150
        for number, entries in tree.scored:
            request, n = requests[number], len(requests[number].targets)
            assert [tree.targets_m[i] for i in entries] == list(request.targets)
            for i, end in zip(
                entries, range(len(request.tokens) - n, len(request.tokens)), strict=True
            ):
                place = tree.places_m[i]
                assert seen(tree, place) == request.tokens[: end + 1]
                assert tree.positions_n[place] == end
            found.add(number)
        if not branches:  # a single path: attention within segments is enough
            assert (tree.reach_n == tree.size).all()
            assert (tree.positions_n == np.arange(tree.size)).all()
    assert found == set(range(len(requests)))


def test_what_requests_share_is_computed_once():
    rng = np.random.default_rng(1)
    requests = multiple_choice(rng, 8, (20, 30), (3, 6), before=[7] * 40)
    prefixes = {tuple(r.tokens[:n]) for r in requests for n in range(1, len(r.tokens) + 1)}
    (tree,) = build_trees(requests, 10_000)
    assert tree.size == len(prefixes)


def test_no_row_overflows_and_no_tree_is_lost():
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 700, 300).tolist()
    planned = plan(sizes, capacity=512, width=128, budget=4096, batch_shards=4)
    members = [i for rows in planned for row in rows.rows for i in row]
    assert sorted(members) == list(range(300))
    for rows in planned:
        assert rows.size % 4 == 0
        assert all(sum(sizes[i] for i in row) <= rows.length for row in rows.rows)
        assert sum(len(rows.batch(n)) for n in range(rows.batches)) == len(rows.rows)


def test_small_ones_fill_gaps_and_open_no_rows():
    assert fill([60, 50, 45, 9], 100, opening=20) == ([[0, 3], [1, 2]], [])
    assert fill([60, 50, 9, 9, 9], 64, opening=20) == ([[0], [1, 2]], [3, 4])


MIXES = {
    "endings of four (hellaswag)": lambda rng: multiple_choice(rng, 150, (20, 110), (8, 40)),
    "two long answers (piqa)": lambda rng: multiple_choice(rng, 200, (5, 30), (10, 60), 2),
    "letters after solved ones (mmlu)": lambda rng: multiple_choice(
        rng, 60, (40, 300), (1, 2), before=[7] * 600
    ),
    "a last word (lambada)": lambda rng: multiple_choice(rng, 300, (60, 120), (1, 3), 1),
    "lognormal": lambda rng: [
        Request(rng.integers(0, 50, size).tolist(), [1])
        for size in np.clip(rng.lognormal(5, 0.8, 400), 5, 2000).astype(int)
    ],
    "windows of one length": lambda rng: [
        Request(rng.integers(0, 50, 600).tolist(), [1]) for _ in range(90)
    ],
}


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_nine_tenths_of_what_is_computed_is_real(mix, branches):
    """At least 90% is real, counting the padding of rows and of the last batch.

    There are at most 4 shapes; each is compiled once.
    """
    requests = MIXES[mix](np.random.default_rng(3))
    trees = build_trees(requests, 1024, branches)
    planned = plan([t.size for t in trees], capacity=1024, width=256, budget=4096)
    real = sum(tree.size for tree in trees)
    assert real >= 0.9 * sum(rows.computed for rows in planned)
    assert len(planned) <= 4
    asked = sum(len(request.tokens) for request in requests)
    if branches and "solved" in mix:
        assert real < asked / 8
    if branches and "four" in mix:
        assert real < asked / 2


def test_layouts_say_the_same_of_a_tree_of_one_path():
    requests = [Request([1, 2, 3], [4]), Request([5, 6], [7])]
    trees = build_trees(requests, 100)
    args = ([[0, 1], []], trees, 8, 2)
    tokens, positions, reach, starts = prefix_trees.batch_arrays(*args, branches=True)
    assert tokens[0].tolist() == [1, 2, 3, 5, 6, 0, 0, 0]
    assert positions[0].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert reach[0].tolist() == [3, 3, 3, 5, 5, 0, 0, 0]
    segments = prefix_trees.batch_arrays(*args, branches=False)[2]
    assert segments[0].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert not tokens[1].any()
    assert [(row, start) for row, start, _ in starts] == [(0, 0), (0, 3)]
