"""Which changes helped: made-up audits with known answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.policies.audits import decision, outcome, validation, write
from trimtab.agents.audit_changes import FEWEST, Kind, Made, changes_of, effect_of, mean_interval, size_of
from trimtab.agents.audit_compare import compare_audits, size_label
from trimtab.agents.audit_page import to_page
from trimtab.errors import UserError
from trimtab.policies.audit_chain import load_trace

DOWN = Kind("lr", "down", "large", "plateau")


def series(changes: Sequence[float | str], **fields: Any) -> list[dict[str, Any]]:
    return [outcome(10 * (number + 2), change, **fields) for number, change in enumerate(changes)]


FALLS = [-0.2, -0.3, -0.25, -0.1, -0.2, -0.3, -0.25, -0.1, -0.2, -0.3]
RISES = [0.2, 0.3, 0.25, 0.1, 0.2, 0.3, 0.25, 0.1]


def test_a_change_that_helped_in_one_and_hurt_in_the_other_is_found(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", series(FALLS))
    b = write(tmp_path / "b.jsonl", series(RISES))
    comparison = compare_audits(a, b)
    [row] = comparison.rows
    assert row.kind == DOWN and row.a is not None and row.b is not None
    assert (row.a.count, row.a.known, row.a.undone, row.a.verdict) == (10, 10, 0, "helped")
    assert (row.b.count, row.b.known, row.b.undone, row.b.verdict) == (8, 8, 0, "hurt")
    assert row.a.loss.estimate == pytest.approx(-0.22) and row.b.loss.estimate == pytest.approx(0.2125)
    assert comparison.regressions == (row,)
    assert comparison.text() == "lr down, large, by plateau: helped in a, hurt in b"
    assert compare_audits(b, a).text() == "lr down, large, by plateau: helped in b, hurt in a"
    same = compare_audits(a, a)
    assert not same.regressions
    assert same.text() == "no kind of change helped in one and hurt in the other (1 could be judged in both)"


def test_kinds_are_told_apart_by_lever_direction_size_and_cause(tmp_path: Path) -> None:
    lines = [
        outcome(20, -0.1, 1.0, 0.95),
        outcome(30, -0.1, 1.0, 0.8),
        outcome(40, -0.1, 1.0, 2.0),
        outcome(50, -0.1, changed={"lr": [1.0, 0.5], "momentum": [1.0, 1.2]}),
        outcome(60, -0.1, changed={}, fired=["rollback"], cause="rewind"),
        outcome(70, 0.1, cause="guard"),
        outcome(80, 0.1, changed={"lr": [1.0, 0.0]}),
    ]
    a = write(tmp_path / "a.jsonl", lines)
    rows = {row.kind: row for row in compare_audits(a, a).rows}
    counts = {kind.text(): row.a.count for kind, row in rows.items() if row.a is not None}
    assert counts == {
        "lr down, large, by any": 3,
        "lr down, large, by guard": 1,
        "lr down, large, by plateau": 2,
        "lr down, moderate, by plateau": 1,
        "lr down, slight, by plateau": 1,
        "lr up, large, by plateau": 1,
        "momentum up, moderate, by plateau": 1,
        "rollback fires, by rewind": 1,
    }


def test_policies_with_other_causes_meet_in_the_row_of_any_cause(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", series(FALLS, cause="plateau"))
    b = write(tmp_path / "b.jsonl", series(RISES, cause="policy"))
    comparison = compare_audits(a, b)
    assert [(row.kind.cause, row.a is not None, row.b is not None) for row in comparison.rows] == [
        ("any", True, True),
        ("plateau", True, False),
        ("policy", False, True),
    ]
    assert [row.kind.cause for row in comparison.regressions] == ["any"]


def test_what_is_usual_is_taken_off(tmp_path: Path) -> None:
    """A loss that falls anyway falls after any change."""
    a = write(tmp_path / "a.jsonl", series(FALLS, ln_loss_usual=-0.5))
    [row] = compare_audits(a, a).rows
    assert row.a is not None
    assert row.a.loss.high < 0 and row.a.against_usual.low > 0 and row.a.verdict == "hurt"


@pytest.mark.parametrize(
    ("changes", "fields", "verdict"),
    [
        (FALLS[: FEWEST - 1], {}, "too few"),
        (FALLS[:FEWEST], {}, "helped"),
        ([-0.2, 0.2] * 5, {}, "unclear"),
        (["nan"] * 20, {}, "too few"),
        (["nan"] * FEWEST, {"undone": True}, "hurt"),
        (["nan"] * (FEWEST - 1), {"undone": True}, "too few"),
        ([*FALLS[:FEWEST], "nan", "inf"], {}, "helped"),
    ],
)
def test_the_verdict(tmp_path: Path, changes: list[float | str], fields: dict[str, Any], verdict: str) -> None:
    a = write(tmp_path / "a.jsonl", series(changes, **fields))
    [row] = compare_audits(a, a).rows
    assert row.a is not None and row.a.verdict == verdict
    assert row.a.known == sum(isinstance(change, float) for change in changes)


def test_the_interval_is_students() -> None:
    values = np.random.default_rng(0).normal(0.1, 0.3, 12)
    low, high = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    assert mean_interval([*values, math.nan]) == pytest.approx((values.mean(), low, high))
    assert mean_interval([]).high == math.inf and math.isnan(mean_interval([]).estimate)


def test_several_audits_of_a_project_are_grouped_by_model_size_and_data(tmp_path: Path) -> None:
    a = [
        write(tmp_path / "a1.jsonl", series(FALLS), model_parameters=2_500_000, data="digits"),
        write(tmp_path / "a2.jsonl", series(FALLS), model_parameters=9_000_000, data="digits"),
        write(tmp_path / "a3.jsonl", series(RISES), model_parameters=None, parameters=40_000, data=None),
    ]
    comparison = compare_audits(a, write(tmp_path / "b.jsonl", series(RISES)))
    told = [(one.side, one.size, one.data, one.effect.count, one.effect.verdict) for one in comparison.groups]
    assert told == [
        ("a", "10k to 100k", "", 8, "hurt"),
        ("a", "1M to 10M", "digits", 20, "helped"),
        ("b", "1M to 10M", "digits", 8, "hurt"),
    ]
    assert comparison.rows[0].a is not None and comparison.rows[0].a.count == 28
    assert comparison.notes[2] == "a: a3.jsonl, policy plateau, 40,000 parameters, data not said."


def test_only_what_comes_before_a_break_counts(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", series(FALLS))
    lines = a.read_bytes().splitlines(keepends=True)
    a.write_bytes(b"".join([*lines[:5], lines[5].replace(b"-0.2,", b"-9.2,"), *lines[6:]]))
    comparison = compare_audits(a, a)
    assert comparison.rows[0].a is not None and comparison.rows[0].a.count == 4
    assert "the chain breaks at line 6 of 11" in comparison.notes[1] and "left out" in comparison.notes[1]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", series(FALLS))
    advice = write(tmp_path / "advice.jsonl", series(FALLS), mode="advise")
    with pytest.raises(UserError, match="'advice.jsonl' is of mode 'advise', in which nothing is changed"):
        compare_audits(a, advice)
    with pytest.raises(UserError, match="no audit was given"):
        compare_audits(a, [])
    with pytest.raises(UserError, match="cannot be read"):
        compare_audits(a, tmp_path / "none.jsonl")


def test_of_a_run_that_went_on_from_advice_to_action_the_action_counts(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", series(FALLS))
    when = {"step": 500, "time": "2025-01-01T00:01:00Z"}
    turn = {"kind": "resumed", **when}, {"kind": "mode", **when, "before": "advise", "mode": "act"}
    later = [{**line, "step": line["step"] + 500} for line in series(FALLS)]
    both = write(tmp_path / "both.jsonl", [*series(RISES), *turn, *later], mode="advise")
    alone, mixed = compare_audits(a, a).rows, compare_audits(a, both).rows
    assert [(row.kind, row.b and row.b.count) for row in mixed] == [(row.kind, row.b and row.b.count) for row in alone]
    page = to_page(load_trace(both))
    assert "mode advise, then act:" in page and "would have changed something or changed something" in page
    assert "from here on in mode act" in page


@pytest.mark.parametrize(
    ("parameters", "label"),
    [
        (0, ""),
        (None, ""),
        ("many", ""),
        (1, "1 to 10"),
        (999, "100 to 1k"),
        (1000, "1k to 10k"),
        (7 * 10**10, "10G to 100G"),
    ],
)
def test_sizes_of_models(parameters: object, label: str) -> None:
    assert size_label(parameters) == label


def test_sizes_of_changes() -> None:
    assert [size_of(1.0, after) for after in (1.05, 1.2, 2.0, 0.95, 0.5, 0.0)] == [
        "slight", "moderate", "large", "slight", "large", "large"
    ]  # fmt: skip


# --- following the lines ------------------------------------------------------------------------------------------


def test_a_validation_judges_every_change_since_the_one_before_and_counts_once() -> None:
    lines = [
        outcome(20, -0.1),
        validation(20, None, "nan"),
        outcome(30, -0.1, decided_at=20),
        outcome(40, -0.1, decided_at=30),
        validation(40, 20, 0.4),
        outcome(50, -0.1, decided_at=40),
    ]
    made = changes_of(lines).made
    assert [one.span for one in made] == [None, (40, 0.4), (40, 0.4), None]
    effect = effect_of(made)
    assert effect.validation.estimate == 0.4 and effect.validation.high == math.inf, "one stretch, not two"


def test_intervals_without_a_change_are_counted_apart() -> None:
    lines = [
        decision(0, None),
        decision(10, -0.5),
        decision(20, -0.6),
        decision(30, "nan"),
        decision(40, -1.0, changed={"lr": [1.0, 0.5]}),
        outcome(50, -0.2, decided_at=40),
        decision(50, -1.2),
        decision(60, -1.3),
    ]
    assert changes_of(lines).held == pytest.approx([-0.1, -0.4, -0.1])


def test_what_was_given_up_at_a_resume_is_followed_no_further() -> None:
    lines = [
        decision(10, -0.5),
        validation(10, None, "nan"),
        decision(20, -0.6),
        outcome(30, -0.1, decided_at=20),
        decision(30, -0.7),
        {"kind": "resumed", "step": 20, "time": "", "torn": 0, "differs": {}},
        decision(30, -0.9),
        validation(30, 10, -0.3),
    ]
    found = changes_of(lines)
    assert found.held == pytest.approx([-0.1, -0.3]) and found.made[0].span is None


def test_what_the_guard_takes_back_later_is_undone() -> None:
    lines = [outcome(20, 0.3), outcome(30, 0.1, changed={"momentum": [1.0, 0.9]}), decision(40, 0.0, undone=["lr"])]
    assert [(one.kind.lever, one.undone) for one in changes_of(lines).made] == [("lr", True), ("momentum", False)]


def test_effects_of_nothing() -> None:
    made = Made(step=0, kind=DOWN, ln_loss_change=math.nan, against_usual=math.nan, undone=False)
    effect = effect_of([made])
    assert (effect.count, effect.known, effect.verdict) == (1, 0, "too few")
