"""Tests of grids of runs from a config, and of the store of their rows."""

import json
import multiprocessing

import pytest

from mea_jax.errors import UserError
from mea_jax.study.grid import default_study, grid_of
from mea_jax.study.run import parse_shard, without
from mea_jax.study.store import Store
from tests.helpers import assert_one_error
from tests.paths import ROOT

SMALL = {"d_model": 32, "n_layers": 1, "d_ff": 48, "n_heads": 4, "n_kv_heads": 4, "head_dim": 8}


def study(**changes):
    config = default_study()
    config.variants = {"mha": {"model": {"hlc": "none"}}, "mea": {"model": {"hlc": "kv"}}}
    config.sizes = {"s": {"model": SMALL}, "l": {"model": SMALL | {"n_layers": 2}}}
    config.learning_rates, config.horizons, config.seeds = (1e-3, 2e-3), (200, 400), (0, 1)
    config.base.optimizer.warmup_steps = 10
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_cells_are_the_product_of_their_axes():
    grid = grid_of(study(per_size={"l": {"seeds": (7,), "horizons": (200,)}}))
    cells = {(c.variant, c.size, c.steps): c for c in grid.cells}
    assert set(cells) == {
        (variant, size, steps)
        for variant in ("mha", "mea")
        for size, steps in (("s", 200), ("s", 400), ("l", 200))
    }
    assert [(m.seed, m.learning_rate) for m in cells["mea", "s", 400].members] == [
        (0, 1e-3), (0, 2e-3), (1, 1e-3), (1, 2e-3),
    ]  # fmt: skip
    assert [m.seed for m in cells["mea", "l", 200].members] == [7, 7]
    assert cells["mea", "l", 200].config.model.hlc == "kv"
    assert cells["mea", "l", 200].config.model.n_layers == 2
    # Without embeddings: attention, MLP, three norms of the residual, the head norm.
    assert cells["mha", "s", 200].parameters() == 4 * 32 * 32 + 3 * 32 * 48 + 3 * 32 + 8


def test_chunks_hold_each_run_once():
    grid = grid_of(study(at_once=3))
    found = [(str(cell), m) for cell, members in grid.chunks() for m in members]
    assert len(found) == len(set(found)) == 8 * 4
    assert max(len(members) for _, members in grid.chunks()) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": {}}, "config.variants is empty"),
        ({"variants": {"x": {"model": {"hcl": "kv"}}}}, "config.variants.x: unknown config key"),
        ({"learning_rates": ()}, "config.learning_rates must be a list"),
        ({"seeds": (0, 0)}, "contains a value twice"),
        ({"seeds": (0.5,)}, "numbers of type int"),
        ({"per_size": {"xl": {"seeds": (0,)}}}, "sizes l, s"),
        ({"per_size": {"l": {"seed": (0,)}}}, "axes horizons"),
        # errors that name a cell
        ({"variants": {"odd": {"model": {"n_kv_heads": 3}}}}, "cell odd, size l, 200 steps: "),
        ({"learning_rates": (-1.0,)}, "cell mea, size l, 200 steps: "),
    ],
)
def test_impossible_grids_are_one_line(changes, words):
    with pytest.raises(UserError) as caught:
        grid_of(study(**changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "1/0"])
def test_a_shard_is_i_of_n(text):
    with pytest.raises(UserError, match="expected i/n"):
        parse_shard(text)


def test_workers_get_the_command_without_their_own_flags():
    words = ["--config", "x.py", "--workers", "2", "--shard=0/4", "-workers=2", "--list"]
    assert without(words, ("workers", "shard")) == ["--config", "x.py", "--list"]


# -- the store --------------------------------------------------------------------------------


def row(seed=0, loss=3.0, **more):
    about = {"variant": "mha", "size": "s", "steps": 200, "learning_rate": 1e-3, "seed": seed}
    about |= {"parameters": 10**6, "tokens": 10**6}
    return about | {"loss": loss, "diverged": False} | more


def test_a_row_that_a_kill_cut_short_costs_no_other(tmp_path):
    store = Store(tmp_path)
    for seed in range(3):
        store.append(row(seed))
    whole = store.path.read_bytes()
    end = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, end):  # at any point of the last row
        store.path.write_bytes(whole[:-cut])
        assert [r["seed"] for r in store.rows()] == ([0, 1, 2] if cut == 1 else [0, 1])
        store.append(row(3))
        assert [r["seed"] for r in store.rows()] == ([0, 1, 2, 3] if cut == 1 else [0, 1, 3])


def _append(folder, first):
    for seed in range(first, first + 50):
        Store(folder).append(row(seed, curve=[[i, 3.0] for i in range(500)]))


def test_many_processes_append_whole_rows(tmp_path):
    processes = [
        multiprocessing.get_context("fork").Process(target=_append, args=(tmp_path, 50 * i))
        for i in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(r["seed"] for r in Store(tmp_path).rows()) == list(range(200))
    assert all(json.loads(line) for line in Store(tmp_path).path.read_text().splitlines())


def test_the_last_row_of_a_run_counts(tmp_path):
    store = Store(tmp_path)
    store.append(row(0, 3.0))
    store.append(row(0, 2.5))
    assert [r["loss"] for r in store.rows()] == [2.5]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"seed": 1}, "line 2: no variant"),
        (row(1, None), "line 2: loss=None without diverged=true"),
        ([1], "line 2: [1] is not a JSON object"),
        ({k: v for k, v in row(1).items() if k != "steps"}, "line 2: no steps"),
    ],
)
def test_a_row_that_is_no_runs_is_named(tmp_path, bad, words):
    store = Store(tmp_path)
    store.append(row(0))
    store.append(bad)
    with pytest.raises(UserError) as caught:
        store.rows()
    assert words in str(caught.value)


def test_a_store_is_of_one_grid(tmp_path):
    """Axes, variants and sizes may grow and options of execution may change, but nothing else."""
    Store(tmp_path).claim(grid_of(study()).fingerprint)
    more = study(seeds=(5,))
    more.variants.gated = {"model": {"gate": "head"}}
    more.base.data.prefetch = 3
    Store(tmp_path).claim(grid_of(more).fingerprint)
    other = study()
    other.base.optimizer.weight_decay = 0.5
    other.variants.mha = {"model": {"hlc": "none", "head_norm": True}}
    with pytest.raises(UserError) as caught:
        Store(tmp_path).claim(grid_of(other).fingerprint)
    assert "base.optimizer.weight_decay, variants.mha.model.head_norm" in str(caught.value)
    again = study()
    again.variants.gated = {"model": {"gate": "feature"}}
    with pytest.raises(UserError, match=r"variants\.gated\.model\.gate"):
        Store(tmp_path).claim(grid_of(again).fingerprint)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sizes.d128.model.head_dim=31", "the config has no 'head_dim' there: correct the name"),
        ("sizes.d129.model.d_model=64", "no 'd129' there: did you mean 'd192'?"),
        ("base.optimizer.learning_rat=1", "no 'learning_rat' there: did you mean 'learning_rate'?"),
    ],
)
def test_an_override_of_what_is_not_there_is_named(override, words, in_process):
    config = ROOT / "configs" / "lr_study.py"
    status, _, err = in_process(
        "mea_jax.study.run", "--config", config, f"--config.{override}", "--list"
    )
    assert_one_error(status, err, words)
    assert f"--config.{override.split('=')[0]}: " in err
