"""Calls that bring no optimizer step or no number: a scaler that skips every step of a dead run, losses that are none."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.policies.live import Loop, Scripted, sgd
from tests.policies.ranked import Training, world_of
from tests.policies.test_live_run import Transfers
from torch import Tensor

from trimtab.inner_training.guard import GuardConfig
from trimtab.policies.attach import attach
from trimtab.policies.controller import Controller


class Scaled:
    """A loop with a gradient scaler, which skips every step once the weights are not finite."""

    def __init__(self, **options: Any) -> None:
        self.loop = Loop(sgd)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        options = {"policy": Scripted([[0.5]], decide_every=5), **options}
        self.controller = attach(self.loop.optimizer, model=self.loop.model, **options)

    def step(self) -> Any:
        self.loop.optimizer.zero_grad()
        loss = self.loop.loss()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.loop.optimizer)
        self.scaler.update()
        self.loop.done += 1
        return self.controller.step(loss)

    def kill(self) -> Scaled:
        with torch.no_grad():
            next(self.loop.model.parameters()).fill_(torch.nan)
        return self

    @property
    def alive(self) -> bool:
        return bool(torch.isfinite(self.loop.weights()).all())


@pytest.mark.parametrize(("every", "patience"), [(5, 20), (15, 30)])
def test_a_dead_run_whose_steps_are_all_skipped_is_rolled_back(
    every: int, patience: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    run = Scaled(policy=Scripted([[0.5]], decide_every=every))
    for _ in range(3 * every + 2):
        run.step()
    run.kill()
    steps = run.controller.steps
    decisions = [run.step() for _ in range(patience)]
    assert [one.rolled_back for one in decisions] == [False] * (patience - 1) + [True]
    assert "diverged" in decisions[-1].reason and run.alive and run.controller.steps == steps
    assert len(caplog.records) == 1
    assert f"{patience} calls of controller.step came without an optimizer step, and no loss among" in caplog.text
    for _ in range(3 * every):
        run.step()
    assert run.controller.steps == steps + 3 * every and run.alive
    assert run.controller.multipliers["lr"] == 0.5, "all was calm before, so the rate is not to blame"


def test_a_loss_that_was_high_before_it_died_is_the_rates_fault() -> None:
    run = Scaled()
    for _ in range(22):
        run.step()
    run.loop.targets *= 100.0
    run.step()
    run.kill()
    for _ in range(20):
        decision = run.step()
    assert decision.rolled_back and run.controller.multipliers["lr"] == pytest.approx(0.5 * 0.3)


def test_a_run_that_dies_again_and_again_is_lost_when_its_budget_is_spent() -> None:
    run = Scaled(guard=GuardConfig(rollback_budget=2))
    rolled = 0
    for _ in range(4):
        for _ in range(12):
            run.step()
        run.kill()
        rolled += sum(run.step().rolled_back for _ in range(20))
    assert rolled == 3 and not run.alive, "one last time when the budget is spent"
    assert "stands back" in run.controller.summary() and run.controller.multipliers == {"lr": 1.0}


def test_calls_without_a_step_are_legitimate_while_a_loss_is_finite(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    run = Scaled()
    before = json.dumps(run.controller.state_dict())
    for loss in (1.0, math.nan, math.inf):
        for _ in range(50):
            run.controller.step(loss)  # a scaler that is too large at first, or the micro-batches of the first step
    assert json.dumps(run.controller.state_dict()) == before and len(caplog.records) == 1
    for _ in range(7):
        run.step()
    reference = Scaled()
    for _ in range(7):
        reference.step()
    for index in range(200):
        assert run.controller.step(math.nan if index % 10 else torch.tensor(2.0)).reason == "between decisions"
    for index in range(19):
        assert run.controller.step(math.nan).reason == "between decisions", index
    run.step()
    reference.step()
    for index in range(19):
        assert run.controller.step(math.nan).reason == "between decisions", f"{index}: counted anew after a step"
    own, other = (json.dumps(one.controller.state_dict()) for one in (run, reference))
    assert own == other


def test_losses_without_a_step_are_looked_at_when_there_are_many_and_not_before() -> None:
    run = Scaled()
    for _ in range(7):
        run.step()
    loss = torch.tensor(1.0)
    looks = []
    for _ in range(60):
        with Transfers() as transfers:
            run.controller.step(loss)
        looks.append(transfers.count)
    assert looks == ([0] * 19 + [1]) * 3


def skipping(rank: int, world: int) -> Any:
    """Ranks whose weights all died go back together; broken data on one of them is no reason to."""
    training = Training(rank, world)
    policy = Scripted([[0.5]], decide_every=2)
    controller = attach(training.optimizer, model=training.model, policy=policy)
    controller.time_limit = None
    for _ in range(12):
        controller.step(training.step())
    one = [controller.step(torch.tensor(math.nan if rank else 1.0)).reason for _ in range(25)]
    controller.step(training.step())
    with torch.no_grad():
        next(iter(training.bare.parameters())).fill_(torch.nan)
    dead = [controller.step(torch.tensor(math.nan)).rolled_back for _ in range(21)]
    for _ in range(4):
        controller.step(training.step())
    return set(one), dead, controller.steps, training.weights_hash(), training.logged.lines


def no_number_on_one(rank: int, world: int) -> Any:
    training = Training(rank, world)
    controller = attach(training.optimizer, model=training.model, policy=Scripted([[0.5]], decide_every=2))
    controller.time_limit = None
    reasons = []
    for k in range(8):
        loss: Any = training.step()
        reasons.append(controller.step(None if rank and k == 5 else loss).reason)
    return reasons, training.weights_hash()


def both_kinds(rank: int, world: int) -> Any:
    return skipping(rank, world), no_number_on_one(rank, world)


def test_several_processes_judge_together(tmp_path: Path) -> None:
    answers = world_of(2, both_kinds, tmp_path)
    (one, number), (other, same) = answers
    assert one == other and number == same
    reasons, dead, steps, _, logged = one
    assert reasons == {"between decisions"} and steps == 17
    assert dead == [False] * 19 + [True, False] and sum("counts as diverged" in line for line in logged) == 1
    told = number[0]
    assert "abstained" in told[5] and told[7] == "the policy holds" == told[3]


# --- losses that are no numbers -------------------------------------------------------------------------------------


def stepped(loop: Loop, controller: Controller, loss: Any = ..., val_loss: Any = None) -> Any:
    loop.optimizer.zero_grad()
    own = loop.loss()
    own.backward()
    loop.optimizer.step()
    loop.done += 1
    return controller.step(own if loss is ... else loss, val_loss)


@pytest.mark.parametrize("loss", [None, {"loss": 1.0}, "x", 1j, 10**400])
def test_what_is_no_number_ends_no_training_that_is_under_way(loss: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    loop = Loop(sgd)
    policy = Scripted([[1.0], [1.0], [0.5], [0.25]], decide_every=5)
    controller = attach(loop.optimizer, policy=policy)
    decisions = [stepped(loop, controller, loss if index in (7, 8) else ...) for index in range(20)]
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and said[0].startswith(f"loss is {loss!r}; it must be a number or a tensor; where it is not")
    assert "every lever holds" in decisions[9].reason and decisions[9].applied == {"lr": 1.0}
    assert decisions[14].applied == {"lr": 0.5}, "the interval after it is measured again"


def test_a_validation_loss_that_is_none_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    loop = Loop(sgd)
    policy = Scripted([[1.0]], signals=("val_available",), decide_every=5)
    controller = attach(loop.optimizer, policy=policy)
    for index in range(10):
        stepped(loop, controller, val_loss={2: "x", 7: 1.0, 8: "y"}.get(index))
    assert [float(seen[0, 0]) for seen in policy.seen[-3:]] == [0, 0, 1]
    assert len(caplog.records) == 1 and "val_loss is 'x'" in caplog.text


def test_tensors_are_taken_as_before() -> None:
    loop = Loop(sgd)
    controller = attach(loop.optimizer, policy=Scripted([[1.0]], decide_every=50))
    losses: list[Tensor | float] = [1, torch.tensor([1.0, 3.0]), 4.0]
    for loss in losses:
        stepped(loop, controller, loss)
    assert controller.state_dict()["run"]["losses"] == [1.0, 2.0, 4.0]
