"""Which units are due to begin anew: every rule against a slow one, and what each of them promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.inner_training.structure.slow_maintenance import Slow
from trimtab.errors import MismatchError, RangeError, UnknownNameError, UserError
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.maintenance import MAINTENANCE
from trimtab.inner_training.structure.resetter import Resetter, unit_methods

UNITS, POSITIONS = 6, 2
QUICK: dict[str, dict[str, float]] = {
    "redo": {"threshold": 0.4, "every": 7, "window": 3},
    "grama": {"threshold": 0.5, "every": 5, "window": 5},
    "continual-backprop": {"rate": 0.03, "maturity": 8, "decay": 0.9},
    "random-reset": {"rate": 0.05, "maturity": 4},
    "self-normalised": {"percentile": 0.8, "factor": 1.5, "first": 4, "longest": 9, "window": 25},
}
Step = tuple[Evidence, tuple[Tensor, ...]]


def trajectory(seed: int, steps: int, runs: tuple[int, ...] = (), still: bool = False) -> list[Step]:
    """Units of different sizes and habits, some of which come and go."""
    rng = torch.Generator().manual_seed(seed)
    habit = torch.rand((*runs, UNITS), generator=rng)
    alive = torch.ones((*runs, UNITS), dtype=torch.bool)
    found = []
    for _ in range(steps):
        flips = torch.rand((*runs, UNITS), generator=rng) < (0.0 if still else 0.02)
        alive = alive ^ flips
        noise = torch.randn((*runs, 5, UNITS, POSITIONS), generator=rng)
        loud = (torch.rand((*runs, 1, UNITS, 1), generator=rng) < habit[..., None, :, None]).float()
        outputs = ((noise + habit[..., None, :, None]).relu() * loud).split([1, 1], -1)
        sizes = torch.cat([one.abs().mean(-1) for one in outputs], -2).mean(-2)
        fields = {
            "weights_in": torch.randn((*runs, UNITS, 3), generator=rng),
            "weights_out": torch.randn((*runs, UNITS, 4), generator=rng),
            "pre_grad": torch.rand((*runs, UNITS), generator=rng) * habit**2,
        }
        found.append((Evidence(alive=alive.clone(), mean_abs=sizes, batches=1, **fields), tuple(outputs)))
    return found


def plainly(step: Step) -> dict[str, Any]:
    evidence, outputs = step
    return {
        "alive": evidence.live.tolist(),
        "outputs": torch.cat(outputs, -1).tolist(),
        "rows": evidence.read("weights_in").tolist(),
        "columns": evidence.read("weights_out").tolist(),
        "slopes": evidence.read("pre_grad").tolist(),
    }


def numbers(mask: Tensor) -> set[int]:
    return set(mask.nonzero()[:, 0].tolist())


def make(name: str, shape: tuple[int, ...] = (UNITS,), **options: Any) -> Resetter:
    return Resetter(name, shape, positions=POSITIONS, settings=QUICK[name], **options)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", [name for name in unit_methods() if name != "random-reset"])
def test_every_rule_against_a_slow_one(name: str, seed: int) -> None:
    fast, slow, total = make(name), Slow(name, UNITS, QUICK[name]), 0
    for place, step in enumerate(trajectory(seed, 150)):
        fast.observe(*step)
        assert numbers(fast.due) == slow.step(plainly(step)), place
        total += int(fast.due.sum())
        if place % 40 == 39:  # somebody else resets a unit
            fast.renew(torch.arange(UNITS) == 2)
            slow.renew({2})
        if place % 3:  # and now and then nobody acts
            fast.renew()
            slow.renew(set(slow.due))
        if name == "continual-backprop":
            assert fast.means is not None
            expected = torch.tensor([one or [0.0] * POSITIONS for one in slow.means()])
            torch.testing.assert_close(fast.means, expected, rtol=1e-4, atol=1e-6)
        if name == "self-normalised":
            assert fast.memory["threshold"].tolist() == [unit.threshold for unit in slow.units]
    assert total > 3


@pytest.mark.parametrize("name", unit_methods())
def test_runs_side_by_side_are_runs_one_by_one(name: str) -> None:
    runs = (2, 3)
    steps = trajectory(0, 80, runs)
    seeds = torch.arange(6).view(runs)
    together = make(name, (*runs, UNITS), seeds=seeds)
    alone = {(i, j): make(name, seeds=int(seeds[i, j])) for i in range(2) for j in range(3)}
    seen = 0
    for place, (evidence, outputs) in enumerate(steps):
        if place == 30:
            together.restart(torch.tensor([[False, True, False], [False, False, False]]))
            alone[0, 1] = make(name, seeds=1)
        together.observe(evidence, outputs)
        for at, one in alone.items():
            fields: dict[str, Any] = {key: value[at] for key, value in evidence.given().items()}
            one.observe(Evidence(**fields), tuple(value[at] for value in outputs))
            assert torch.equal(together.due[at], one.due)
            seen += int(one.due.sum())
            one.renew()
        together.renew()
    assert seen > 10


def test_each_run_may_have_settings_of_its_own() -> None:
    evidence = Evidence(mean_abs=torch.tensor([[1.0, 0.2, 1.0], [1.0, 0.2, 1.0]]))
    found = Resetter("redo", (2, 3), every=1, window=1, threshold=torch.tensor([0.1, 0.5]))
    found.observe(evidence)
    assert found.due.tolist() == [[False, False, False], [False, True, False]]
    with pytest.raises(MismatchError, match=r"threshold has the shape \(3,\); give one number, or the shape \(2,\)"):
        Resetter("redo", (2, 3), threshold=torch.tensor([0.1, 0.5, 0.5]))


@pytest.mark.parametrize("name", unit_methods())
def test_saved_and_gone_on(name: str) -> None:
    steps = trajectory(1, 90)
    whole, first, second = make(name, seeds=5), make(name, seeds=5), make(name)
    for place, step in enumerate(steps):
        if place == 40:
            second.load_state_dict(first.state_dict())
        for one in (whole, first if place < 40 else second):
            one.observe(*step)
            one.renew() if place % 2 else None
        assert torch.equal(whole.due, (first if place < 40 else second).due)
    with pytest.raises(MismatchError, match="has .* here"):
        second.load_state_dict(Resetter(name, (UNITS + 1,)).state_dict())


@pytest.mark.parametrize("name", unit_methods())
def test_only_active_units_are_due(name: str) -> None:
    found = make(name)
    for evidence, outputs in trajectory(2, 100):
        found.observe(evidence, outputs)
        assert not (found.due & ~evidence.live).any()
        found.renew()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rate=st.floats(0.001, 0.9), maturity=st.integers(0, 20))
@pytest.mark.parametrize("name", ["continual-backprop", "random-reset"])
def test_replacement_keeps_its_rate_and_its_best(name: str, seed: int, rate: float, maturity: int) -> None:
    """As many as the rate times the mature units; never a young one; never the best of the mature ones."""
    found = Resetter(name, (UNITS,), positions=POSITIONS, seeds=seed, rate=rate, maturity=maturity)
    earned, replaced = 0, 0
    for evidence, outputs in trajectory(seed, 60, still=True):
        ages = found.memory["age"] + 1
        found.observe(evidence, outputs)
        mature = ages > maturity
        earned += int(mature.sum())
        assert not (found.due & ~mature).any()
        assert not mature.any() or bool((mature & ~found.due).any())
        if name == "continual-backprop" and found.due.any():
            worth = found.memory["worth"] / (1 - 0.99**ages)
            assert worth[found.due].max() <= worth[mature & ~found.due].min() * (1 + 1e-5)
        replaced += int(found.due.sum())
        found.renew()
        assert replaced <= rate * earned + 1e-6
    if rate < 0.1 and maturity < 5:
        assert rate * earned - 1 < replaced  # the rest of a credit is all that is missing


def test_the_rate_is_met_exactly_in_the_long_run() -> None:
    found = Resetter("random-reset", (4, 10), rate=0.0007, maturity=0, seeds=torch.arange(4))
    alive, total, where = Evidence(alive=torch.ones(4, 10, dtype=torch.bool)), 0, torch.zeros(4, 10)
    for _ in range(6000):
        found.observe(alive)
        total += int(found.due.sum())
        where += found.due
        found.renew()
    # A unit does not count in the first of its steps, so each replacement costs nothing but itself: 6000 x 10 x 0.0007.
    assert total == 4 * 42  # 6000 x 10 x 0.0007 in each run
    assert (where > 0).all() and where.max() < 15


def test_random_resets_depend_on_the_seed() -> None:
    steps = trajectory(3, 60, still=True)

    def history(seed: int) -> list[list[bool]]:
        found, rows = make("random-reset", seeds=seed), []
        for step in steps:
            found.observe(*step)
            rows.append(found.due.tolist())
            found.renew()
        return rows

    assert history(1) == history(1) != history(2)


def test_a_dead_layer_is_reset_and_a_solved_one_is_not() -> None:
    dead = Resetter("redo", (3,), every=1, window=1)
    dead.observe(Evidence(mean_abs=torch.zeros(3)))
    assert dead.due.all()
    solved = Resetter("grama", (3,), every=1, window=1)
    solved.observe(Evidence(pre_grad=torch.zeros(3)))
    assert not solved.due.any()
    solved.observe(Evidence(pre_grad=torch.tensor([0.0, 1.0, torch.nan])))
    assert not solved.due.any()  # nothing is known of a layer with a NaN


def test_a_unit_of_steady_silences_is_left_alone() -> None:
    """A unit that fires every sixth step never crosses its threshold, once it is known; one that stops does."""
    found = Resetter("self-normalised", (2,), first=20, longest=50, window=60)
    due_at = []
    for step in range(200):
        fires = torch.tensor([step % 6 == 0, step % 6 == 0 and step < 130], dtype=torch.float32)
        found.observe(Evidence(alive=torch.ones(2, dtype=torch.bool)), (fires.view(1, 2, 1),))
        due_at += [(step, unit) for unit in numbers(found.due)]
        found.renew()
    assert due_at[0] == (126 + 6, 1) and all(unit == 1 for _, unit in due_at)
    assert found.memory["threshold"][0] == 6  # one more than its silences of five steps


def test_a_unit_without_a_record_keeps_its_threshold() -> None:
    found = Resetter("self-normalised", (1,), first=30, longest=50, window=5)
    for _ in range(29):
        found.observe(Evidence(alive=torch.ones(1, dtype=torch.bool)), (torch.zeros(1, 1, 1),))
    assert not found.due.any() and found.memory["threshold"].item() == 30


def test_newly_matured_units_are_judged_by_corrected_averages() -> None:
    """The same outputs give the same utility at any age; a running average without correction would favour the old."""
    found = Resetter("continual-backprop", (3,), rate=0.2, maturity=3)
    ones = torch.ones(3, 1)
    for step in range(60):
        h = torch.tensor([1.0, -1.0]).view(2, 1, 1) * torch.tensor([1.0, 1.1, 1.2]).view(1, 3, 1)
        if step == 40:
            found.renew(torch.tensor([False, False, True]))
        found.observe(Evidence(weights_in=ones, weights_out=ones), (h,))
        assert not found.due[2]
        found.renew(found.due & torch.tensor([True, False, False]))


def test_bad_settings_and_bad_evidence() -> None:
    with pytest.raises(UnknownNameError, match="unknown maintenance of units 'rodo'; did you mean 'redo'"):
        Resetter("rodo", (3,))
    with pytest.raises(UnknownNameError, match="unknown maintenance of units 'l2-init'"):
        Resetter("l2-init", (3,))
    with pytest.raises(UnknownNameError, match="unknown setting of redo 'tau'; .*allowed: threshold, every, window"):
        Resetter("redo", (3,), tau=0.1)
    with pytest.raises(UserError, match="window is 10, more than the steps between checks"):
        Resetter("redo", (3,), every=5)
    with pytest.raises(UserError, match="first is 100, more than the longest silence"):
        Resetter("self-normalised", (3,), longest=50)
    with pytest.raises(MismatchError, match=r"reads outputs \(..., P, U, k\) of units \(3,\), and was given \[\]"):
        Resetter("self-normalised", (3,)).observe(Evidence(alive=torch.ones(3, dtype=torch.bool)))
    with pytest.raises(MismatchError, match="2 positions of each unit; there are 1"):
        Resetter("continual-backprop", (3,)).observe(Evidence(alive=torch.ones(3) > 0), (torch.ones(4, 3, 2),))
    with pytest.raises(MismatchError, match=r"the evidence is of units \(4,\); these are \(3,\)"):
        Resetter("redo", (3,)).observe(Evidence(mean_abs=torch.ones(4)))
    with pytest.raises(MismatchError, match="'pre_grad' was not gathered"):
        Resetter("grama", (3,), every=1, window=1).observe(Evidence(mean_abs=torch.ones(3)))


@pytest.mark.parametrize("name", MAINTENANCE)
def test_settings_out_of_range_are_refused(name: str) -> None:
    from trimtab.inner_training.structure.maintenance import checked_settings

    for setting in MAINTENANCE[name].settings:
        assert setting.low <= setting.default <= setting.high
        for wrong in (setting.low - 1, setting.high * 2 + 1, float("nan"), True):
            with pytest.raises(RangeError, match=f"{setting.name} of {name} is "):
                checked_settings(MAINTENANCE[name], {setting.name: wrong})
        if setting.whole:
            with pytest.raises(RangeError, match="it must be a whole number"):
                checked_settings(MAINTENANCE[name], {setting.name: setting.low + 0.5})
        with pytest.raises(UserError, match=f"{setting.name} of {name} is 'much'; give a number between"):
            checked_settings(MAINTENANCE[name], {setting.name: "much"})
