"""Every signal on one fixed made-up course of telemetry, against numbers that are kept in the repository.

A change of a formula must change the file in the same commit: python -m tests.inner_training.test_golden_signals
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.inner_training.test_signals import reading
from trimtab.inner_training.edits import UnitCounts
from trimtab.inner_training.reading import Memory
from trimtab.inner_training.signal import HOST
from trimtab.inner_training.signals import SIGNALS, observe, resolve_signals

FILE = Path(__file__).parents[1] / "golden" / "signals.json"
RUNS, DECISIONS, SHOWN = 2, 24, (0, 1, 4, 13, 15, 18, 23)
NAMES = [name for name, signal in SIGNALS.items() if signal.cost == HOST]


@functools.cache
def trace() -> dict[str, list[list[float]]]:
    """Each signal that costs nothing but arithmetic: (decisions shown, RUNS), to 6 decimals."""
    rng = np.random.Generator(np.random.Philox(11))
    memory, seen = Memory(RUNS), []
    for number in range(DECISIONS):
        level = np.array([-0.1 * number, 1.5 * (number > 12)])
        one = reading(
            np.exp(level + 0.1 * rng.uniform(-1, 1, (10, RUNS))),
            val=float(np.exp(0.2 * rng.uniform() - 0.1 * number + 0.02 * max(number - 8, 0) ** 2))
            if number
            else np.nan,
            total=300,
            step=10 * (number + 1),
            grad_norm=rng.uniform(0.5, 2, (2, RUNS)),
            grad_dot=rng.uniform(-0.1, 1, RUNS),
            update_norm=np.outer([0.36, 0.48, 0.8], rng.uniform(1e-4, 1e-2, RUNS)),  # by depth
            weight_norm=np.outer([0.6, 0.48, 0.64], rng.uniform(1, 2, RUNS)),
        )
        one.base = {**one.base, "lr": one.initial_lr * 0.95**number}
        one.fresh = np.full(RUNS, number == 0)
        one.rolled_back = np.array([False, number == 15])
        assert one.measured is not None
        if number in (1, 6):
            taken = {1: "dormant", 6: "curvature"}[number]
            one.measured = replace(one.measured, probed={taken: np.array([0.2, np.nan])})
        units = np.array([[10, 30]] * RUNS)
        one.units = UnitCounts(units - [number % 7, number], units, np.ones_like(units))
        one.edits_left, one.edit_rest = np.full(RUNS, 1 - number / 30), np.full(RUNS, number % 5 / 4)
        one.clock, one.deadline = np.full(RUNS, 2.0 * number), np.full(RUNS, 60.0)
        memory.begin()
        seen.append(observe(resolve_signals(NAMES), one, memory))
    shown = np.array(seen)[list(SHOWN)].astype(np.float64).round(6)
    return {name: shown[:, :, column].tolist() for column, name in enumerate(NAMES)}


@pytest.mark.parametrize("name", NAMES)
def test_the_course_of_a_signal_is_the_one_on_file(name: str) -> None:
    np.testing.assert_allclose(trace()[name], json.loads(FILE.read_text())[name], atol=2e-6)


def test_every_signal_is_on_file_and_does_something() -> None:
    on_file = json.loads(FILE.read_text())
    assert list(on_file) == NAMES
    still = {name for name, values in on_file.items() if np.ptp(values) == 0}
    expected = {"progress_available", "log_parameters", "log_batch", "depth", "adaptive", "caution", "rollbacks_left"}
    assert still == expected | {"deadline_available", "structure_available"}


if __name__ == "__main__":
    rows = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in trace().items()]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
