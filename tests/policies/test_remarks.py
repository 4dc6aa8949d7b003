"""What is said once of a live run; and the base that levers are multiples of, where rates are 0."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.policies.live import Loop, Scripted, adamw, sgd
from tests.policies.made_up import learned

from trimtab.errors import MismatchError
from trimtab.inner_training.guard import GuardConfig
from trimtab.policies.attach import attach
from trimtab.policies.registry import check_policy

UNSTEERED = "without this controller, which counts from 0"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "trimtab")
    return caplog


# --- a run under way --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (adamw, "has made 12 steps"),
        (sgd, "has made steps"),
        (lambda p: torch.optim.Adagrad(p, lr=0.01), "has made 12 steps"),
        (lambda p: torch.optim.SGD(p, lr=0.01), None),
    ],
    ids=["adamw", "momentum", "adagrad", "sgd"],
)
def test_steps_without_the_controller_are_said_once(make: Any, told: str | None, said: Any) -> None:
    loop = Loop(make).run(12)
    loop.controller = attach(loop.optimizer, model=loop.model, policy="cosine", total_steps=100)
    loop.run(15)
    found = [line for line in said.messages if UNSTEERED in line]
    assert len(found) == (told is not None)
    if told is not None:
        assert told in found[0] and "controller.load_state_dict" in found[0] and "total_steps=100" in found[0]
        assert ("or total_steps=88 for what is left" in found[0]) == ("12" in told)


@pytest.mark.parametrize("make", [adamw, sgd, lambda p: torch.optim.Adagrad(p, lr=0.01)])
def test_a_new_run_and_a_resumed_one_are_not_said(make: Any, said: Any) -> None:
    def build() -> Loop:
        loop = Loop(make)
        loop.controller = attach(loop.optimizer, policy="cosine", total_steps=100)
        return loop

    first, second = build().run(12), build()
    states = [copy.deepcopy(one.state_dict()) for one in (first.model, first.optimizer, first.controller)]
    for one, state in zip((second.model, second.optimizer, second.controller), states, strict=True):
        one.load_state_dict(state)
    second.run(12)
    assert said.messages == []


# --- what a policy is not told ----------------------------------------------------------------------------------------


def test_a_learned_policy_without_a_budget_is_said_what_it_costs(said: Any) -> None:
    for policy, total, times in (
        (learned(), None, 1),
        (learned(), 50, 1),
        ("greedy", None, 1),
        ("default", None, 2),
        ("default", 50, 2),
    ):
        attach(Loop(sgd).optimizer, policy=policy, total_steps=total)
        assert len([line for line in said.messages if "give attach(..., total_steps=...)" in line]) == times, policy
    assert "reads how much of the run is left, and is not told" in said.messages[-1]


@pytest.mark.parametrize(("validated", "times"), [(None, 1), (60, 0), (150, 1)])
def test_validation_losses_that_do_not_come_are_said_after_twenty_decisions(
    validated: int | None, times: int, said: Any
) -> None:
    loop = Loop(sgd)
    policy = Scripted([[1.0]], signals=("val_slope", "loss_slope", "val_available"), decide_every=5)
    controller = attach(loop.optimizer, policy=policy)
    for step in range(200):
        loop.step()
        controller.step(loop.losses[-1], 0.5 if step == validated else None)
        assert len(said.messages) == (times if step >= 94 else 0)  # the first decision comes before the first step
    if times:
        assert "reads val_slope, val_available, but no validation loss has come in its first 20 decisions" in said.text


def test_a_policy_that_reads_no_validation_loss_is_not_asked_for_one(said: Any) -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=Scripted([[1.0]], decide_every=1))
    loop.run(40)
    assert said.messages == []


class Wrong(Scripted):
    """Answers something else."""

    answer: Any = None

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((np.zeros((1, 2)), {}), r"actions of shape \(1, 2\); it must be \(2, 1\): 2 runs, and an action .* \(lr\)$"),
        (np.zeros((2, 1)), "act gave a ndarray; it must be a tuple of two: actions and state$"),
        ((np.zeros((2, 1)), [1]), "a state of type list; it must be a dict$"),
    ],
)
def test_a_trial_decision_that_fails_says_what_is_wrong_and_nothing_else(answer: Any, message: str) -> None:
    policy = Wrong([[1.0]])
    policy.answer = answer
    with pytest.raises(MismatchError, match=message):
        check_policy(policy, "mine")


# --- rates of 0 -------------------------------------------------------------------------------------------------------


def in_groups(first: float) -> Any:
    def make(parameters: Any) -> torch.optim.Optimizer:
        one, *rest = parameters
        return torch.optim.SGD([{"params": [one], "lr": first}, {"params": rest, "lr": 0.05}])

    return make


def test_the_base_rate_is_that_of_the_first_group_that_has_one() -> None:
    seen = []
    for first in (0.0, 0.05):
        loop = Loop(in_groups(first))
        controller = attach(loop.optimizer, policy="constant", guard=GuardConfig(decay_power=0.6, decay_factor=0.5))
        reading = controller._run.reading(controller._steering.levers, None, float("nan"), measure=False)
        seen.append((reading.base["lr"].tolist(), reading.initial_lr.tolist()))
        for _ in range(15):
            loop.step()
            controller.step(loop.losses[-1])
        seen[-1] += (controller.multipliers["lr"],)
    assert seen[0] == seen[1] and seen[0][:2] == ([0.05], [0.05])
    assert 0 < seen[0][2] < 1


def test_a_warm_up_from_zero_by_hand_has_the_first_rate_that_is_one() -> None:
    loop = Loop(lambda p: torch.optim.SGD(p, lr=0.0))
    loop.controller = attach(loop.optimizer, policy="constant", guard=GuardConfig(decay_power=0.6))
    for step in range(61):
        loop.optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, max(0, step - 10) / 20)
        loop.step()
    assert loop.controller.state_dict()["run"]["initial_lr"] == pytest.approx(0.1 / 20)
    assert 0 < loop.controller.multipliers["lr"] < 1 and loop.losses[-1] < loop.losses[44]


# --- the switch from outside ------------------------------------------------------------------------------------------


def test_a_file_switches_a_running_process_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "off"
    monkeypatch.setenv("TRIMTAB_OFF_FILE", str(path))
    loop = Loop(sgd)
    loop.controller = controller = attach(loop.optimizer, policy=Scripted([[0.5]], decide_every=5))
    monkeypatch.delenv("TRIMTAB_OFF_FILE")  # it was looked at when the controller was attached
    rates: list[float] = []
    loop.optimizer.register_step_pre_hook(lambda one, args, kwargs: rates.append(one.param_groups[0]["lr"]))
    told = []
    for step in range(15):
        if step == 3:
            path.touch()
        if step == 8:
            path.unlink()
        told.append(controller.multipliers["lr"])
        loop.step()
    assert rates == [0.025] * 5 + [0.05] * 5 + [0.025] * 5
    assert told == [rate / 0.05 for rate in rates], "what is in force, not what will be"
    assert "switched off" in loop.decisions[4].reason and loop.decisions[4].applied == {"lr": 1.0}
    assert loop.decisions[4].acted and loop.decisions[9].acted


def test_multipliers_are_those_in_force_when_the_variable_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=Scripted([[0.5]], decide_every=5))
    loop.run(2)
    monkeypatch.setenv("TRIMTAB_OFF", "1")
    assert not loop.controller.enabled and loop.controller.multipliers == {"lr": 0.5}
    loop.run(3)
    assert loop.controller.multipliers == {"lr": 1.0}
