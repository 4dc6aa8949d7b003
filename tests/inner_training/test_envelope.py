"""The statements of docs/theory.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import RangeError
from trimtab.inner_training.envelope import (
    LEAST_LIMIT,
    curvature_ceiling,
    decay_ceiling,
    stable_rate,
    switching_rate,
)
from trimtab.inner_training.guard import Guard, GuardConfig, Reason
from trimtab.inner_training.levers import resolve_levers
from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.signals import resolve_signals
from trimtab.inner_training.steering import Steering
from trimtab.inner_training.task import Instance, OptimizerSettings
from trimtab.inner_training.tasks.quadratic import Quadratic, largest_eigenvalue, least_loss

MOMENTA = (0.0, 0.5, 0.9, 0.99)


def step_matrix(gain: float, momentum: float, *, nesterov: bool = False) -> np.ndarray:
    """One step along an eigenvector: (error, error before) to (error after, error); ``gain`` is rate x eigenvalue."""
    if nesterov:  # the gradient is taken where momentum leads
        return np.array([[(1 + momentum) * (1 - gain), -momentum * (1 - gain)], [1.0, 0.0]])
    return np.array([[1 + momentum - gain, -momentum], [1.0, 0.0]])


def growth(*matrices: np.ndarray) -> float:
    """Largest factor of one round of a periodic sequence of steps."""
    product = np.linalg.multi_dot([*matrices, np.eye(2)]) if len(matrices) > 1 else matrices[0]
    return float(np.abs(np.linalg.eigvals(product)).max())


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_constant_rate_is_stable_exactly_below_its_limit(momentum: float, nesterov: bool) -> None:
    limit = stable_rate(1.0, momentum, nesterov=nesterov)
    assert limit >= LEAST_LIMIT
    for share in (0.01, 0.5, 0.999):
        assert growth(step_matrix(share * limit, momentum, nesterov=nesterov)) < 1
    assert growth(step_matrix(1.001 * limit, momentum, nesterov=nesterov)) > 1


@pytest.mark.parametrize("momentum", MOMENTA)
def test_the_switching_limit_is_the_circle_criterion(momentum: float) -> None:
    z = np.exp(1j * np.linspace(1e-4, np.pi, 200_000))
    least = (z / ((z - 1) * (z - momentum))).real.min()
    assert switching_rate(1.0, momentum) == pytest.approx(-1 / least, rel=1e-3)
    assert switching_rate(1.0, momentum) <= stable_rate(1.0, momentum)


@pytest.mark.parametrize("momentum", MOMENTA)
@given(shares=st.lists(st.floats(0.001, 1), min_size=2, max_size=8))
@settings(max_examples=50, deadline=None)
def test_no_periodic_sequence_below_the_switching_limit_diverges(momentum: float, shares: list[float]) -> None:
    limit = switching_rate(1.0, momentum)
    assert growth(*(step_matrix(share * limit, momentum) for share in shares)) < 1


def test_stable_rates_that_alternate_may_diverge_together() -> None:
    low, high = 0.05, 3.0
    assert high < stable_rate(1.0, 0.9)
    assert growth(step_matrix(low, 0.9)) < 1 and growth(step_matrix(high, 0.9)) < 1
    assert growth(step_matrix(low, 0.9), step_matrix(high, 0.9)) == pytest.approx(3.6, abs=0.05)


# --- runs ---------------------------------------------------------------------------------------------------------


def whole_batch(rate_over_limit: float, momentum: float = 0.0) -> tuple[Population, Instance]:
    """A run of exact gradient descent on a quadratic, at a share of its stability limit without momentum."""
    family = Quadratic("quadratic", "test")
    family.max_batch = 512
    drawn = family.draw(3, held_out=False)
    rate = rate_over_limit * stable_rate(largest_eigenvalue(drawn))
    optimizer = OptimizerSettings(rule="sgd", lr=rate, momentum=momentum)
    instance = replace(
        drawn, batch_size=drawn.sizes[0], optimizer=optimizer, schedule=BaseSchedule(), steps=2000, input_scale=1.0
    )
    made = Population(family, 1, mode="eager", clip=False)
    made.reset([0], [instance])
    return made, instance


@pytest.mark.parametrize("seed", range(3))
def test_any_bounded_multipliers_are_stable_below_the_limit(seed: int) -> None:
    highest = 8.0
    run, instance = whole_batch(0.99 / highest)
    rng, losses = np.random.default_rng(seed), []
    for _ in range(60):
        run.set_lr_multiplier(np.exp(rng.uniform(-np.log(highest), np.log(highest), 1)))
        losses.append(run.advance(5).to_host().losses[:, 0])
    excess = np.concatenate(losses) - least_loss(instance)
    assert (np.diff(excess) <= 1e-6).all()
    assert excess[-1] < 0.5 * excess[0]


def test_a_multiplier_beyond_the_limit_diverges() -> None:
    run, _ = whole_batch(0.99)
    before = run.advance(5).to_host().losses[-1, 0]
    run.set_lr_multiplier(np.array([1.5]))
    assert not run.advance(200).to_host().losses[-1, 0] < 1e3 * before


def steered(
    config: GuardConfig, decisions: int, momentum: float = 0.0, moves: Sequence[float] = (1.0,)
) -> tuple[np.ndarray, int, Steering]:
    """Losses and rollbacks of a quadratic run under a policy that makes ``moves`` in turn: by default it wants more."""
    run, _ = whole_batch(0.2, momentum)
    levers = resolve_levers(("lr",))
    steering = Steering(levers, resolve_signals(("started",)), config, 1)
    run.measure(config.needs, 1)
    steering.reset(np.array([True]), run.base)
    steering.assess(run.reading(None, np.full(1, np.nan)))
    losses = []
    for decision in range(decisions):
        steering.decide(np.full((1, 1), moves[decision % len(moves)]), {"lr": "moves"})
        run.set_lr_multiplier(steering.lr_multiplier)
        measured = run.advance(5).to_host()
        losses.append(measured.losses[:, 0])
        health = steering.assess(run.reading(measured, np.full(1, np.nan)))
        run.snapshot(health.stable)
        run.restore(health.rollback)
    return np.concatenate(losses), int(steering.guard.rollbacks[0]), steering


def test_the_envelope_holds_a_reckless_policy() -> None:
    _, rollbacks, _ = steered(GuardConfig(), 40)
    assert rollbacks > 0
    losses, rollbacks, steering = steered(GuardConfig(curvature_share=0.5), 40)
    assert rollbacks == 0
    assert np.isfinite(losses).all() and losses[-5:].mean() < losses[:5].mean()
    move = steering.decide(np.ones((1, 1)), {"lr": "moves"})
    assert move.reasons[0, 0] & Reason.ENVELOPE
    assert steering.lr_multiplier[0] == steering.guard.ceiling[0] < move.after[0, 0]


# Three up and three down: as fast as the lever's rate limit lets a policy alternate by more than one move.
@pytest.mark.parametrize("moves", [(1.0,), (1.0, 1.0, 1.0, -1.0, -1.0, -1.0)])
@pytest.mark.parametrize("momentum", [0.9])
def test_the_envelope_holds_with_momentum_at_the_speed_that_levers_have(
    momentum: float, moves: tuple[float, ...]
) -> None:
    losses, rollbacks, steering = steered(GuardConfig(curvature_share=0.9), 40, momentum, moves)
    assert rollbacks == 0 and steering.guard.ceiling[0] < np.inf
    assert np.isfinite(losses).all() and losses[-5:].mean() < losses[:5].mean()


@pytest.mark.parametrize(("start", "rate", "converges"), [(1.0, 0.9, True), (1.0, 1.1, False), (2.2, 0.9, False)])
def test_two_layers_have_no_stable_minimum_above_a_rate(start: float, rate: float, converges: bool) -> None:
    u, v, target = start, 0.6 * start, 1.0
    for _ in range(3000):
        error = u * v - target
        u, v = u - rate * error * v, v - rate * error * u
        if abs(u) + abs(v) > 1e6:
            break
    assert (abs(u * v - target) < 1e-3) == converges


@pytest.mark.parametrize("start", [1.0, 2.2])
def test_rates_below_the_measured_curvature_make_two_layers_descend(start: float) -> None:
    w, target = np.array([start, 0.6 * start]), 1.0

    def loss(w: np.ndarray) -> float:
        return float((w[0] * w[1] - target) ** 2 / 2)

    for _ in range(200):
        error = w[0] * w[1] - target
        gradient = error * w[::-1]
        if np.linalg.norm(gradient) < 1e-9:
            break
        direction = gradient / np.linalg.norm(gradient)
        hessian = np.outer(w[::-1], w[::-1]) + error * np.array([[0.0, 1.0], [1.0, 0.0]])
        rate = min(curvature_ceiling(np.array([direction @ hessian @ direction]), 0.5)[0], 0.9)
        assert loss(w - rate * gradient) <= loss(w)
        w = w - rate * gradient
    assert loss(w) < 1e-6


# --- the sum conditions and the guard ------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.6, 0.75, 1.0])
def test_the_decaying_ceiling_makes_squares_summable(power: float) -> None:
    steps = np.arange(10**6, dtype=np.float64)
    rates = decay_ceiling(np.array([0.5]), steps, power, 100)
    squares, halves = np.cumsum(rates**2), len(steps) // 2
    tail = squares[-1] - squares[halves]
    # The rest of a convergent sum of t^(-2p): what came between half of the steps and all bounds what will ever come.
    assert tail * (1 / (1 - 2.0 ** (1 - 2 * power))) < squares[-1]
    assert np.cumsum(rates)[-1] > 2 * np.cumsum(rates)[1000]


def test_the_guard_holds_the_decaying_ceiling() -> None:
    _, _, steering = steered(GuardConfig(decay_power=1.0, decay_factor=3.0, decay_after=10, rollback=False), 12)
    assert steering.guard.ceiling[0] == pytest.approx(3.0 / (1 + 60 / 10))


def test_the_ceiling_is_forgotten_and_saved() -> None:
    _, _, steering = steered(GuardConfig(curvature_share=0.5), 5)
    guard = steering.guard
    again = Guard(GuardConfig(curvature_share=0.5), resolve_levers(("lr",)), 1)
    again.load_state_dict(guard.state_dict())
    assert again.ceiling[0] == guard.ceiling[0] < np.inf
    again.reset(np.array([True]))
    assert again.ceiling[0] == np.inf


def test_without_an_envelope_nothing_is_held() -> None:
    _, _, steering = steered(GuardConfig(rollback=False), 3)
    assert steering.guard.ceiling[0] == np.inf
    assert steering.lr_multiplier[0] == steering.multipliers[0, 0] * steering.guard.caution[0]


@pytest.mark.parametrize(("curvature", "momentum"), [(0.0, 0.5), (np.inf, 0.5), (np.nan, 0.5), (1.0, 1.0), (1.0, -0.1)])
def test_limits_of_nothing_are_refused(curvature: float, momentum: float) -> None:
    with pytest.raises(RangeError):
        stable_rate(curvature, momentum)
