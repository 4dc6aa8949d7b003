"""The audit of a live run: what it says of each decision, what came of each change, and that nothing stops the training."""

from __future__ import annotations

import errno
import getpass
import json
import logging
import math
import os
import platform
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.policies.live import ALL, Loop, Scripted, adamw, sgd
from tests.policies.made_up import learned

import trimtab
from trimtab.agents.audit_changes import changes_of
from trimtab.errors import OutputExistsError, UserError
from trimtab.inner_training.guard import GuardConfig, Reason, in_words
from trimtab.policies import audit as writing
from trimtab.policies.attach import attach
from trimtab.policies.audit import AuditFile, read_audit, rounded, verify_audit
from trimtab.policies.audit_chain import load_trace
from trimtab.policies.audit_format import LINES, OPTIONAL, fits
from trimtab.policies.identity import options_of


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
    last = read_audit(path)[-1]
    assert last["kind"] == "detached" and last["step"] == 5


def test_a_policy_that_failed_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    audited(path, Scripted([[0.5]], fail_at=1)).run(5)
    line = read_audit(path)[-1]
    assert line["proposed"] == {} and line["applied"] == {"lr": 0.5}
    assert line["reason"] == in_words(Reason.FAULT)


def test_each_line_is_on_the_disk_before_training_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    loop = audited(path, Scripted([[0.5]]))
    for step in range(1, 16):
        loop.step()
        assert path.read_text().count('"kind": "decision"') == 1 + step // 5
        assert path.read_text().endswith("}\n")


def test_an_audit_that_was_removed_does_not_stop_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    loop = audited(path, Scripted([[0.5]]))
    path.unlink()
    loop.run(20)
    assert not path.exists(), "a file without a header would be none"
    assert loop.decisions[-1].applied == {"lr": 0.5}
    assert len(caplog.records) == 1 and "the audit failed" in caplog.text


def test_a_full_disk_is_one_warning_and_the_lost_lines_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "run.jsonl", os.write
    loop = audited(path, Scripted([[0.5], [0.25]], signals=("started",))).run(5)

    def full(file: int, content: bytes) -> int:
        if len(content) <= 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, content[: len(content) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(writing.os, "write", full)
        loop.run(10)
        verdict = verify_audit(path)
        assert verdict.holds and verdict.torn > 0
    loop.run(5)
    assert loop.decisions[-1].applied == {"lr": 0.25}
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    assert verify_audit(path).holds and verify_audit(path).torn == 0
    kinds = [line["kind"] for line in read_audit(path)]
    assert kinds == ["header", "decision", "decision", "lost", "decision"]
    assert read_audit(path)[3]["lines"] == 3, "two decisions and the outcome of the change at step 5"


def test_a_file_that_somebody_else_wrote_to_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    loop = audited(path, Scripted([[0.5]])).run(5)
    with path.open("a") as file:
        file.write("mine\n")
    before = path.read_bytes()
    loop.run(15)
    assert path.read_bytes() == before
    assert len(caplog.records) == 1 and "was changed by someone else" in caplog.text


def test_nothing_is_written_between_decisions_and_all_lines_of_one_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = audited(tmp_path / "run.jsonl", Scripted([[0.5], [0.3], [0.2]]))
    writes: list[int] = []
    real = os.write
    monkeypatch.setattr(writing.os, "write", lambda file, content: writes.append(loop.done) or real(file, content))
    loop.run(23)
    assert writes == [5, 10, 15, 20]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("mine")
    loop = Loop(sgd)
    with pytest.raises(
        OutputExistsError, match=r"exists and is not overwritten; give another path \(.*is not an audit"
    ):
        attach(loop.optimizer, policy=Scripted([[0.5]]), audit=path)
    assert not loop.optimizer._optimizer_step_pre_hooks, "nothing was touched"
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        audited(tmp_path / "missing" / "run.jsonl", Scripted([[0.5]]))
    with pytest.raises(UserError, match="audit is a int; it must be a path"):
        attach(loop.optimizer, policy=Scripted([[0.5]]), audit=3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="audit is an empty text; it must be a path"):
        attach(loop.optimizer, policy=Scripted([[0.5]]), audit="")
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError, match="exists and is not overwritten"):
        audited(dangling, Scripted([[0.5]]))
    assert path.read_text() == "mine" and not (tmp_path / "nowhere").exists()


# --- the header ---------------------------------------------------------------------------------------------------


def test_the_header_tells_all_that_is_needed_to_compare_and_nothing_personal(tmp_path: Path) -> None:
    bundle, path = tmp_path / "bundle", tmp_path / "run.jsonl"
    trimtab.save_policy(learned(), bundle)
    loop = Loop(adamw, norm=True)
    loop.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    where = AuditFile(path, data="waves", examples=256, project="demo")
    config = GuardConfig(backoff=0.25, bounds={"lr": (0.1, 3)})
    loop.controller = attach(loop.optimizer, policy=bundle, audit=where, guard=config, total_steps=70)
    header = read_audit(path)[0]
    assert fits(header) and set(header) == {"kind", "sha256", *LINES["header"]} - {"structure"}
    manifest = json.loads((bundle / "policy.json").read_text())
    assert header["policy_sha256"] == manifest["sha256"] and header["policy"] == "made-up"
    assert header["optimizer"] == "AdamW" and header["parameter_groups"] == 2 and header["device"] == "cpu"
    assert header["model"] is None and header["model_parameters"] is None
    assert header["guard"]["backoff"] == 0.25 and header["guard"]["rollback_budget"] == 4
    assert GuardConfig(**header["guard"]) == config
    assert (header["project"], header["data"], header["examples"]) == ("demo", "waves", 256)
    text = path.read_text()
    personal = {str(tmp_path), str(Path.cwd()), platform.node(), getpass.getuser(), str(Path.home())} - {"", "/"}
    values = json.dumps([value for key, value in header.items() if key != "sha256"])
    assert not [word for word in personal if len(word) > 4 and word in text]
    assert not any(f'"{word}"' in values for word in personal)


def test_the_model_and_a_rules_settings_are_told(tmp_path: Path) -> None:
    loop, path = Loop(sgd), tmp_path / "run.jsonl"
    loop.model[0].weight.requires_grad_(False)
    loop.optimizer = sgd([one for one in loop.model.parameters() if one.requires_grad])
    attach(loop.optimizer, model=loop.model, policy=trimtab.load_policy("plateau", patience=3), audit=path)
    header = read_audit(path)[0]
    assert (header["model"], header["model_parameters"], header["parameters"]) == ("Sequential", 49, 17)
    assert header["policy_options"]["patience"] == 3 and header["policy_sha256"] is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, 2.5, True, None, "a"), [1, 2.5, True, None, "a"]),
        ("/home/someone", None),
        ("C:\\Users", None),
        (math.inf, "inf"),
        (np.ones(3), None),
        (GuardConfig(backoff=0.5).backoff, 0.5),
        (Scripted([[1.0]]), None),
    ],
)
def test_only_plain_settings_are_told(value: Any, expected: Any) -> None:
    assert options_of(value) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": ""}, "data of an audit is ''"),
        ({"data": "x" * 201}, "1 to 200 characters"),
        ({"project": 3}, "project of an audit is 3"),
        ({"examples": 0}, "examples of an audit is 0; it must be at least 1"),
    ],
)
def test_labels_that_cannot_be_compared_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AuditFile("run.jsonl", **fields)


# --- why ----------------------------------------------------------------------------------------------------------


class Saying(Scripted):
    """Says why, from the state that the last ``act`` gave."""

    def why(self, state: dict[str, Any]) -> tuple[str, ...]:
        count = int(state["count"][0])
        if count == 3:
            raise LookupError("scripted")
        return (f"halving: decision {count}; clip: norm 4",) if count != 4 else ("",)


def test_a_policys_own_words_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    loop = audited(path, Saying([[1.0], [0.5], [0.25], [0.125]])).run(20)
    decisions = [line for line in read_audit(path) if line["kind"] == "decision"]
    own = [f"halving: decision {count}; clip: norm 4" for count in (1, 2, 5)]
    assert [line["why"] for line in decisions] == [own[0], own[1], "", "", own[2]]
    assert decisions[0]["reason"] == f"the policy holds ({own[0]})"
    assert decisions[1]["reason"] == loop.decisions[4].reason == f"moved by the policy ({own[1]})"
    assert decisions[2]["reason"] == "moved by the policy" and decisions[2]["applied"] == {"lr": 0.25}
    assert "could not say why" in caplog.text and len(caplog.records) == 1
    causes = [line["cause"] for line in read_audit(path) if line["kind"] == "outcome"]
    assert causes == ["halving + clip", "policy", "policy"]


# --- outcomes -----------------------------------------------------------------------------------------------------


def test_a_schedules_steps_within_an_interval_are_one_change(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy="cosine", total_steps=100, audit=path)
    loop.run(30)
    outcomes = [line for line in read_audit(path) if line["kind"] == "outcome"]
    assert [(line["decided_at"], line["step"]) for line in outcomes] == [(1, 10), (10, 20), (20, 30)]
    rates = [0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(31)]
    assert outcomes[1]["changed"]["lr"] == pytest.approx([rates[9], rates[19]], rel=1e-4)
    expected = np.log(np.mean(loop.losses[20:30])) - np.log(np.mean(loop.losses[10:20]))
    assert outcomes[2]["ln_loss_change"] == pytest.approx(expected, rel=1e-3)
    assert outcomes[2]["ln_loss_usual"] == pytest.approx(outcomes[1]["ln_loss_change"], rel=1e-4)


def test_validation_losses_are_told_with_their_change(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    loop = audited(path, Scripted([[1.0], [0.5], [0.5], [0.25], [0.25]]))
    for step in range(25):
        loop.step()
        assert loop.controller is not None
        loop.controller.step(loop.losses[-1], {3: 2.0, 17: 1.5}.get(step))
    lines = [line for line in read_audit(path) if line["kind"] == "validation"]
    assert [(line["step"], line["since"]) for line in lines] == [(5, None), (20, 5)]
    assert lines[0]["ln_val_loss_change"] == "nan"
    assert lines[1]["ln_val_loss_change"] == pytest.approx(math.log(1.5 / 2.0), rel=1e-5)
    spans = [made.span for made in changes_of(load_trace(path).lines).made]
    assert spans == [(20, lines[1]["ln_val_loss_change"])] * 2


def test_a_change_that_was_rolled_back_is_undone_and_the_guard_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    loop = audited(path, Scripted([[1.0], [1.0], [0.5]]))
    for step in range(25):
        if step == 12:  # a burst, which the guard blames on the rate
            with torch.no_grad():
                next(loop.model.parameters()).mul_(1e4)
                loop.model[-1].bias.add_(100)
        loop.step()
    decisions = [line for line in read_audit(path) if line["kind"] == "decision"]
    outcomes = [line for line in read_audit(path) if line["kind"] == "outcome"]
    assert [line["rolled_back"] for line in decisions] == [False, False, False, True, False, False]
    assert [(line["decided_at"], line["undone"], line["cause"]) for line in outcomes] == [
        (10, True, "policy"),
        (15, False, "guard"),
    ]
    assert outcomes[0]["ln_loss_change"] == "nan"
    before, after = np.mean(loop.losses[5:10]), np.mean(loop.losses[15:20])
    assert outcomes[1]["ln_loss_change"] == pytest.approx(np.log(after) - np.log(before), rel=1e-3)
    assert loop.controller is not None
    assert "it was undone" in loop.controller.summary()


@pytest.mark.parametrize("policy", ["greedy", "cosine", "random", "default"])
def test_the_summary_counts_the_outcomes_of_the_audit(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "run.jsonl"
    loop = Loop(adamw)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=policy, audit=path, total_steps=150)
    loop.run(150)
    lines = read_audit(path)
    assert all(
        set(line) - {"kind", "sha256"} == set(LINES[line["kind"]]) - {name for _, name in OPTIONAL}
        for line in lines[:20]
    )
    assert all(fits(line) for line in lines)
    journal, held = loop.controller._trail.journal, changes_of(lines[1:]).held
    moved = [float(line["ln_loss_change"]) for line in lines if line["kind"] == "outcome"]
    for tally, changes in ((journal.moved, moved), (journal.held, held)):
        known = [change for change in changes if math.isfinite(change)]
        assert (tally.known, tally.lower) == (len(known), sum(change < 0 for change in known))
    assert verify_audit(path).holds


# --- resuming -----------------------------------------------------------------------------------------------------


def resumable(path: Path | None, **options: Any) -> Loop:
    loop = Loop(adamw)
    options = {"policy": "greedy", "decide_every": 5, **options}
    loop.controller = attach(loop.optimizer, model=loop.model, audit=path, **options)
    return loop


def resumed(first: Loop, path: Path | None, state: dict[str, Any], **options: Any) -> Loop:
    second = resumable(path, **options)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert second.controller is not None
    second.controller.load_state_dict(state)
    second.done = first.done
    return second


def told(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in ("sha256", "time")} for line in read_audit(path)]


@pytest.mark.parametrize("at", [10, 13])
def test_a_resumed_run_goes_on_with_the_chain(tmp_path: Path, at: int) -> None:
    straight = resumable(tmp_path / "straight.jsonl").run(40)
    path = tmp_path / "run.jsonl"
    first = resumable(path).run(at)
    assert first.controller is not None
    state = json.loads(json.dumps(first.controller.state_dict()))
    second = resumed(first, path, state).run(40 - at)
    assert verify_audit(path).holds
    lines = told(path)
    place = next(index for index, line in enumerate(lines) if line["kind"] == "resumed")
    assert lines[place] == {"kind": "resumed", "step": at, "torn": 0, "differs": {}}
    assert [*lines[:place], *lines[place + 1 :]] == told(tmp_path / "straight.jsonl")
    assert straight.controller is not None and second.controller is not None
    assert second.controller.summary() == straight.controller.summary()


def test_what_a_crash_took_back_is_not_followed_by_the_outcomes_after_it(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first = resumable(path).run(20)
    assert first.controller is not None
    state = first.controller.state_dict()
    second = resumable(None).run(20)
    first.run(15)  # lost, as the weights below are those of step 20
    third = resumed(second, path, state, total_steps=99).run(20)
    lines = read_audit(path)
    assert third.done == 40 and verify_audit(path).holds
    assert next(line for line in lines if line["kind"] == "resumed")["differs"] == {"total_steps": 99}
    known = [line["ln_loss"] for line in lines if line["kind"] == "decision" and line["step"] in (20, 25)]
    assert known[1] == pytest.approx(known[2], rel=1e-4), "the interval was repeated"
    moved = [float(line["ln_loss_change"]) for line in lines if line["kind"] == "outcome"]
    changes = [*moved, *changes_of(lines[1:]).held]
    assert sum(map(math.isfinite, changes)) == 6 + 3 + 4 - 3, (
        "7 intervals, 4 of them repeated; the first has none before"
    )


def test_a_run_that_loads_no_state_follows_with_a_line_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    resumable(path).run(10)
    before = path.read_bytes()
    again = resumable(path)
    assert path.read_bytes() == before
    again.run(10)
    assert path.read_bytes().startswith(before) and verify_audit(path).holds
    lines = told(path)[-4:]
    added = [line for line in told(path)[before.count(b"\n") :] if line["kind"] != "outcome"]
    assert [(line["kind"], line["step"]) for line in added] == [
        ("resumed", 0),
        *[("decision", at) for at in (0, 5, 10)],
    ]
    assert lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "plateau"}, "it is the audit of another run: its policy is 'greedy', and not 'plateau'"),
        ({"decide_every": 6}, "its decide_every is 5, and not 6"),
        ({"policy": Scripted([[0.5]])}, "its policy is 'greedy', and not 'scripted'"),
    ],
)
def test_the_audit_of_another_run_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "run.jsonl"
    resumable(path).run(10)
    before = path.read_bytes()
    with pytest.raises(OutputExistsError, match=message):
        resumable(path, **options)
    assert path.read_bytes() == before


@pytest.mark.parametrize("modes", [("advise", "act"), ("act", "advise"), ("advise", "act", "advise", "advise", "act")])
def test_a_run_may_go_on_in_another_mode(tmp_path: Path, modes: tuple[str, ...]) -> None:
    path, policy = tmp_path / "run.jsonl", Scripted([[0.5], [0.6], [0.7], [0.8]], decide_every=5)
    loop = resumable(path, policy=policy, mode=modes[0]).run(13)
    for mode in modes[1:]:
        assert loop.controller is not None
        state = json.loads(json.dumps(loop.controller.state_dict()))
        loop.controller.detach()
        loop = resumed(loop, path, state, policy=policy, mode=mode).run(10)
    assert verify_audit(path).holds
    lines, mode, turns = told(path), modes[0], []
    assert lines[0]["mode"] == modes[0]
    for before, line in pairwise(lines):
        if line["kind"] == "mode":
            assert before["kind"] == "resumed" and fits(read_audit(path)[lines.index(line)])
            assert line == {"kind": "mode", "step": before["step"], "before": mode, "mode": line["mode"]}
            mode = line["mode"]
            turns.append(mode)
        elif line["kind"] == "decision":
            assert ("advised" in line) == (mode == "advise")
            assert mode == "act" or line["applied"] == {"lr": 1.0}
    changes = [new for old, new in pairwise(modes) if new != old]
    assert turns == changes
    assert load_trace(path).modes == (modes[0], *changes)
    acted = [line for line in load_trace(path).acted if line["kind"] == "decision"]
    assert acted and not any("advised" in line for line in acted)


def test_what_was_advised_last_has_no_outcome_once_it_is_acted_upon(tmp_path: Path) -> None:
    path, policy = tmp_path / "run.jsonl", Scripted([[0.5], [0.5], [0.7]], decide_every=5)
    loop = resumable(path, policy=policy, mode="advise").run(7)
    assert loop.controller is not None
    resumed(loop, path, loop.controller.state_dict(), policy=policy).run(8)
    lines = told(path)
    after = lines[next(place for place, line in enumerate(lines) if line["kind"] == "mode") :]
    outcomes = [line for line in after if line["kind"] == "outcome"]
    assert [line["decided_at"] for line in outcomes] == [10], "the advice of step 5 is not the cause of anything"


def test_an_audit_whose_chain_breaks_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    resumable(path).run(10)
    changed = path.read_bytes().replace(b'"rolled_back": false', b'"rolled_back": true ', 1)
    path.write_bytes(changed)
    with pytest.raises(OutputExistsError, match="the chain breaks at line 2"):
        resumable(path)
    assert path.read_bytes() == changed


def test_a_chain_that_goes_on_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    first = resumable(path).run(10)
    assert first.controller is not None
    with caplog.at_level(logging.WARNING, "trimtab"):
        resumed(first, path, first.controller.state_dict()).run(10)
    assert not caplog.records


@given(st.floats())
def test_numbers_keep_six_digits_and_stay_json(value: float) -> None:
    kept = json.loads(json.dumps(rounded(value), allow_nan=False))
    assert math.isnan(value) or float(kept) == pytest.approx(value, rel=5e-6, abs=1e-320)
