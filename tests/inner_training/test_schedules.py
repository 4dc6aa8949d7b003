"""Schedules against torch's own schedulers, and their range."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from trimtab.inner_training.schedules import SCHEDULES, BaseSchedule, factor

STEPS = 700
LR = 0.3


def torch_factors(make: Callable[[SGD], LRScheduler], steps: int) -> np.ndarray:
    """Factors of the initial rate that a torch scheduler gives at steps 0 .. steps - 1."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / LR)
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def ours(kind: str, steps: int = STEPS, warmup: float = 0.1, floor: float = 0.0) -> np.ndarray:
    return factor(BaseSchedule(kind=kind, warmup=warmup, floor=floor), np.arange(steps), STEPS)


def warmup_cosine_lambda(step: int) -> float:
    """The widely copied lambda of a linear warm-up and half a cosine, in steps."""
    warmup = 70
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


PAIRS: dict[str, tuple[float, Callable[[SGD], LRScheduler]]] = {
    "constant": (0.0, lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    "cosine": (0.1, lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0.1 * LR)),
    "warmup-cosine": (0.0, lambda optimizer: lr_scheduler.LambdaLR(optimizer, warmup_cosine_lambda)),
    "cosine-restarts": (
        0.1,
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, STEPS // 7, T_mult=2, eta_min=0.1 * LR),
    ),
    "step": (0.0, lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [STEPS // 2, 3 * STEPS // 4], gamma=0.1)),
    "exponential": (0.0, lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / STEPS))),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_equals_torch(kind: str) -> None:
    floor, make = PAIRS[kind]
    np.testing.assert_allclose(ours(kind, floor=floor), torch_factors(make, STEPS), atol=1e-6)


def test_cosine_equals_torch_at_the_end() -> None:
    theirs = torch_factors(PAIRS["cosine"][1], STEPS + 1)
    assert ours("cosine", STEPS + 1, floor=0.1)[-1] == pytest.approx(theirs[-1], abs=1e-6)


def one_cycle_of_torch() -> np.ndarray:
    return torch_factors(
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=STEPS, cycle_momentum=False), STEPS
    )


def test_one_cycle_is_torchs_on_its_own_clock() -> None:
    # Torch peaks at step 0.3 T - 1 and ends at T - 1; ours peaks at 0.3 T and ends at T. Each phase, stretched from the
    # one clock to the other, is the same curve.
    steps, peak, end = np.arange(STEPS), 0.3 * STEPS - 1, STEPS - 1
    up, down = 0.3 * steps / peak, 0.3 + 0.7 * (steps - peak) / (end - peak)
    stretched = np.where(steps < peak, up, down)
    mine = factor(BaseSchedule(kind="one-cycle"), stretched, 1.0)
    np.testing.assert_allclose(mine, one_cycle_of_torch(), atol=1e-6)


def test_one_cycle_is_torchs_one_step_late() -> None:
    theirs = one_cycle_of_torch()
    steepest = np.abs(np.diff(theirs)).max()
    assert np.abs(ours("one-cycle") - theirs).max() <= 1.05 * steepest < 0.01


def test_wsd_has_three_phases() -> None:
    values = factor(BaseSchedule(kind="wsd", warmup=0.1, floor=0.2), np.array([0, 5, 10, 50, 79, 90, 100]), 100)
    np.testing.assert_allclose(values, [0, 0.5, 1, 1, 1, 0.6, 0.2], atol=1e-12)


@pytest.mark.parametrize(("kind", "start", "end"), [("step", 1, 0.01), ("exponential", 1, 0.01), ("cosine", 1, 0)])
def test_ends(kind: str, start: float, end: float) -> None:
    np.testing.assert_allclose(ours(kind, STEPS + 1)[[0, -1]], [start, end], atol=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
@given(
    warmup=st.floats(0, 0.99),
    floor=st.floats(0, 1),
    total=st.integers(1, 10_000),
    shares=st.lists(st.floats(0, 2), min_size=1, max_size=20),
)
def test_factors_are_in_range(kind: str, warmup: float, floor: float, total: int, shares: list[float]) -> None:
    steps = np.array(shares) * total
    values = factor(BaseSchedule(kind=kind, warmup=warmup, floor=floor), steps, total)
    assert values.shape == steps.shape
    assert values.dtype == np.float64
    assert np.isfinite(values).all()
    assert (values >= 0).all()
    assert (values <= 1).all()


@pytest.mark.parametrize("kind", SCHEDULES)
def test_nothing_changes_after_the_budget(kind: str) -> None:
    schedule = BaseSchedule(kind=kind, floor=0.1)
    assert factor(schedule, np.array([2 * STEPS]), STEPS) == factor(schedule, np.array([STEPS]), STEPS)
