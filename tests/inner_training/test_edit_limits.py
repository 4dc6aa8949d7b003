"""When the structure of a run may be edited: the table of levers, limits, rest, budget, and refusals in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import MismatchError, RangeError, UnknownNameError, UserError
from trimtab.inner_training.edit_limits import EditLimits
from trimtab.inner_training.edits import EDITS, EditConfig, UnitCounts, check_targets, movable
from trimtab.inner_training.guard import Guard, GuardConfig, Reason
from trimtab.inner_training.guard_config import REASON_WORDS, in_words
from trimtab.inner_training.levers import LEVERS, resolve_levers
from trimtab.inner_training.steering import Steering

DOCS = Path(__file__).parents[2] / "docs"
SIZES = np.array([10, 30])


def counts(*active: tuple[int, int], minimum: tuple[int, int] = (1, 1)) -> UnitCounts:
    found = np.array(active)
    return UnitCounts(found, np.tile(SIZES, (len(found), 1)), np.tile(np.array(minimum), (len(found), 1)))


def permitted(
    action: float, units: UnitCounts, *, name: str = "width", aimed: bool = False, **config: object
) -> tuple[float, int]:
    limits = EditLimits(EditConfig(**config), 1)  # type: ignore[arg-type]
    share, reasons = limits.permit(name, np.array([action]), aimed, units, np.zeros(1, dtype=np.int64))
    return float(share[0]), int(reasons[0])


@pytest.mark.parametrize("name", EDITS)
def test_every_lever_has_a_row(name: str) -> None:
    one = EDITS[name]
    row = f"| `{name}` | {one.doc} | {one.moves} | {one.targets or 'none'} | {one.source} |"
    assert row in (DOCS / "levers.md").read_text()
    assert name not in LEVERS and one.name == name and (one.low, one.high, one.rate) == (1, 1, 1)


def test_levers_of_both_tables_are_found_by_name() -> None:
    assert movable(("width", "lr")) == (EDITS["width"], LEVERS["lr"])
    with pytest.raises(UnknownNameError, match="unknown lever 'widht'; did you mean 'width'"):
        movable(["widht"])
    check_targets("a policy", "width", "targets")
    with pytest.raises(MismatchError, match="mine gives targets for 'reset', which has no position; give moves"):
        check_targets("mine", "reset", "targets")


def test_reasons_are_powers_of_two_that_arrays_hold() -> None:
    assert set(REASON_WORDS) == set(Reason) - {Reason.NONE}
    assert all(value.bit_count() == 1 for value in Reason if value) and max(Reason) < 2**62
    held = np.where(np.ones(1, dtype=bool), max(Reason), 0)
    assert held.dtype == np.int64 and in_words(int(held[0])) == REASON_WORDS[max(Reason)]


# Action, active units, settings -> share, reason.
CASES: list[tuple[float, tuple[int, int], dict[str, object], float, int]] = [
    (0.0, (5, 15), {}, 0.0, 0),
    (0.05, (5, 15), {}, 0.0, Reason.SMALL),
    (-0.05, (5, 15), {}, 0.0, Reason.SMALL),
    (1.0, (5, 15), {}, 0.1, 0),
    (-0.5, (5, 15), {}, -0.05, 0),
    (-0.5, (5, 15), {"most": 0.4}, -0.2, 0),
    (2.0, (5, 15), {}, 0.1, Reason.RATE),
    (np.nan, (5, 15), {}, 0.0, Reason.NOT_FINITE),
    (-1.0, (1, 4), {}, -0.025, Reason.NARROWEST),
    (-1.0, (1, 4), {"least": 0.11}, 0.0, Reason.NARROWEST),  # 0.6 of a unit may go
    (-1.0, (1, 3), {}, 0.0, Reason.NARROWEST),
    (1.0, (10, 28), {}, 0.05, Reason.WIDEST),
    (1.0, (10, 30), {}, 0.0, Reason.WIDEST),
    (1.0, (5, 15), {"most_active": 0.55}, 0.05, Reason.WIDEST),
    (1.0, (5, 15), {"most": 0.01}, 0.0, Reason.NO_UNIT),
    (-1.0, (5, 15), {"most": 0.01}, 0.0, Reason.NO_UNIT),
    (1.0, (0, 0), {"least": 0.0}, 0.1, 0),
]


@pytest.mark.parametrize(("action", "active", "config", "share", "reason"), CASES, ids=str)
def test_moves(action: float, active: tuple[int, int], config: dict[str, object], share: float, reason: int) -> None:
    found = permitted(action, counts(active), **config)
    assert found == (pytest.approx(share), reason)


TARGETS: list[tuple[float, tuple[int, int], dict[str, object], float, int]] = [
    (0.5, (5, 15), {}, 0.0, 0),
    (0.5 + 1e-7, (5, 15), {}, 0.0, 0),
    (0.51, (5, 15), {}, 0.0, 0),  # 0.4 of a unit: no nearer
    (0.53, (5, 15), {}, 0.03, 0),
    (0.9, (5, 15), {"most": 0.01}, 0.4, 0),  # a schedule is exact
    (0.2, (5, 15), {}, -0.3, 0),
    (0.0, (5, 15), {}, -0.4, Reason.NARROWEST),
    (1.0, (5, 15), {"most_active": 0.75}, 0.25, Reason.WIDEST),
    (np.inf, (5, 15), {}, 0.0, Reason.NOT_FINITE),
]


@pytest.mark.parametrize(("action", "active", "config", "share", "reason"), TARGETS, ids=str)
def test_targets(action: float, active: tuple[int, int], config: dict[str, object], share: float, reason: int) -> None:
    found = permitted(action, counts(active), aimed=True, **config)
    assert found == (pytest.approx(share), reason)


def test_resets_take_a_share_of_the_active_units() -> None:
    half = counts((5, 15))
    assert permitted(1.0, half, name="reset") == (0.1, 0)
    assert permitted(-1.0, half, name="reset") == (0.0, 0)
    assert permitted(0.2, half, name="reset") == (0.0, Reason.NO_UNIT)
    assert permitted(1.0, counts((10, 30)), name="reset") == (0.1, 0)


def slow_pruned(share: float, active: list[int], minimum: list[int], scope: str) -> int:
    """Units that go, one at a time."""
    spare = [max(a - m, 0) for a, m in zip(active, minimum, strict=True)]
    if scope == "global":
        return min(int(np.round(share * SIZES.sum())), sum(spare))
    of_active = min(share * SIZES.sum() / max(sum(active), 1), 1.0)
    return sum(min(int(np.round(of_active * a)), s) for a, s in zip(active, spare, strict=True))


@settings(max_examples=80, deadline=None)
@given(
    share=st.floats(0, 1),
    active=st.tuples(st.integers(0, 10), st.integers(0, 30)),
    minimum=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    scope=st.sampled_from(["global", "layer"]),
)
def test_counts_equal_slow_ones(share: float, active: tuple[int, int], minimum: tuple[int, int], scope: str) -> None:
    units = counts(active, minimum=minimum)
    assert units.pruned(np.array([share]), scope)[0] == slow_pruned(share, list(active), list(minimum), scope)
    born = sum(min(int(np.round(share * u)), u - a) for u, a in zip(SIZES, active, strict=True))
    assert units.grown(np.array([share]))[0] == born
    assert units.share[0] == pytest.approx(sum(active) / 40) and units.known[0]


@settings(max_examples=80, deadline=None)
@given(
    action=st.floats(-1, 1),
    active=st.tuples(st.integers(1, 10), st.integers(1, 30)),
    limits=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    aimed=st.booleans(),
)
def test_limits_hold_to_the_unit(action: float, active: tuple[int, int], limits: list[float], aimed: bool) -> None:
    units, (least, most_active) = counts(active), limits
    share, _ = permitted(
        abs(action) if aimed else action, units, aimed=aimed, least=least, most_active=most_active, most=1.0
    )
    if share > 0:
        assert (sum(active) + units.grown(np.array([share]))[0]) / 40 <= most_active + 1e-6
    elif share < 0:
        assert (sum(active) - units.pruned(np.array([-share]), "global")[0]) / 40 >= least - 1e-6


def test_runs_without_units_are_left_alone() -> None:
    none = UnitCounts(*(np.zeros((1, 2), dtype=np.int64) for _ in range(3)))
    for aimed, null in ((False, 0.0), (True, 1.0)):
        assert permitted(null, none, aimed=aimed) == (0.0, 0)
        assert permitted(0.5, none, aimed=aimed) == (0.0, Reason.UNAVAILABLE)
    assert np.isnan(none.share).all() and not none.known.any()


def test_rest_and_budget() -> None:
    limits, units, free = EditLimits(EditConfig(rest=2, budget=2), 2), counts((5, 15), (5, 15)), np.zeros(2, int)
    both, first = np.array([1.0, 1.0]), np.array([1.0, 0.0])
    assert limits.permit("width", first, False, units, free)[0].tolist() == [0.1, 0.0]
    assert limits.left.tolist() == [0.5, 1.0] and limits.resting.tolist() == [1.0, 0.0]
    share, reasons = limits.permit("reset", both, False, units, free)  # the same decision: the rest is for all levers
    assert share.tolist() == [0.0, 0.1] and reasons.tolist() == [Reason.RESTING, 0]
    limits.pass_on(np.zeros(2, dtype=bool))
    assert limits.permit("width", both, False, units, free)[1].tolist() == [Reason.RESTING] * 2
    limits.pass_on(np.zeros(2, dtype=bool))
    assert limits.permit("width", -both, False, units, free)[0].tolist() == [-0.1, -0.1]
    for _ in range(5):
        limits.pass_on(np.zeros(2, dtype=bool))
    share, reasons = limits.permit("width", both, False, units, free)
    assert not share.any() and reasons.tolist() == [Reason.EDITS_SPENT] * 2
    assert "budget of structural edits is spent" in in_words(int(reasons[0]))
    limits.reset(np.array([True, False]))
    assert limits.permit("width", both, False, units, free)[0].tolist() == [0.1, 0.0]
    assert EditLimits(EditConfig(budget=0), 1).left.tolist() == [0.0]


def test_the_guard_refuses_while_it_tries_after_rollbacks_and_in_lost_runs() -> None:
    guard = Guard(GuardConfig(aftermath=2), resolve_levers(["lr"]), 4, EditConfig())
    guard.trying[0], guard.moderation.shaken[1], guard.divergence.lost[2] = True, 1, True
    share, reasons = guard.permit_edit("width", np.ones(4), False, counts(*[(5, 15)] * 4))
    assert share.tolist() == [0, 0, 0, 0.1]
    assert reasons.tolist() == [Reason.TRYING, Reason.EDIT_AFTERMATH, Reason.LOST, 0]
    assert guard.edits is not None and guard.edits.done.tolist() == [0, 0, 0, 1]
    again = Guard(GuardConfig(aftermath=2), resolve_levers(["lr"]), 4, EditConfig())
    again.load_state_dict(guard.state_dict())
    assert again.edits is not None and again.edits.rest.tolist() == [0, 0, 0, 5]
    guard.reset(np.ones(4, dtype=bool))
    assert not guard.edits.done.any()


def test_without_structure_a_lever_is_unavailable() -> None:
    steering = Steering(resolve_levers(["lr"]), (), GuardConfig(), 2)
    steering.reset(np.ones(2, dtype=bool), {"lr": np.ones(2)})
    move = steering.decide(np.array([[0.1, 0.5], [0.1, 1.0]]), {"lr": "moves", "width": "targets"})
    assert move.edits["width"].tolist() == [0, 0]
    assert move.edit_reasons["width"].tolist() == [Reason.UNAVAILABLE, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"criterion": "agff"}, "unknown criterion 'agff'; did you mean 'agf'"),
        ({"growth": "pair"}, "unknown growth method 'pair'"),
        ({"newborn_state": "fresh-step"}, "unknown newborn state 'fresh-step'"),
        ({"scope": "net"}, "unknown scope 'net'"),
        ({"most": 0}, "most is 0"),
        ({"start": 0}, "start is 0"),
        ({"rest": -1}, "rest is -1"),
        ({"least": 0.6, "most_active": 0.5}, "least is 0.6 and most_active 0.5"),
    ],
)
def test_settings_that_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EditConfig(**config)  # type: ignore[arg-type]
    with pytest.raises((RangeError, UnknownNameError)):
        EditConfig(**config)  # type: ignore[arg-type]
