"""Every scheduler in every mode of every host: inside each step the rate is exactly the scheduled one times the multiplier."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
from tests.policies.hosts.machines import HOSTS, MODES, SKIPPED, Case, pytorch
from tests.policies.live import Scripted
from torch.optim import lr_scheduler as torchs
from torch.optim.swa_utils import SWALR

MAKE: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: torchs.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: torchs.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: torchs.ConstantLR(o, 0.3, 5),
    "LinearLR": lambda o: torchs.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: torchs.ExponentialLR(o, 0.93),
    "PolynomialLR": lambda o: torchs.PolynomialLR(o, 20, 2.0),
    "CosineAnnealingLR": lambda o: torchs.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: torchs.CosineAnnealingWarmRestarts(o, 3, 2),
    "LambdaLR": lambda o: torchs.LambdaLR(o, lambda step: min(1.0, step / 5)),
    "MultiplicativeLR": lambda o: torchs.MultiplicativeLR(o, lambda step: 0.95),
    "OneCycleLR": lambda o: torchs.OneCycleLR(o, [0.1, 0.05], total_steps=20),
    "CyclicLR": lambda o: torchs.CyclicLR(o, [0.001, 0.01], [0.1, 0.2], step_size_up=3),
    "SequentialLR": lambda o: torchs.SequentialLR(
        o, [torchs.LinearLR(o, 0.1, total_iters=3), torchs.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: torchs.ChainedScheduler(
        [torchs.ConstantLR(o, 0.5, 4), torchs.ExponentialLR(o, 0.95)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: torchs.ReduceLROnPlateau(o, factor=0.7, patience=1),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=5),
}
TABLE = (1.0, 0.5, 0.37, 2.5, 1.0, 0.0, 0.81, 3.0, 0.2, 1.3)
# Where a schedule goes on when the gradient scaler skips a step; elsewhere it waits.
GOES_ON = {("huggingface", "ReduceLROnPlateau"), *(("lightning", name) for name in MAKE)}


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect() -> Iterator[None]:
    """A Trainer collects garbage twice per training; what is there already need not be looked at 128 times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@lru_cache
def alone(name: str, ticks: int) -> tuple[tuple[float, ...], ...]:
    """The rates of the two groups at each step of an ordinary loop that has no controller."""
    return tuple(pytorch(Case(schedule=MAKE[name], steps=ticks)).effective)


def test_the_table_has_every_scheduler_of_torch() -> None:
    known = {
        name
        for name, found in vars(torchs).items()
        if inspect.isclass(found) and issubclass(found, torchs.LRScheduler) and found is not torchs.LRScheduler
    }
    assert known - set(MAKE) == {"_LRScheduler"}  # an old name of the base class
    assert len(MAKE) >= 14


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("host", HOSTS)
def test_the_rate_inside_a_step_is_scheduled_times_multiplier(host: str, mode: str, name: str) -> None:
    policy = Scripted([[one] for one in TABLE], decide_every=1)
    case = MODES[mode](Case(schedule=MAKE[name], policy=policy))
    seen = HOSTS[host](case)
    expected = list(alone(name, case.ticks))
    if case.amp and (host, name) in GOES_ON:
        del expected[SKIPPED]
    assert len(seen.effective) == case.steps
    assert seen.scheduled == expected[: case.steps]
    for step, (rates, scheduled) in enumerate(zip(seen.effective, seen.scheduled, strict=True)):
        assert rates == tuple(one * TABLE[step] for one in scheduled), f"step {step}"
    assert len(set(seen.scheduled)) > 1, "the schedule moves"
