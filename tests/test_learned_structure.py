"""Learned structure against rules: policies side by side, and heights at equal work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from experiments.learned_structure.__main__ import tables_of
from experiments.learned_structure.arms import LEVELS, RULES, rule_arms
from experiments.learned_structure.changing import compared, difference, interval
from experiments.learned_structure.changing import tables_of as tables_of_resets
from experiments.learned_structure.measure import Played, at_equal_work, frontier, over_families
from experiments.learned_structure.together import Together, Without
from experiments.pages import filled

from trimtab.errors import MismatchError
from trimtab.policies.registry import load_policy

BUNDLES = Path(__file__).parents[1] / "experiments" / "learned_structure" / "bundles"


def test_together_is_each_by_itself() -> None:
    parts = [load_policy("grow-steps"), load_policy("cosine")]
    both = Together("both", parts)
    assert both.levers == {"width": "targets", "lr": "targets"}
    rng, state, states = np.random.default_rng(0), both.init(5), [part.init(5) for part in parts]
    for _ in range(6):
        seen = rng.uniform(0, 1, (5, len(both.signals))).astype(np.float32)
        found, state = both.act(seen, state)
        for place, part in enumerate(parts):
            columns = [both.signals.index(name) for name in part.signals]
            alone, states[place] = part.act(seen[:, columns], states[place])
            assert (found[:, place] == alone[:, 0]).all()


def test_two_policies_of_one_lever_are_refused() -> None:
    with pytest.raises(MismatchError, match="lr"):
        Together("twice", [load_policy("cosine"), load_policy("constant")])


def test_every_rule_has_every_size() -> None:
    arms = rule_arms("default")
    assert [(arm.name, arm.level) for arm in arms] == [
        (f"{rule} + default", level) for rule in RULES for level in LEVELS
    ]
    assert all("lr" in arm.policy.levers for arm in arms)


def test_frontier_is_the_line_between_sizes() -> None:
    rng = np.random.default_rng(1)
    works, heights, at = rng.uniform(0, 1, (50, 4)), rng.normal(size=(50, 4)), rng.uniform(-0.2, 1.2, 50)
    slow = []
    for work, height, where in zip(works, heights, at, strict=True):
        order = np.argsort(work)
        slow.append(np.interp(where, work[order], height[order]))
    assert frontier(works, heights, at) == pytest.approx(slow)


def sizes(rng: np.random.Generator, runs: int, gain: float) -> tuple[Played, list[Played]]:
    """A policy that is lower by ``gain`` than a rule whose height falls by 1 over all work, on runs that differ much."""
    hard = rng.normal(0, 3, runs)
    rule = [Played(np.full(runs, level), hard - level + rng.normal(0, 0.1, runs)) for level in (0.2, 0.5, 1.0)]
    work = rng.uniform(0.2, 0.8, runs)
    return Played(work, hard - work - gain + rng.normal(0, 0.1, runs)), rule


@pytest.mark.parametrize("gain", [-0.3, 0.0, 0.3])
def test_difference_at_equal_work(gain: float) -> None:
    policy, rule = sizes(np.random.default_rng(2), 200, gain)
    found, samples = at_equal_work(policy, rule, np.random.default_rng(0))
    assert found.low < -gain < found.high and found.within
    assert found.high - found.low < 0.06
    together = over_families([samples, samples])
    assert together == pytest.approx((found.estimate, found.low, found.high))


def test_work_beyond_the_sizes_is_told() -> None:
    policy, rule = sizes(np.random.default_rng(3), 50, 0.0)
    found, _ = at_equal_work(Played(policy.work + 2, policy.height), rule, np.random.default_rng(0))
    assert not found.within


def test_the_page_shows_the_figures() -> None:
    docs = Path(__file__).parents[1] / "docs"
    text = (docs / "learned_structure.md").read_text()
    content = json.loads((docs / "results" / "learned_structure.json").read_text())
    tables = tables_of(content)
    assert all(f"<!-- table: {name} -->" in text for name in tables)
    assert filled(text, tables) == text
    assert len(content["differences"]["joint"]) == 3 * len(RULES)


def test_a_policy_without_a_lever_says_the_rest() -> None:
    policy = load_policy(str(BUNDLES / "changing"))
    less = Without(policy, "reset")
    assert list(less.levers) == [name for name in policy.levers if name != "reset"]
    seen = np.random.default_rng(0).uniform(-1, 1, (4, len(policy.signals))).astype(np.float32)
    both, _ = policy.act(seen, policy.init(4))
    rest, _ = less.act(seen, less.init(4))
    np.testing.assert_array_equal(rest, np.delete(both, list(policy.levers).index("reset"), axis=1))


def test_differences_are_paired_by_run() -> None:
    rng = np.random.default_rng(0)
    hard, noise = rng.normal(size=200), rng.normal(scale=0.01, size=200)
    samples = difference(hard - 0.1 + noise, hard, np.random.default_rng(1))
    middle, low, high = interval(samples)
    assert middle == pytest.approx(-0.1, abs=0.005) and -0.11 < low < middle < high < -0.09
    heights = {"a": {"joint": hard - 0.1, "rule": hard}, "b": {"joint": hard + 0.3, "rule": hard}}
    found = compared(heights, "joint", 0)["rule"]
    assert found["a"][0] == -0.1 and found["b"][0] == 0.3 and found["all"][0] == 0.1


def test_the_page_shows_the_figures_of_resets() -> None:
    docs = Path(__file__).parents[1] / "docs"
    text = (docs / "learned_structure.md").read_text()
    tables = tables_of_resets(json.loads((docs / "results" / "learned_resets.json").read_text()))
    assert all(f"<!-- table: {name} -->" in text for name in tables)
    assert filled(text, tables) == text
