"""Whatever goes wrong while a controller is attached, also Ctrl-C at any moment, leaves optimizer, model and files as they were."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from tests.policies.live import Loop, Scripted, adamw
from torch import nn

from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.attached import ATTACHED
from trimtab.policies import interrupts, remarks
from trimtab.policies.attach import attach
from trimtab.policies.hosts.hosted import Hosted, HostOptions

WATCHING = ("started", "loss_slope", "dormant")  # the last one has the model's forward pass hooked


def standing(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> Any:
    """Everything that a controller could leave behind."""
    own = vars(optimizer)
    hooks = {name: list(held) for name, held in own.items() if name.endswith("_hooks")}
    forward = [list(held) for name, held in vars(model).items() if name.endswith("_hooks")]
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    groups = [{key: value for key, value in one.items() if key != "params"} for one in optimizer.param_groups]
    handler = signal.getsignal(signal.SIGINT)
    return own.get("step"), hooks, forward, optimizer in ATTACHED, files, groups, handler


class Failing(Scripted):
    """A policy that fails when a run begins; the trial of two runs succeeds."""

    def init(self, num_runs: int) -> dict[str, Any]:
        if num_runs == 1:
            raise LookupError("no such table")
        return super().init(num_runs)


class Interrupted(Scripted):
    """Somebody presses Ctrl-C in the first decision."""

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> Any:
        if len(observations) == 1:
            raise KeyboardInterrupt
        return super().act(observations, state)


class NoPostHook(torch.optim.SGD):
    def register_step_post_hook(self, hook: Any) -> Any:
        raise TypeError("no post hooks here")


class NoStateHook(torch.optim.SGD):
    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        raise TypeError("no state hooks here")


class FixedStep(torch.optim.SGD):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "step":
            raise AttributeError("step cannot be set")
        super().__setattr__(name, value)


def named(name: Any) -> Scripted:
    return Scripted([[1.0]], name=name)


class Unnamed(Scripted):
    """A policy whose name cannot be read."""

    def __getattribute__(self, name: str) -> Any:
        if name == "name":
            raise RuntimeError("not loaded yet")
        return super().__getattribute__(name)


FAILURES: dict[str, tuple[Any, dict[str, Any], type[BaseException], str]] = {
    "init": (adamw, {"policy": Failing([[1.0]])}, MismatchError, "'scripted' cannot begin: init raised LookupError"),
    "no name": (adamw, {"policy": named(None)}, MismatchError, "name is None; it must be a text"),
    "a list": (adamw, {"policy": named(["a"])}, MismatchError, "name is .'a'.; it must be a text"),
    "empty": (adamw, {"policy": named("")}, MismatchError, "name is ''"),
    "long": (adamw, {"policy": named("a" * 10**6)}, MismatchError, "name is 'aaa"),
    "half": (adamw, {"policy": named("\ud800")}, MismatchError, "whole characters"),
    "property": (adamw, {"policy": Unnamed([[1.0]])}, MismatchError, "it raised RuntimeError"),
    "missing folder": (adamw, {"audit": "missing/run.jsonl"}, UserError, "cannot be written: No such file"),
    "a folder": (adamw, {"audit": "folder"}, UserError, "exists and is not overwritten"),
    "a file": (adamw, {"audit": "notes.txt"}, UserError, "exists and is not overwritten"),
    "post hook": (NoPostHook, {}, UserError, "NoPostHook does not take the hooks .*no post hooks here"),
    "state hook": (NoStateHook, {}, UserError, "NoStateHook does not take the hooks"),
    "step": (FixedStep, {}, UserError, "FixedStep does not take the hooks .*step cannot be set"),
    "Ctrl-C": (adamw, {"policy": Interrupted([[1.0]])}, KeyboardInterrupt, "^$"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    make, options, kind, words = FAILURES[name]
    loop = Loop(make if make is adamw else lambda parameters: make(parameters, lr=0.1))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    options = {"policy": Scripted([[1.0]]), "audit": "run.jsonl", **options}
    options["audit"] = tmp_path / options["audit"]
    before = standing(loop.optimizer, loop.model, tmp_path)
    with pytest.raises(kind, match=words) as caught:
        attach(loop.optimizer, model=loop.model, **options)
    assert len(str(caught.value)) < 400
    assert standing(loop.optimizer, loop.model, tmp_path) == before


def nth_call(n: int) -> Callable[[FrameType, str, Any], None]:
    """A trace function that presses Ctrl-C at the n-th call of a function of trimtab."""
    left = [n]

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_globals.get(
            "__name__", ""
        )  # a generator's end, and a handler that holds it, cannot be interrupted
        if name.startswith("trimtab.") and name != interrupts.__name__ and frame.f_code.co_name != "<genexpr>":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

    return trace


def interrupted(n: int, act: Callable[[], Any]) -> bool:
    """Whether the n-th call inside ``act`` was reached, and interrupted."""
    tracing = sys.gettrace()
    sys.settrace(nth_call(n))
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracing)
    return False


@pytest.mark.parametrize("resumed", [False, True])
def test_ctrl_c_at_any_moment_leaves_nothing_behind(resumed: bool, tmp_path: Path) -> None:
    policy = Scripted([[0.5]], signals=WATCHING)
    loop, audit = Loop(adamw), tmp_path / "run.jsonl"

    def begin() -> Any:
        loop.controller = attach(loop.optimizer, model=loop.model, policy=policy, audit=audit)
        return loop.controller

    if resumed:
        begin().detach()
    before = standing(loop.optimizer, loop.model, tmp_path)
    n = 1
    while interrupted(n, begin):
        assert standing(loop.optimizer, loop.model, tmp_path) == before, n
        n += 1
    assert n > 300
    assert loop.optimizer in ATTACHED and audit.exists(), "with no interruption left it is attached"


def test_remarks_that_fail_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(adamw)
    before = standing(loop.optimizer, loop.model, tmp_path)

    def fail(*arguments: Any) -> Any:
        raise SystemExit(3)

    monkeypatch.setattr(remarks, "remarks", fail)
    with pytest.raises(SystemExit):
        attach(loop.optimizer, model=loop.model, policy=Scripted([[1.0]]), audit=tmp_path / "run.jsonl")
    assert standing(loop.optimizer, loop.model, tmp_path) == before


@pytest.mark.parametrize("resumed", [False, True])
def test_a_host_whose_state_is_refused_leaves_nothing_behind(resumed: bool, tmp_path: Path) -> None:
    loop, audit = Loop(adamw), tmp_path / "run.jsonl"
    if resumed:
        attach(loop.optimizer, policy="constant", audit=audit).detach()
    before = standing(loop.optimizer, loop.model, tmp_path)
    hosted = Hosted(HostOptions(policy="constant", audit=audit))
    hosted.load_state_dict({"format": 0})
    with pytest.raises(MismatchError, match="format 0"):
        hosted.begin(loop.optimizer, loop.model, host=None, total_steps=None)
    assert standing(loop.optimizer, loop.model, tmp_path) == before


def test_an_audit_that_somebody_else_has_written_to_is_not_removed(tmp_path: Path) -> None:
    loop, audit = Loop(adamw), tmp_path / "run.jsonl"

    class Writing(Interrupted):
        def act(self, observations: np.ndarray, state: dict[str, Any]) -> Any:
            if len(observations) == 1:
                with audit.open("a") as file:
                    file.write("a note\n")
            return super().act(observations, state)

    with pytest.raises(KeyboardInterrupt):
        attach(loop.optimizer, policy=Writing([[1.0]]), audit=audit)
    assert audit.read_text().endswith("a note\n")
