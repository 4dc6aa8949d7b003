"""Ctrl-C in the midst of a decision: the run is consistent afterwards, and no interval is judged twice."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from tests.policies.live import Loop, Scripted, adamw, inside

from trimtab.policies.attach import attach
from trimtab.policies.audit import read_audit, verify_audit
from trimtab.policies.interrupts import Interrupts

TABLE = [[0.9], [0.8], [0.7], [0.6], [0.5]]


class Pressed(Scripted):
    """Ctrl-C while it thinks, at decision ``at``; with ``own``, an interruption that is no signal."""

    at, own = 2, False

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> Any:
        answer = super().act(observations, state)
        if len(observations) == 1 and int(state["count"][0]) == self.at:
            self.at = -1
            if self.own:
                raise SystemExit(3)
            signal.raise_signal(signal.SIGINT)
        return answer


class Restless:
    """A stateful object that is interrupted while it is saved or loaded, by a signal or by an exception of its own."""

    def __init__(self) -> None:
        self.pressed_at, self.own, self.calls = "", False, list[str]()

    def _press(self, what: str) -> None:
        self.calls.append(what)
        if what == self.pressed_at:
            self.pressed_at = ""
            if self.own:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)

    def state_dict(self) -> dict[str, int]:
        self._press("save")
        return {"value": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._press("load")


def audited(path: Path, policy: Scripted, **options: Any) -> Loop:
    loop = Loop(adamw)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=policy, audit=path, **options)
    return loop


def check_consistent(loop: Loop, path: Path, done: int) -> None:
    """Levers, schedule, snapshots, audit and counts agree with each other, now and for the next intervals."""
    controller = loop.controller
    assert controller is not None and controller.steps == loop.done == done
    assert loop.optimizer.param_groups[0]["lr"] == 0.01, "outside of a step the schedule's own"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen = inside(loop.optimizer, lambda group: group["lr"])
    for _ in range(20):
        expected = 0.01 * controller.multipliers["lr"]
        loop.step()
        assert seen[-1] == pytest.approx(expected, rel=1e-12)
    assert torch.isfinite(loop.weights()).all()
    assert verify_audit(path).holds
    decided = [line["step"] for line in read_audit(path) if line["kind"] == "decision"]
    assert decided == list(range(0, done + 21, 5)), "each interval was judged once, and told of"
    assert controller._trail.journal.decisions == len(decided)
    assert not any(line["kind"] == "lost" for line in read_audit(path))


@pytest.mark.parametrize("own", [False, True])
def test_a_policy_that_is_interrupted_holds_for_that_interval(own: bool, tmp_path: Path) -> None:
    path, policy = tmp_path / "run.jsonl", Pressed(TABLE)
    policy.own = own
    loop = audited(path, policy).run(9)
    with pytest.raises(SystemExit if own else KeyboardInterrupt):
        loop.step()
    controller = loop.controller
    assert controller is not None and controller.multipliers == {"lr": 0.8}
    assert controller._run.position == 0 and controller._decided_at == 10
    assert controller.step(torch.tensor(1.0)).reason == "between decisions", "the user's loop may call it again"
    check_consistent(loop, path, 10)
    lines = [line for line in read_audit(path) if line["kind"] == "decision"]
    assert [line["applied"]["lr"] for line in lines[:5]] == [0.9, 0.8, 0.8, 0.7, 0.6], "it had not been listened to"
    assert "every lever holds" in lines[2]["reason"] and lines[2]["proposed"] == {}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("what", ["save", "load"])
def test_a_rollback_is_finished(what: str, own: bool, tmp_path: Path) -> None:
    path, other, last = tmp_path / "run.jsonl", Restless(), Restless()
    spoiled = 33 if what == "load" else None
    loop = audited(path, Scripted([[1.0]]), stateful=(other, last))
    alone = audited(tmp_path / "alone.jsonl", Scripted([[1.0]]), stateful=(Restless(), Restless()))
    for step in range(40):
        if step in (24, 34):
            other.pressed_at, other.own = what, own
        for one in (loop, alone):
            try:
                one.step(spoil=math.nan if step == spoiled else None)
            except KeyboardInterrupt:
                assert one is loop and step in (29, 34, 39)
                one.losses.append(one.losses[-1])
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert other.pressed_at == "", "it was pressed"
    assert (what == "save") or other.calls.count("load") == last.calls.count("load") == 1
    if not (own and what == "save"):  # a copy that was broken off is made at a later decision
        assert torch.equal(loop.weights(), alone.weights())
        assert other.calls == last.calls
        told = [
            [(line["step"], line["ln_loss"], line["rolled_back"]) for line in read_audit(one) if "rolled_back" in line]
            for one in (path, tmp_path / "alone.jsonl")
        ]
        assert told[0] == told[1] and any(rolled_back for *_, rolled_back in told[0]) == (what == "load")
    check_consistent(loop, path, 40)


def press_at(n: int, pressed: list[str]) -> Any:
    """A trace function that sends a real SIGINT at the n-th call of a function of trimtab."""
    left = [n]

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_globals.get("__name__", "").startswith("trimtab.") and frame.f_code.co_name != "<genexpr>":
            left[0] -= 1
            if left[0] == 0:
                pressed.append(frame.f_code.co_name)
                signal.raise_signal(signal.SIGINT)

    return trace


def traced(act: Callable[[bool], Any], trace: Any) -> Callable[[bool], Any]:
    def act_traced(measure: bool) -> Any:
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return act(measure)
        finally:
            sys.settrace(before)

    return act_traced


@pytest.mark.parametrize("spoiled", [False, True])
def test_ctrl_c_at_any_moment_of_a_decision(spoiled: bool, tmp_path: Path) -> None:
    n, names = 1, set[str]()
    while True:
        path, pressed = tmp_path / f"{n}.jsonl", list[str]()
        loop = audited(path, Scripted(TABLE, signals=("started", "val_slope"))).run(14)
        controller = loop.controller
        assert controller is not None
        whole = controller._conclude
        controller._conclude = traced(whole, press_at(n, pressed))  # type: ignore[method-assign]
        broken = False
        try:
            loop.step(spoil=math.nan if spoiled else None)
        except KeyboardInterrupt:
            broken = True
        controller._conclude = whole  # type: ignore[method-assign]
        assert broken == bool(pressed)
        if not pressed:
            break
        names.update(pressed)
        rolled_back = [line["rolled_back"] for line in read_audit(path) if line["kind"] == "decision"]
        if spoiled and not rolled_back[-1]:
            assert "every lever holds" in read_audit(path)[-1]["reason"], "broken off before it was judged"
            assert not torch.isfinite(loop.weights()).all()
            loop.losses.append(math.nan)
            loop.run(5)  # and now it is
            assert loop.decisions[-1].rolled_back
            check_consistent(loop, path, 20)
        else:
            check_consistent(loop, path, 15)
        n += 9
    assert n > 250 and len(names) > 15


def test_a_validation_loss_outlives_an_interrupted_decision() -> None:
    policy = Scripted([[1.0]], signals=("val_available", "val_slope"))
    loop = Loop(adamw)
    loop.controller = controller = attach(loop.optimizer, policy=policy)
    loop.run(3)
    controller.step(loop.losses[-1], 2.0)
    reading, whole = controller._run.reading, signal.default_int_handler

    def interrupted(*arguments: Any, **options: Any) -> Any:
        controller._run.reading = reading  # type: ignore[method-assign]
        whole(signal.SIGINT, None)

    controller._run.reading = interrupted  # type: ignore[method-assign]
    loop.run(1)
    with pytest.raises(KeyboardInterrupt):
        loop.step()
    loop.run(5)
    assert policy.seen[-1][0, 0] == 1.0


def test_what_is_held_in_another_thread_or_by_no_handler_of_pythons_is_left_alone() -> None:
    interrupts, found = Interrupts(), list[Any]()

    def elsewhere() -> None:
        with interrupts.held(), interrupts.let_through():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.held():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_that_waited_comes_where_it_is_let_through() -> None:
    interrupts, done = Interrupts(), list[str]()
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        signal.raise_signal(signal.SIGINT)
        done.append("held")
        with interrupts.let_through():
            done.append("never")
    assert done == ["held"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with interrupts.held(), interrupts.held():
        done.append("nested")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_it_is_made_to_wait_leaves_nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupts, installed, handler = Interrupts(), [], signal.getsignal(signal.SIGINT)
    install = signal.signal

    def broken(number: int, chosen: Any) -> Any:
        installed.append(chosen)
        if len(installed) == 1:
            raise KeyboardInterrupt  # as ``signal.signal`` does when one has just come
        return install(number, chosen)

    monkeypatch.setattr(signal, "signal", broken)
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        pytest.fail("not reached")
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is handler
    with interrupts.held(), interrupts.let_through():
        assert signal.getsignal(signal.SIGINT) is handler
    assert signal.getsignal(signal.SIGINT) is handler
