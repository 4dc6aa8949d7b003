"""Energy meters on counters made of files and of a made-up driver."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.inner_training.test_signals import reading
from trimtab.inner_training.energy import NvmlMeter, StepEnergy, open_meter, step_energy
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.levers import resolve_levers
from trimtab.inner_training.signals import SIGNALS, resolve_signals
from trimtab.inner_training.steering import Steering


def zone(root: Path, name: str, what: str, energy: int, span: int = 999_999) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(what + "\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder


def test_packages_are_summed_and_their_counters_turn_over(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", "package-0", 900_000), zone(tmp_path, "intel-rapl:1", "package-1", 5)
    zone(tmp_path, "intel-rapl:0:0", "core", 7), zone(tmp_path, "intel-rapl:2", "psys", 7)
    meter = open_meter("cpu", tmp_path)
    assert meter is not None
    assert meter.joules() == 0
    (first / "energy_uj").write_text("100000\n")  # 100,000 microjoules to the end of the range, and 100,000 more
    assert meter.joules() == pytest.approx(0.2)
    (second / "energy_uj").write_text("300005\n")
    assert meter.joules() == pytest.approx(0.5)
    (second / "energy_uj").unlink()
    assert math.isnan(meter.joules())


@pytest.mark.parametrize("content", [None, "not a number"])
def test_no_meter_where_counters_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    assert open_meter("cpu", tmp_path / "nowhere") is None
    assert open_meter("cpu", tmp_path) is None
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0) / "energy_uj"
    counter.unlink() if content is None else counter.write_text(content)
    assert open_meter("cpu", tmp_path) is None
    assert open_meter("mps", tmp_path) is None


class Driver:
    """As much of NVML as is used."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, counts: bool = True) -> None:
        self.millijoules, self.counts = 5000, counts

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, identity: str) -> str:
        if identity != "GPU-abc":
            raise self.NVMLError
        return identity

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.counts:
            raise self.NVMLError
        return self.millijoules


def test_a_gpu_is_found_by_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"uuid": "abc"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**found))
    monkeypatch.setitem(sys.modules, "pynvml", driver := Driver())
    meter = open_meter("cuda:0")
    assert isinstance(meter, NvmlMeter)
    assert meter.joules() == 5.0
    driver.counts = False
    assert math.isnan(meter.joules())
    assert open_meter("cuda:0") is None
    driver.counts, found["uuid"] = True, "another"
    assert open_meter("cuda:0") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert open_meter("cuda:0") is None


def test_energy_per_step_is_of_the_steps_between_two_questions() -> None:
    counts = iter([10.0, 14.0, 15.0, math.nan, 20.0, 30.0])
    energy = StepEnergy(SimpleNamespace(joules=lambda: next(counts)))
    assert energy.per_step(4) == 1.0
    assert math.isnan(energy.per_step(0))
    assert math.isnan(energy.per_step(1))
    assert math.isnan(energy.per_step(1))
    assert energy.per_step(10) == 1.0


def test_nobody_is_asked_unless_a_signal_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.inner_training.energy.open_meter", lambda device: SimpleNamespace(joules=lambda: 0.0))
    assert step_energy(resolve_signals(["loss_level"]), "cpu") is None
    assert isinstance(step_energy(resolve_signals(["loss_level", "energy"]), "cpu"), StepEnergy)
    own = replace(SIGNALS["energy"], name="watts")
    assert isinstance(step_energy([own], "cpu"), StepEnergy)


def test_a_run_reads_its_energy_relative_to_its_first_interval() -> None:
    steering = Steering(resolve_levers(["lr"]), resolve_signals(["energy"]), GuardConfig(), 2)
    counts = iter([0.0, 50.0, 70.0, 110.0])  # joules, when the meter is opened and at each decision
    steering.energy = StepEnergy(SimpleNamespace(joules=lambda: next(counts)))
    start = reading(np.ones((5, 2)))
    start.measured = None
    seen = []
    for one in (start, reading(np.ones((5, 2))), reading(np.ones((5, 2)))):
        steering.assess(one)
        seen.append(steering.observe(one)[:, 0])
    assert np.isnan(start.energy).all()  # what was drawn before the first step is nobody's
    average = (0.25 * np.log(2) + 0.5 * np.log(4)) / 0.75  # 20 and 40 joules in 10 steps
    np.testing.assert_allclose(seen, np.outer([0, 0, np.tanh(average - np.log(2))], [1, 1]), rtol=1e-6)
