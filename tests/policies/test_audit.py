"""The audit trail: what it says of each decision, and that it can be read after a crash."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.policies.live import ALL, Loop, Scripted, sgd

from trimtab.errors import OutputExistsError, UserError
from trimtab.policies.attach import attach
from trimtab.policies.audit import Audit, read_audit, rounded


def audited(path: Path, policy: Scripted, **options: object) -> Loop:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=policy, audit=path, **options)  # type: ignore[arg-type]
    return loop


def test_every_decision_is_told_with_what_was_seen_proposed_applied_and_why(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    table = [[1.0, 0.0], [0.5, 3.0], [math.nan, -0.25]]
    levers = {"lr": "targets", "momentum": "moves"}
    policy = Scripted(table, levers=levers, signals=("time", "loss_slope", "rolled_back"))  # type: ignore[arg-type]
    loop = audited(path, policy, total_steps=100)
    for step in range(20):
        loop.step(spoil=math.inf if step == 17 else None)
    header, *lines = read_audit(path)
    assert header["kind"] == "header" and header["trimtab"] and header["torch"] == torch.__version__
    told = {key: header[key] for key in ("policy", "optimizer", "parameters", "levers", "total_steps", "decide_every")}
    assert told == {
        "policy": "scripted",
        "optimizer": "SGD",
        "parameters": 49,
        "levers": levers,
        "total_steps": 100,
        "decide_every": 5,
    }
    decisions = [line for line in lines if line["kind"] == "decision"]
    assert [line["step"] for line in decisions] == [0, 5, 10, 15, 20]
    for line, seen in zip(decisions, policy.seen[1:], strict=True):  # the first one seen was the trial's
        assert list(line["signals"]) == list(policy.signals)
        np.testing.assert_allclose(list(line["signals"].values()), seen[0], rtol=1e-5)
    first, second, third, _, last = decisions
    assert first["proposed"] == {"lr": 1.0, "momentum": 0.0} and first["reason"] == "the policy holds"
    assert second["proposed"] == {"lr": 0.5, "momentum": 3.0}
    assert second["applied"] == {"lr": 0.5, "momentum": pytest.approx(math.exp(0.3), rel=1e-5)}
    assert second["reason"] == "moved by the policy; the proposed move was larger than the rate limit allows"
    assert third["proposed"] == {"lr": "nan", "momentum": -0.25} and third["applied"]["lr"] == 0.5
    assert "not a finite number" in third["reason"]
    assert last["rolled_back"] and "diverged" in last["reason"] and last["applied"]["lr"] == 0.5
    assert not any(line["rolled_back"] for line in decisions[:-1])


def test_outcomes_are_measured_over_the_interval_after_a_change(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    loop = audited(path, Scripted([[1.0], [0.5], [0.5], [0.25]])).run(20)
    outcomes = [line for line in read_audit(path) if line["kind"] == "outcome"]
    assert [(line["decided_at"], line["step"]) for line in outcomes] == [(5, 10), (15, 20)]
    for line in outcomes:
        at = line["decided_at"]
        expected = np.log(np.mean(loop.losses[at : at + 5])) - np.log(np.mean(loop.losses[at - 5 : at]))
        assert line["ln_loss_change"] == pytest.approx(expected, rel=1e-4)


def test_advice_is_told_beside_the_identity(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    policy = Scripted([[-1.0, 0.0, 0.0, 0.0]], levers=dict(ALL))  # type: ignore[arg-type]
    loop = audited(path, policy, mode="advise").run(5)
    line = read_audit(path)[-1]
    assert line["advised"]["lr"] == pytest.approx(math.exp(-1), rel=1e-5)
    assert line["applied"] == dict.fromkeys(ALL, 1.0)
    assert loop.controller is not None
    loop.controller.detach()
    assert read_audit(path)[-1] == {"kind": "detached", "step": 5}


def test_a_policy_that_failed_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    audited(path, Scripted([[0.5]], fail_at=1)).run(5)
    line = read_audit(path)[-1]
    assert line["proposed"] == {} and line["applied"] == {"lr": 0.5}
    assert line["reason"] == "the policy raised an error, so every lever holds"


def test_each_line_is_on_the_disk_before_training_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    loop = audited(path, Scripted([[0.5]]))
    for step in range(1, 16):
        loop.step()
        assert path.read_text().count('"kind": "decision"') == 1 + step // 5
        assert path.read_text().endswith("}\n")


def test_a_full_disk_does_not_stop_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    loop = audited(path, Scripted([[0.5]]))
    path.unlink()
    path.mkdir()  # writing fails from here on
    loop.run(20)
    assert loop.decisions[-1].applied == {"lr": 0.5}
    assert len(caplog.records) == 1 and "the audit failed" in caplog.text


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("mine")
    with pytest.raises(OutputExistsError, match="exists and is not overwritten; give another path"):
        audited(path, Scripted([[0.5]]))
    with pytest.raises(OutputExistsError, match="exists already"):
        Audit(path, {})
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        audited(tmp_path / "missing" / "run.jsonl", Scripted([[0.5]]))
    assert path.read_text() == "mine"


@given(cut=st.integers(min_value=1, max_value=400))
def test_a_torn_last_line_is_left_out(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "run.jsonl"
    audit = Audit(path, {"policy": "cosine"})
    for step in range(5):
        audit.write("decision", step=step, reason="é" * 10)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    kept = path.read_bytes().count(b"\n")
    entries = read_audit(path)
    expected = [json.loads(line) for line in whole.splitlines()]
    assert entries == expected[: len(entries)]
    assert len(entries) in (kept, kept + 1)  # a line that lacks only its end is whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"kind": "header"}\n{"kind": \n{"kind": "decision"}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_audit(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_audit(tmp_path / "none.jsonl")


@given(st.floats())
def test_numbers_keep_six_digits_and_stay_json(value: float) -> None:
    kept = json.loads(json.dumps(rounded(value), allow_nan=False))
    assert math.isnan(value) or float(kept) == pytest.approx(value, rel=5e-6, abs=1e-320)
