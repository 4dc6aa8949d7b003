"""The design's promise: a policy sees and does the same in a population and attached to an ordinary training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tests.inner_training.problems import family, plain_module, plain_optimizer

from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.levers import LEVERS, resolve_levers
from trimtab.inner_training.measurements import MEASUREMENTS, needs_of
from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule, factor
from trimtab.inner_training.signals import all_signals, resolve_signals
from trimtab.inner_training.steering import Steering
from trimtab.inner_training.task import OptimizerSettings
from trimtab.inner_training.update_rules import UPDATE_RULES
from trimtab.policies.attach import attach
from trimtab.policies.policy import Kind

STEPS, INTERVAL = 50, 5  # a policy decides every 10 steps by default; 5 compares more decisions in as many steps
# A live run does not know its batch size, and cannot take its gradient anew. All other signals are compared.
SEEN = tuple(
    name
    for name, signal in all_signals().items()
    if name != "log_batch" and all(MEASUREMENTS[need].live for need in signal.needs)
)


@dataclass
class Wiggle:
    """Moves all four levers by an amount that depends on every signal, and keeps what it saw and did."""

    name: str = "wiggle"
    signals: tuple[str, ...] = SEEN
    levers: Mapping[str, Kind] = field(default_factory=lambda: dict.fromkeys(LEVERS, "moves"))
    decide_every: int | None = INTERVAL
    seen: list[np.ndarray] = field(default_factory=list)
    done: list[np.ndarray] = field(default_factory=list)

    def init(self, num_runs: int) -> dict[str, Any]:
        return {"count": np.zeros(num_runs)}

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        count = state["count"]
        phase = np.stack([np.sin(1.7 * count + lever) for lever in range(len(self.levers))], 1)
        weights = np.cos(np.arange(len(self.signals) * len(self.levers))).reshape(len(self.signals), -1)
        actions = np.tanh(0.7 * phase + 0.1 * observations.astype(np.float64) @ weights)
        actions[:, 3] -= 1.0  # towards a clip that bites
        actions[:, 0] -= 0.1
        self.seen.append(observations.copy())
        self.done.append(actions.copy())
        return actions, {"count": count + 1}


def in_population(
    policy: Any, settings: OptimizerSettings, schedule: BaseSchedule, *, steps: int = STEPS, interval: int = INTERVAL
) -> np.ndarray:
    population = Population(family(), 1, rules=tuple(UPDATE_RULES), mode="eager")
    population.reset([0], [family().instance(3, settings, schedule=schedule)])
    steering = Steering(resolve_levers(tuple(LEVERS)), resolve_signals(policy.signals), GuardConfig(), 1)
    steering.reset(np.ones(1, dtype=bool), population.base)
    population.measure(needs_of(steering.signals))
    state, measured, val_loss, applied = policy.init(1), None, np.full(1, np.nan), []
    for _ in range(steps // interval + 1):
        reading = population.reading(measured, val_loss)
        health = steering.assess(reading)
        health.carry_out(population)
        actions, state = policy.act(steering.observe(reading), state)
        steering.decide(actions, policy.levers)
        population.set_lr_multiplier(steering.lr_multiplier)
        population.set_hyperparameters(steering.hyperparameters(population.base))
        applied.append(np.append(steering.lr_multiplier, steering.multipliers[0, 1 : len(policy.levers)]))
        measured = population.advance(interval).to_host()
        val_loss = population.evaluate("validation").numpy().astype(np.float64)
    return np.array(applied)


def in_a_plain_loop(
    policy: Any, settings: OptimizerSettings, schedule: BaseSchedule, *, steps: int = STEPS, interval: int = INTERVAL
) -> np.ndarray:
    instance = family().instance(3, settings, schedule=schedule)
    source = Population(family(), 1, rules=tuple(UPDATE_RULES), mode="eager")
    source.reset([0], [instance])
    module = plain_module(instance)
    optimizer = plain_optimizer(module, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(factor(schedule, np.array([step]), instance.steps)[0])
    )
    controller = attach(optimizer, model=module, policy=policy, total_steps=instance.steps, decide_every=interval)
    del policy.seen[:-1], policy.done[:-1]  # the trial that every policy is put to
    applied = [list(controller.multipliers.values())]
    for step in range(steps):
        inputs, labels = source.batch(0, step)
        optimizer.zero_grad()
        loss = family().loss(module(inputs), labels).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        last = (step + 1) % interval == 0
        decision = controller.step(loss, validation_loss(module, instance) if last else None)
        if last:
            applied.append([decision.applied[name] for name in policy.levers])
    return np.array(applied)


def validation_loss(module: torch.nn.Module, instance: Any) -> float:
    part = instance.split("validation")
    inputs = family().inputs[torch.from_numpy(instance.rows[part])] * instance.input_scale
    with torch.no_grad():
        return float(family().loss(module(inputs), torch.from_numpy(instance.labels[part])).mean())


SETTINGS = {
    "sgd-momentum": OptimizerSettings(rule="sgd", lr=0.05, momentum=0.9, weight_decay=1e-3),
    "sgd-nesterov": OptimizerSettings(rule="sgd", lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam": OptimizerSettings(rule="adam", lr=2e-3, weight_decay=1e-3),
    "adamw": OptimizerSettings(rule="adamw", lr=2e-3, weight_decay=1e-2),
    "rmsprop": OptimizerSettings(rule="rmsprop", lr=1e-3, beta2=0.99, weight_decay=1e-3),
    "nadamw": OptimizerSettings(rule="nadamw", lr=2e-3, weight_decay=1e-2),
    "lion": OptimizerSettings(rule="lion", lr=5e-4, beta2=0.99, weight_decay=1e-1),
}


@pytest.mark.parametrize(("name", "schedule"), [*((name, "cosine") for name in SETTINGS), ("adam", "constant")])
def test_observations_and_actions_are_those_of_the_population(name: str, schedule: str) -> None:
    one, other = Wiggle(), Wiggle()
    expected = in_population(one, SETTINGS[name], BaseSchedule(kind=schedule))
    applied = in_a_plain_loop(other, SETTINGS[name], BaseSchedule(kind=schedule))
    decisions = STEPS // INTERVAL + 1
    assert len(one.seen) == len(other.seen) == decisions
    difference = np.abs(np.concatenate(one.seen) - np.concatenate(other.seen))
    worst = np.unravel_index(difference.argmax(), difference.shape)
    # torch's NAdam remembers the momentum of its first steps; see docs/update_rules.md.
    close = 1e-3 if name == "nadamw" else 1e-4
    assert difference.max() < close, f"{SEEN[worst[1]]} at decision {worst[0]}: {difference.max()}"
    np.testing.assert_allclose(np.concatenate(other.done), np.concatenate(one.done), atol=close)
    np.testing.assert_allclose(applied, expected, rtol=close)
    # The comparison means something: every lever moved, and the signals are alive.
    assert (expected.max(0) > 1.2 * expected.min(0)).all()
    assert expected[:, 3].min() < 0.1, "the clip is below the average gradient norm for a while"
    assert (np.concatenate(one.seen).std(0) > 0).sum() >= 30


class Blast(Wiggle):
    """Blows the run up at its fourth decision, and otherwise behaves."""

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        actions = np.where(state["count"][:, None] == 3, 1e4, 1.0)
        self.seen.append(observations.copy())
        self.done.append(actions)
        return actions, {"count": state["count"] + 1}


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
def test_a_divergence_is_undone_alike(name: str) -> None:
    runs = []
    for play in (in_population, in_a_plain_loop):
        policy = Blast(levers={"lr": "targets"})
        applied = play(policy, SETTINGS[name], BaseSchedule(kind="cosine"), steps=80, interval=10)
        runs.append((np.concatenate(policy.seen), applied))
    (expected, multipliers), (seen, applied) = runs
    assert expected[:, SEEN.index("rolled_back")].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    np.testing.assert_allclose(seen, expected, atol=1e-4)
    np.testing.assert_allclose(applied, multipliers, rtol=1e-6)
    assert multipliers[-1, 0] == pytest.approx(0.3)


class Jolt(Wiggle):
    """Damages the weights at its sixth decision, without blowing the run up."""

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        actions = np.where(state["count"][:, None] == 5, 10.0, 1.0)
        self.seen.append(observations.copy())
        self.done.append(actions)
        return actions, {"count": state["count"] + 1}


@pytest.mark.parametrize("name", ["sgd-momentum", "sgd-nesterov"])
def test_a_setback_is_undone_alike(name: str) -> None:
    runs = []
    for play in (in_population, in_a_plain_loop):
        policy = Jolt(levers={"lr": "targets"})
        applied = play(policy, SETTINGS[name], BaseSchedule(), steps=90, interval=10)
        runs.append((np.concatenate(policy.seen), applied))
    (expected, multipliers), (seen, applied) = runs
    assert expected[:, SEEN.index("rolled_back")].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert (expected[:, SEEN.index("caution")] == 0).all()  # the rate is not to blame
    np.testing.assert_allclose(seen, expected, atol=1e-4)
    np.testing.assert_allclose(applied, multipliers, rtol=1e-6)
