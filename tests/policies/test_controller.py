"""The controller: decisions, rollback, faults, advice, saving, and what it refuses."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.policies.live import ALL, Loop, Scripted, adamw, holding, inside, sgd
from tests.policies.made_up import learned
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import AveragedModel

import trimtab
from trimtab.errors import MismatchError, RangeError, UserError
from trimtab.inner_training.edits import EDITS
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.live_snapshot import SPACING
from trimtab.inner_training.schedules import BaseSchedule, factor
from trimtab.inner_training.signals import all_signals
from trimtab.policies.attach import attach
from trimtab.policies.registry import load_policy
from trimtab.policies.rules import RULES

# --- schedules ---------------------------------------------------------------------------------------------------


def test_cosine_is_torchs_cosine_at_every_step() -> None:
    steps = 73
    loop, alone = Loop(sgd), Loop(sgd)
    alone.scheduler = schedulers.CosineAnnealingLR(alone.optimizer, steps)
    loop.controller = attach(loop.optimizer, policy="cosine", total_steps=steps)
    seen, expected = (inside(one.optimizer, lambda group: group["lr"]) for one in (loop, alone))
    for _ in range(steps):
        loop.step()
        alone.step()
        assert loop.optimizer.param_groups[0]["lr"] == 0.05
    np.testing.assert_allclose(seen, expected, atol=1e-6 * 0.05, rtol=0)
    np.testing.assert_allclose(loop.weights(), alone.weights(), atol=1e-5)


LIVE = [name for name in RULES if not EDITS.keys() & load_policy(name).levers.keys()]


@pytest.mark.parametrize("name", [name for name in LIVE if "progress" in RULES[name].needs])
def test_a_schedule_rule_is_exact_at_every_step_from_the_first_on(name: str) -> None:
    loop = Loop(adamw)
    loop.controller = attach(loop.optimizer, policy=name, total_steps=40)
    seen = inside(loop.optimizer, lambda group: group["lr"])
    loop.run(40)
    expected = 0.01 * factor(BaseSchedule(kind=name), np.arange(40), 40)
    np.testing.assert_allclose(seen, expected, atol=1e-8)


def test_a_schedule_measures_over_longer_intervals_than_it_decides() -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy="cosine", total_steps=100)
    sampled = []
    before = loop.controller._run.probe.before

    def watched(*arguments: Any) -> Any:
        sampled.append(loop.controller.steps)
        return before(*arguments)

    loop.controller._run.probe.before = watched  # type: ignore[method-assign]
    loop.run(20)
    assert sampled == [8, 9, 18, 19]
    loop.step(spoil=math.nan)
    loop.run(8)
    assert loop.decisions[-1].rolled_back is False
    loop.step()
    assert loop.decisions[-1].rolled_back, "the guard watches over a schedule too"


def test_policies_work_without_a_budget_and_without_a_validation_loss() -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=learned())
    loop.run(35)
    assert sum(decision.acted for decision in loop.decisions) == 3
    assert all(math.isfinite(value) for value in loop.controller.multipliers.values())


def test_a_validation_loss_is_seen_once_at_the_next_decision() -> None:
    policy = Scripted([[1.0]], signals=("val_available", "val_slope"))
    loop = Loop(sgd)
    controller = attach(loop.optimizer, policy=policy)
    for step in range(15):
        loop.step()
        controller.step(loop.losses[-1], {1: torch.tensor(2.0), 7: 1.0}.get(step))
    seen = np.concatenate(policy.seen[-4:])  # one at the start, then every 5 steps; the trial came before
    assert seen[:, 0].tolist() == [0.0, 1.0, 1.0, 1.0]
    assert seen[2, 1] < -0.1
    assert seen[3, 1] == seen[2, 1], "the averages wait for the next one"


# --- rollback ----------------------------------------------------------------------------------------------------


def divergent(loop: Loop, **options: Any) -> Loop:
    loop.controller = attach(loop.optimizer, model=loop.model, policy=Scripted([[1.0]], decide_every=10), **options)
    return loop


@pytest.mark.parametrize("kind", [sgd, adamw])
@pytest.mark.parametrize("spoil", [math.nan, math.inf])
def test_a_spoiled_gradient_is_undone(kind: Any, spoil: float) -> None:
    loop = divergent(Loop(kind, norm=True))
    loop.run(10)
    confirmed, parameters = loop.weights(), list(loop.model.parameters())
    loop.run(15)
    loop.step(spoil=spoil)
    loop.run(3)
    assert not torch.isfinite(loop.weights()).all()
    loop.step()
    decision = loop.decisions[-1]
    assert decision.rolled_back and decision.acted and "diverged" in decision.reason
    assert torch.equal(loop.weights(), confirmed), "not the candidate of step 20, but the moment before it"
    assert all(one is other for one, other in zip(loop.model.parameters(), parameters, strict=True))
    assert all(torch.isfinite(buffer).all() for buffer in loop.model.buffers())
    assert loop.controller.multipliers == {"lr": 1.0}, "all was calm before, so the rate is not to blame"
    before = np.mean(loop.losses[:10])
    loop.run(100)
    assert np.mean(loop.losses[-10:]) < before and np.isfinite(loop.losses[-100:]).all()
    assert sum(decision.rolled_back for decision in loop.decisions) == 1


def test_an_exploding_rate_is_undone() -> None:
    loop = Loop(sgd)
    table = [[1.0], [1.0], [1.0], [1e4], [1.0]]
    loop.controller = attach(loop.optimizer, model=loop.model, policy=Scripted(table, decide_every=10))
    loop.run(150)
    assert [index + 1 for index, one in enumerate(loop.decisions) if one.rolled_back] == [40]
    assert np.mean(loop.losses[-20:]) < 0.5 * np.mean(loop.losses[:20])
    assert loop.optimizer.param_groups[0]["lr"] == 0.05


def test_the_optimizer_state_is_rolled_back_in_place() -> None:
    loop = divergent(Loop(adamw))
    loop.run(10)
    state = loop.optimizer.state[next(loop.model.parameters())]
    saved, held = copy.deepcopy(state), dict(state)
    loop.run(12)
    loop.step(spoil=math.nan)
    loop.run(7)
    assert loop.decisions[-1].rolled_back
    for key, value in saved.items():
        assert torch.equal(state[key], value)
        assert state[key] is held[key]


def test_a_run_that_diverges_at_once_starts_over() -> None:
    loop = divergent(Loop(sgd))
    start = loop.weights()
    loop.step(spoil=math.nan)
    loop.run(9)
    assert loop.decisions[-1].rolled_back and torch.equal(loop.weights(), start)
    assert all("momentum_buffer" not in state for state in loop.optimizer.state.values())


def test_weights_loaded_after_attaching_are_what_a_rollback_returns_to() -> None:
    loop = divergent(Loop(sgd))
    with torch.no_grad():
        for parameter in loop.model.parameters():
            parameter.add_(0.5)
    start = loop.weights()
    loop.step(spoil=math.nan)
    loop.run(9)
    assert torch.equal(loop.weights(), start)


@pytest.mark.parametrize("together", [True, False])
def test_a_stateful_scheduler_is_rolled_back_with_its_rate_or_goes_on(together: bool) -> None:
    loop = Loop(sgd)
    loop.scheduler = schedulers.ExponentialLR(loop.optimizer, 0.99)
    average = AveragedModel(loop.model)
    divergent(loop, stateful=(loop.scheduler, average) if together else (average,))
    kept = {}
    for step in range(30):
        loop.step(spoil=math.nan if step == 22 else None)
        average.update_parameters(loop.model)
        if step == 9:
            kept = copy.deepcopy(average.state_dict())
    # The average was updated once more after the rollback of step 30: take the present back out by restoring again.
    assert loop.decisions[-1].rolled_back
    loop.controller._snapshots.restore()
    assert average.state_dict()["n_averaged"] == kept["n_averaged"] - 1
    assert torch.isfinite(torch.cat([value.float().reshape(-1) for value in average.state_dict().values()])).all()
    expected = 10 if together else 30
    assert loop.scheduler.last_epoch == expected
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.99**expected, rel=1e-12)
    before = loop.weights()
    loop.step()
    assert not torch.equal(loop.weights(), before), "the optimizer still trains the model, not copies of it"


def test_a_lost_run_gets_its_last_sound_weights_and_its_base_schedule_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    loop = Loop(sgd)
    policy = Scripted([[0.5]], decide_every=10)
    loop.controller = attach(loop.optimizer, policy=policy, guard=GuardConfig(rollback_budget=1))
    sound = loop.weights()
    for step in range(40):
        loop.step(spoil=math.nan if step % 10 == 3 else None)
        if step == 19:
            assert torch.equal(loop.weights(), sound), "one last time, whatever the budget"
    assert [decision.rolled_back for decision in loop.decisions[9::10]] == [True, True, False, False]
    assert [record.message for record in caplog.records if "no rollback left" in record.message]
    assert loop.controller.multipliers == {"lr": 1.0}
    assert "stands back" in loop.decisions[-1].reason
    assert not loop.decisions[-1].acted and loop.decisions[19].acted


@pytest.mark.parametrize("guard", [False, GuardConfig(rollback=False)])
def test_without_a_guard_nothing_is_kept_or_restored(guard: Any) -> None:
    loop = divergent(Loop(sgd), guard=guard)
    assert loop.controller._snapshots is None
    loop.step(spoil=math.nan)
    loop.run(29)
    assert not any(decision.rolled_back for decision in loop.decisions)
    assert not torch.isfinite(loop.weights()).all()


def test_a_policy_that_decides_often_does_not_copy_often(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=Scripted([[1.0]], decide_every=2))
    taken = []
    snapshots = loop.controller._snapshots
    present = snapshots._present
    monkeypatch.setattr(snapshots, "_present", lambda step, *room: taken.append(step) or present(step, *room))
    loop.run(40)
    assert taken == [0, 10, 20, 30, 40] and SPACING[0] == 10


# --- faults and advice --------------------------------------------------------------------------------------------


def test_a_policy_that_raises_holds_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    loop, alone = Loop(sgd), Loop(lambda p: torch.optim.SGD(p, lr=0.025, momentum=0.9, weight_decay=1e-3))
    loop.controller = attach(loop.optimizer, policy=Scripted([[0.5], [0.1]], fail_at=1))
    loop.run(20)
    alone.run(20)
    assert torch.equal(loop.weights(), alone.weights())
    assert "every lever holds" in loop.decisions[14].reason and not loop.decisions[14].acted
    assert len(caplog.records) == 1 and "scripted failure" in caplog.text


def _broken(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError("broken")


class Wide(Scripted):
    """Answers for a lever too many when it is told to."""

    wide = False

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        actions, state = super().act(observations, state)
        return np.repeat(actions, 1 + self.wide, 1), state


POLICYS, OWN = "the policy raised", "could not be measured or judged, which is no fault of the policy"


@pytest.mark.parametrize(
    ("broken", "said", "logged"),
    [
        ("policy", POLICYS, "policy 'scripted' failed to answer, so every lever holds: FloatingPointError"),
        ("shape", POLICYS, "policy 'scripted' failed to answer, .*: actions of shape"),
        ("reading", OWN, "the run could not be .* no fault of policy 'scripted', .*: MemoryError"),
        ("assess", OWN, "the run could not be .* no fault of policy 'scripted', .*: MemoryError"),
        ("observe", OWN, "the run could not be .* no fault of policy 'scripted', .*: MemoryError"),
        ("decide", OWN, "the run could not be .* no fault of policy 'scripted', .*: MemoryError"),
        ("loss", OWN, "the run could not be .* no fault of policy 'scripted', .*: .*the mean loss is -1"),
    ],
)
def test_whose_fault_it_is_is_said(
    broken: str, said: str, logged: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    loop, policy = Loop(sgd), Wide([[0.5]])
    loop.controller = attach(loop.optimizer, policy=policy)
    if broken in ("policy", "shape"):
        policy.fail_at, policy.wide = (0, False) if broken == "policy" else (None, True)
    elif broken == "reading":
        monkeypatch.setattr(loop.controller._run, "reading", _broken)
    elif broken == "loss":
        step = loop.controller.step
        monkeypatch.setattr(loop.controller, "step", lambda loss: step(-loss.detach().sign()))
    else:
        monkeypatch.setattr(loop.controller._steering, broken, _broken)
    loop.run(10)
    (reason,) = {one.reason for one in loop.decisions if one.reason != "between decisions"}
    assert [one for one in (POLICYS, OWN) if one in reason] == [said]
    assert loop.controller.multipliers == {"lr": 0.5}
    assert len(caplog.records) == 1 and re.search(logged, caplog.text)


@pytest.mark.parametrize("kind", ["moves", "targets"])
def test_levers_of_a_policy_that_goes_on_raising_return_to_null_until_it_answers(kind: Any) -> None:
    policy = Scripted([[0.1], [0.1], [1.0]], levers={"lr": kind}, decide_every=1, fail_at=1)
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=policy)
    loop.controller._steering.multipliers[:] = 0.1
    rates = [loop.step() and loop.decisions[-1].applied["lr"] for _ in range(7)]
    expected = [0.1, 0.1, 0.1, 0.1 * math.e, 0.1 * math.e**2, 1.0, 1.0]
    assert rates == pytest.approx(expected)
    told = [one.reason for one in loop.decisions]
    assert ["returns towards null" in one for one in told] == [False] * 3 + [True] * 3 + [False]
    assert not any("moved by the policy" in one for one in told), "it is the guard that moves it"
    assert "the policy raised" in told[-1]
    policy.fail_at = None
    loop.step()
    assert loop.decisions[-1].applied["lr"] == pytest.approx(math.exp(0.1) if kind == "moves" else 0.1)


def test_a_controller_that_is_switched_off_takes_its_levers_up_again_where_they_were() -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=Scripted([[0.1]], decide_every=1))
    loop.controller.switch_off()
    loop.run(8)
    loop.controller.switch_on()
    assert loop.controller.multipliers == {"lr": 0.1}


@pytest.mark.parametrize(("kind", "value"), [("moves", math.nan), ("targets", math.nan), ("moves", -math.inf)])
def test_actions_that_are_no_numbers_are_the_identity(kind: Any, value: float) -> None:
    loop, alone = Loop(sgd), Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=Scripted([[value]], levers={"lr": kind}))
    loop.run(20)
    alone.run(20)
    assert torch.equal(loop.weights(), alone.weights())
    assert "not a finite number" in loop.decisions[4].reason


def test_a_policy_sees_how_much_of_its_deadline_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("trimtab.inner_training.live_run.time.monotonic", lambda: now[0])
    policy = Scripted([[1.0]], signals=("deadline_available", "deadline_left"), decide_every=5)
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=policy)
    assert loop.controller.deadline is None
    loop.controller.deadline = 40.0
    for _ in range(15):
        loop.step()
        now[0] += 2.0
    np.testing.assert_allclose(policy.seen[-3:], [[[1, 0.8]], [[1, 0.55]], [[1, 0.3]]], atol=1e-6)
    with pytest.raises(RangeError, match="deadline is -1; give seconds above 0"):
        loop.controller.deadline = -1


def test_signals_that_nobody_measures_here_are_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    policy = Scripted([[1.0]], signals=("started", "sharpness", "dormant", "grad_sparsity"))
    for loop, model in ((Loop(sgd), False), (Loop(sgd), True)):
        attach(loop.optimizer, model=loop.model if model else None, policy=policy)
    without, given = (record.message for record in caplog.records)
    assert "only a population can measure sharpness; give attach(..., model=...) for dormant" in without
    assert "only a population can measure sharpness; what they would tell" in given


def test_actions_of_another_shape_change_no_lever_at_all(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(sgd)
    policy = Scripted([[0.0, 0.0]], levers={"lr": "moves", "momentum": "moves"})
    loop.controller = attach(loop.optimizer, policy=policy)
    policy.table = [[1.0]]
    loop.run(5)
    assert loop.controller.multipliers == {"lr": 1.0, "momentum": 1.0}
    assert "shape (1, 1)" in caplog.text


def test_levers_that_the_optimizer_lacks_say_so() -> None:
    loop = Loop(lambda p: torch.optim.Adagrad(p, lr=0.05))
    policy = Scripted([[0.5, 0.5, 0.5, 0.5]], levers=dict(ALL), signals=tuple(f"{name}_available" for name in ALL))
    loop.controller = attach(loop.optimizer, policy=policy)
    loop.run(5)
    assert policy.seen[-1].tolist() == [[1.0, 0.0, 0.0, 1.0]]
    assert loop.controller.multipliers["momentum"] == loop.controller.multipliers["weight_decay"] == 1.0
    assert "does not exist for this run" in loop.decisions[-1].reason


def test_advice_touches_nothing() -> None:
    loop, alone = Loop(sgd), Loop(sgd)
    policy = Scripted([[-0.7, 0.5, 0.3, -1.0]], levers=dict(ALL), signals=("lr_position", "lr_moved", "grad_level"))
    loop.controller = attach(loop.optimizer, model=loop.model, policy=policy, mode="advise")
    for step in range(25):
        loop.step(spoil=math.nan if step == 22 else None)
        alone.step(spoil=math.nan if step == 22 else None)
        assert loop.controller.multipliers == dict.fromkeys(ALL, 1.0)
        if step < 22:
            assert torch.equal(loop.weights(), alone.weights())
    assert not any(decision.acted or decision.rolled_back for decision in loop.decisions)
    assert loop.decisions[4].reason.startswith("advice only: moved by the policy")
    assert all((seen[:, :2] == 0).all() for seen in policy.seen), "the levers stand where they stood"
    assert "would have changed a lever" in loop.controller.summary()


# --- switches -------------------------------------------------------------------------------------------------------


def half_rate(optimizer: torch.optim.Optimizer) -> list[float]:
    """Collects the learning rate inside each step."""
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: rates.append(opt.param_groups[0]["lr"]))
    return rates


def test_switched_off_the_run_goes_on_by_its_own_settings() -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=Scripted([[0.5]], decide_every=5))
    rates = half_rate(loop.optimizer)
    loop.run(3)
    loop.controller.switch_off()
    assert not loop.controller.enabled and loop.controller.multipliers == {"lr": 1.0}
    loop.run(9)
    assert any("switched off" in decision.reason for decision in loop.decisions)
    loop.controller.switch_on()
    loop.run(2)
    assert rates == [0.025] * 3 + [0.05] * 9 + [0.025] * 2


def test_an_environment_variable_switches_off(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=Scripted([[0.5]], decide_every=5))
    rates = half_rate(loop.optimizer)
    loop.run(3)
    monkeypatch.setenv("TRIMTAB_OFF", "1")
    loop.run(5)
    monkeypatch.setenv("TRIMTAB_OFF", "0")
    loop.run(4)
    assert rates == [0.025] * 5 + [0.05] * 5 + [0.025] * 2, "it is looked up at decisions"


def test_a_late_answer_is_not_used_and_a_slow_policy_not_asked_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("trimtab.policies.listening.time.monotonic", lambda: clock[0])

    class Slow(Scripted):
        asked = 0

        def act(self, observations: np.ndarray, state: Any) -> Any:
            self.asked += 1
            clock[0] += 5.0 if self.asked in (2, 5, 7, 8) else 0.1  # after the trial, the first and four more
            return super().act(observations, state)

    loop, policy = Loop(sgd), Slow([[0.5]], decide_every=5)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=policy)
    assert loop.controller.multipliers["lr"] == 0.5, "the first answer may take its time"
    loop.run(60)
    late = [index for index, decision in enumerate(loop.decisions) if "took longer" in decision.reason]
    assert late == [14, 24, 29, 34, 39, 44, 49, 54, 59] and policy.asked == 8
    with pytest.raises(UserError, match="time_limit"):
        loop.controller.time_limit = 0


def test_a_policy_forgets_what_led_to_an_answer_that_is_no_number() -> None:
    class Remembering(Scripted):
        def act(self, observations: np.ndarray, state: Any) -> Any:
            actions, after = super().act(observations, state)
            return (
                (np.full_like(actions, np.nan), {"count": after["count"] * 0 - 7})
                if state["count"][0] == 2
                else (actions, after)
            )

    loop, policy = Loop(sgd), Remembering([[1.0], [0.5], [0.25]], decide_every=5)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=policy)
    loop.run(20)
    assert loop.controller._listener.state["count"].tolist() == [2]


def test_signals_beyond_their_ranges_in_training_are_not_acted_on() -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, model=loop.model, policy="default", total_steps=200)
    steering = loop.controller._steering
    assert steering.ranges is not None
    loop.run(20)
    before = loop.controller.multipliers
    steering.ranges = np.full_like(steering.ranges[0], 2.0), np.full_like(steering.ranges[1], 3.0)
    loop.run(10)
    assert "outside what the policy met" in loop.decisions[-1].reason
    assert loop.controller.multipliers == before


# --- summary ------------------------------------------------------------------------------------------------------


def test_the_summary_says_what_changed_why_and_what_came_of_it() -> None:
    loop = Loop(sgd)
    policy = Scripted([[1.0], [1.0], [0.5], [0.5]], signals=("loss_slope", "lr_position"))
    loop.controller = attach(loop.optimizer, model=loop.model, policy=policy)
    for step in range(60):
        loop.step(spoil=math.nan if step == 47 else None)
    text = loop.controller.summary()
    assert text.splitlines()[0] == (
        "policy scripted, mode act: 60 steps, 13 decisions, 1 of which changed a lever, rollbacks: 1"
    )
    assert "lr: now x0.5, between x0.5 and x1" in text
    assert "1 x the run diverged, so the last stable snapshot was restored" in text
    assert "step 10: lr x1 -> x0.5; moved by the policy (loss_slope " in text
    fell = math.log(np.mean(loop.losses[10:15])) - math.log(np.mean(loop.losses[5:10]))
    assert f"the loss then went {'up' if fell > 0 else 'down'} {abs(100 * math.expm1(fell)):.1f} %" in text
    assert "an association" in text


# --- saving -------------------------------------------------------------------------------------------------------


def reactive() -> Scripted:
    """Reads every signal; moves depend on them through numpy, in ``act`` of the class below."""
    return Reactive([[0.0] * 4], levers=dict(ALL), signals=tuple(all_signals()))


class Reactive(Scripted):
    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        weights = np.cos(np.arange(4 * len(self.signals))).reshape(-1, 4)
        return np.tanh(0.3 * observations @ weights - 0.1), {"count": state["count"] + 1}


@pytest.mark.parametrize("at", [0, 10, 11, 13, 15])
@pytest.mark.parametrize("policy", ["reactive", "random", "greedy"])
def test_a_saved_run_continues_identically(policy: str, at: int) -> None:
    def build() -> Loop:
        loop = Loop(adamw)
        loop.scheduler = schedulers.LambdaLR(loop.optimizer, lambda step: 0.99**step)
        chosen = reactive() if policy == "reactive" else policy
        loop.controller = attach(loop.optimizer, model=loop.model, policy=chosen, decide_every=5)
        return loop

    straight, first = build(), build()
    straight.run(at + 23)
    first.run(at)
    states = [copy.deepcopy(one.state_dict()) for one in (first.model, first.optimizer, first.scheduler)]
    text = json.dumps(first.controller.state_dict())
    second = build()
    for one, state in zip((second.model, second.optimizer, second.scheduler), states, strict=True):
        one.load_state_dict(state)
    second.controller.load_state_dict(json.loads(text))
    second.done = at
    assert second.controller.multipliers == first.controller.multipliers
    second.run(23)
    assert torch.equal(second.weights(), straight.weights())
    assert second.decisions == straight.decisions[at:]
    assert second.controller.summary() == straight.controller.summary()
    assert json.dumps(second.controller.state_dict()) == json.dumps(straight.controller.state_dict())


def test_saved_between_the_two_samples_only_their_inner_product_is_lost() -> None:
    loop, other = Loop(sgd), Loop(sgd)
    policies = [Scripted([[1.0]], signals=("grad_cosine", "grad_level", "update_ratio", "loss_level")) for _ in "ab"]
    loop.controller = attach(loop.optimizer, policy=policies[0])
    loop.run(4)
    other.controller = attach(other.optimizer, policy=policies[1])
    other.model.load_state_dict(loop.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
    other.controller.load_state_dict(loop.controller.state_dict())
    other.done = 4
    loop.step()
    other.step()
    seen, expected = policies[1].seen[-1][0], policies[0].seen[-1][0]
    assert seen[0] == 0 and expected[0] != 0
    np.testing.assert_array_equal(seen[1:], expected[1:])


def test_loading_verifies_the_rate_and_changes_nothing_when_it_refuses() -> None:
    def build(policy: Any = "greedy", **options: Any) -> Loop:
        loop = Loop(sgd)
        loop.scheduler = schedulers.ExponentialLR(loop.optimizer, 0.9)
        loop.controller = attach(loop.optimizer, policy=policy, decide_every=5, **options)
        return loop

    saved = build().run(12).controller.state_dict()
    for loop, state, message in [
        (build(), saved, "restore the optimizer and its scheduler before the controller"),
        (build("plateau"), saved, "saved with policy 'greedy', but this controller has 'plateau'"),
        (build(), {"steps": 3}, "it has no 'format'"),
    ]:
        before = json.dumps(loop.controller.state_dict())
        with pytest.raises(MismatchError, match=message):
            loop.controller.load_state_dict(state)
        assert json.dumps(loop.controller.state_dict()) == before


def test_a_resumed_run_rolls_back_to_where_it_resumed() -> None:
    loop = divergent(Loop(sgd))
    loop.run(20)
    state = loop.controller.state_dict()
    other = divergent(Loop(sgd)).run(12)
    other.model.load_state_dict(loop.model.state_dict())
    other.controller.load_state_dict(state)
    resumed = other.weights()
    other.step(spoil=math.nan)
    other.run(9)
    assert other.decisions[-1].rolled_back and torch.equal(other.weights(), resumed)


# --- refusals -----------------------------------------------------------------------------------------------------


class Unsaved:
    """Has no state_dict."""


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "foreign model": ({"model": torch.nn.Linear(2, 2)}, "do not belong to the model"),
    "no module": ({"model": 3}, "model is a int; it must be a torch.nn.Module"),
    "no steps": ({"total_steps": 0}, "total_steps is 0; it must be at least 1"),
    "negative steps": ({"total_steps": -5}, "total_steps is -5; it must be at least 1"),
    "half a step": ({"total_steps": 1.5}, "total_steps is 1.5; .* a whole number"),
    "never decides": ({"decide_every": 0}, "decide_every is 0; it must be at least 1"),
    "unknown mode": ({"mode": "advice"}, "unknown mode 'advice'; did you mean 'advise'"),
    "unknown policy": ({"policy": "cosin"}, "unknown policy 'cosin'; did you mean 'cosine'"),
    "not a policy": ({"policy": 7}, "is not a policy"),
    "unknown signal": ({"policy": Scripted([[1.0]], signals=("loss_slop",))}, "did you mean 'loss_slope'"),
    "unknown lever": ({"policy": Scripted([[1.0]], levers={"rate": "moves"})}, "unknown lever 'rate'"),
    "schedule without budget": ({"policy": "cosine"}, r"give attach\(..., total_steps=...\)"),
    "own schedule without budget": (
        {"policy": Scripted([[1.0]], signals=("progress",))},
        "'scripted' follows the budget",
    ),
    "guard": ({"guard": True}, "guard is True; it must be None"),
    "envelope": (
        {"guard": GuardConfig(curvature_share=0.5)},
        "the guard's curvature_share needs the measurement 'curvature_max', which only a population can take; leave it out",
    ),
    "stateful": ({"stateful": (Unsaved(),)}, "holds a Unsaved, which has no state_dict"),
    "stateful object": ({"stateful": torch.nn.Linear(1, 1)}, "stateful is a Linear; it must be a tuple"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_and_nothing_is_touched(name: str) -> None:
    options, message = REFUSED[name]
    loop = Loop(sgd)
    with pytest.raises(UserError, match=message):
        attach(loop.optimizer, **{"policy": holding(), **options})
    assert "step" not in vars(loop.optimizer) and not loop.optimizer._optimizer_step_pre_hooks
    attach(loop.optimizer, policy=holding())


def test_optimizers_that_cannot_be_steered_are_refused() -> None:
    loop = Loop(sgd)
    attach(loop.optimizer, policy=holding())
    with pytest.raises(UserError, match=r"has a controller already; call detach\(\)"):
        attach(loop.optimizer, policy=holding())
    with pytest.raises(MismatchError, match="this is not the state of a controller"):
        attach(Loop(sgd).optimizer, policy=holding()).load_state_dict(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"Linear is not a torch.optim.Optimizer"):
        attach(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    frozen = torch.optim.SGD([torch.zeros(2)], lr=0.1)
    with pytest.raises(UserError, match="no parameters that require a gradient"):
        attach(frozen, policy=holding())


def test_a_loss_that_is_no_number_is_refused() -> None:
    loop = Loop(sgd)
    controller = attach(loop.optimizer, policy=holding())
    with pytest.raises(UserError, match="loss is None; it must be a number or a tensor"):
        controller.step(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="val_loss is 'x'"):
        controller.step(1.0, "x")  # type: ignore[arg-type]


def test_losses_may_be_numbers_or_tensors_of_any_shape() -> None:
    seen = []
    for convert in (
        torch.Tensor.item,
        lambda loss: loss,
        lambda loss: loss.detach().double(),
        lambda loss: loss.expand(3),
    ):
        loop = Loop(sgd)
        policy = Scripted([[0.9]], signals=("loss_level", "loss_noise"))
        controller = attach(loop.optimizer, policy=policy)
        for _ in range(10):
            loop.optimizer.zero_grad()
            loss = loop.loss()
            loss.backward()
            loop.optimizer.step()
            loop.done += 1
            controller.step(convert(loss))
        seen.append(np.concatenate(policy.seen))
    for other in seen[1:]:
        np.testing.assert_allclose(other, seen[0], atol=1e-6)


def test_the_public_name_and_the_bundle_path(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    trimtab.save_policy(learned(), path)
    loop = Loop(sgd)
    loop.controller = trimtab.attach(loop.optimizer, model=loop.model, policy=path, total_steps=50)
    loop.run(25)
    assert isinstance(loop.controller, trimtab.Controller)
    assert loop.controller.multipliers["lr"] != 1.0


@pytest.mark.parametrize(
    ("total", "given", "wanted"), [(None, None, 10), (500, None, 10), (20_000, None, 200), (20_000, 50, 50)]
)
def test_a_learned_policy_takes_at_most_about_a_hundred_decisions(
    total: int | None, given: int | None, wanted: int
) -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=learned(), total_steps=total, decide_every=given)
    assert loop.controller.state_dict()["decide_every"] == wanted


def test_what_fails_to_be_kept_or_put_back_is_named_and_spoils_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    class Fragile:
        """Fails when asked to."""

        saves = loads = True

        def state_dict(self) -> dict[str, int]:
            if not self.saves:
                raise RuntimeError("no disk")
            return {"a": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            if not self.loads:
                raise RuntimeError("no disk")

    class Plain:
        """Counts what it is given."""

        loaded = 0

        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.loaded += 1

    caplog.set_level(logging.WARNING, "trimtab")
    loop, fragile, plain = Loop(sgd), Fragile(), Plain()
    policy = Scripted([[0.5]], decide_every=10)
    loop.controller = attach(loop.optimizer, policy=policy, stateful=(fragile, plain))
    loop.run(20)
    fragile.saves = False
    loop.run(20)
    assert len(policy.seen) == 6, (
        "the policy is asked all the same"
    )  # once by the check, at first, and at four decisions
    assert "taking a snapshot failed" in caplog.text and "no disk" in caplog.text
    fragile.loads = False
    loop.step(spoil=math.nan)
    loop.run(9)
    assert loop.decisions[-1].rolled_back and torch.isfinite(loop.weights()).all() and plain.loaded == 1
    assert "the model and its optimizer went back, but not Fragile" in caplog.text


def test_parameters_that_came_later_are_rolled_back_too() -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=Scripted([[0.5]], decide_every=10))
    loop.run(20)
    late = torch.nn.Parameter(torch.ones(2))
    loop.optimizer.add_param_group({"params": [late]})
    loop.run(10)
    with torch.no_grad():
        late.fill_(math.nan)
    late.grad = torch.zeros(2)
    loop.run(10)
    assert loop.decisions[-1].rolled_back and late.tolist() == [1.0, 1.0]


def test_a_wrapped_scheduler_goes_back_with_its_rate() -> None:
    class Wrapped:
        """As Accelerate wraps them."""

        def __init__(self, scheduler: Any, optimizer: Any) -> None:
            self.scheduler, self.optimizers = scheduler, [type("Wrapper", (), {"optimizer": optimizer})()]
            self.state_dict, self.load_state_dict = scheduler.state_dict, scheduler.load_state_dict

    loop = Loop(sgd)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.99)
    loop.controller = attach(
        loop.optimizer, policy=Scripted([[0.5]], decide_every=10), stateful=(Wrapped(scheduler, loop.optimizer),)
    )
    for step in range(40):
        loop.step(spoil=math.nan if step == 32 else None)
        if step < 39:
            scheduler.step()
    assert loop.decisions[-1].rolled_back
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(scheduler.base_lrs[0] * 0.99**scheduler.last_epoch)
