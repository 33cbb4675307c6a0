"""The division of bytes between layers, keys and values."""

import numpy as np
import pytest

from mea_jax.compress import bits, rates
from mea_jax.compress.budgets import POSITIONS
from mea_jax.compress.probe import Sensitivity
from mea_jax.config.schema import Side
from mea_jax.errors import UserError
from mea_jax.model.heads import digits
from mea_jax.ops.slots import Layout


def sides(costs, slots=24, seed=0):
    """Return divisions, and divergences that are `costs` times the lost energy."""
    rng = np.random.default_rng(seed)
    divisions = [bits.Division(np.exp(rng.normal(0, 2, slots))) for _ in costs]
    measured = []
    for number, (division, cost) in enumerate(zip(divisions, costs, strict=True)):
        lost = [division.lost(point * slots) for point in rates.POINTS]
        side = list(Side)[number % 2]
        measured.append(Sensitivity(number // 2, side, lost, [cost * share for share in lost]))
    return divisions, measured


def test_a_divergence_proportional_to_lost_energy_is_predicted_exactly():
    for division, one in zip(*sides([0.3, 5.0]), strict=True):
        cost = one.losses[0] / one.residuals[0]
        wanted = [cost * division.lost(total) for total in division.fitting]
        np.testing.assert_allclose(rates.predicted(division, one), wanted, rtol=1e-6)


def test_measured_points_are_met_and_the_prediction_never_rises():
    (division,), _ = sides([1.0])
    places = (2, 8, 14)
    lost = [division.lost(division.fitting[place]) for place in places]
    measured = Sensitivity(0, Side.KEY, lost, [0.5, 0.02, 0.003])
    found = np.asarray(rates.predicted(division, measured))
    assert found[list(places)] == pytest.approx(measured.losses, rel=1e-6)
    assert (np.diff(found) <= 1e-12).all()


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.125])
def test_the_room_is_filled_and_dear_sides_get_more(keep):
    divisions, measured = sides([0.01, 0.01, 1.0, 0.01])
    losses = [rates.predicted(*pair) for pair in zip(divisions, measured, strict=True)]
    rows = rates.divide(divisions, losses, keep)
    stored = sum(Layout(digits(row)).bytes for row in rows)
    fixed = 4 * bits.fixed_bytes(24) / POSITIONS
    room = keep * 2 * 4 * 24
    assert room - 1 - fixed <= stored + 1e-9 <= room - fixed + 1
    assert stored + fixed <= room
    if keep < 0.5:
        dear = sum(digits(rows[2]))
        assert all(dear > sum(digits(row)) for row in rows[:2] + rows[3:])


def test_no_other_division_of_two_sides_loses_less():
    divisions, measured = sides([0.1, 2.0], slots=8)
    losses = [rates.predicted(*pair) for pair in zip(divisions, measured, strict=True)]
    rows = rates.divide(divisions, losses, 0.25)
    sizes = [Layout(digits(row)).bytes for row in rows]
    found = sum(loss[size - 1] for loss, size in zip(losses, sizes, strict=True))
    total = int((0.25 * 2 * 16 * POSITIONS - 2 * bits.fixed_bytes(8)) // POSITIONS)
    every = [
        losses[0][a - 1] + losses[1][b - 1]
        for a in range(1, 9)
        for b in range(1, 9)
        if a + b <= total
    ]
    assert found <= min(every) + 1e-12


def test_too_little_room():
    divisions, measured = sides([1.0] * 4)
    with pytest.raises(UserError, match=r"--keep=0\.001 leaves no bit of 96 slots"):
        rates.divide(divisions, [[1.0] * 24 for _ in measured], 0.001)
