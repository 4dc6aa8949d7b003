"""Energy meters: joules that the machine has drawn, where something counts them.

A CUDA device is asked through NVML (the extra ``energy``); a CPU through the counters of the Linux powercap interface
(RAPL), where they may be read. Elsewhere there is no meter, and the signal ``energy`` is missing.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from trimtab.inner_training.signal import Signal

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """Counts energy."""

    def joules(self) -> float:
        """Joules since some moment that stays the same; NaN when the counter cannot be read now."""
        ...


class RaplMeter:
    """The packages of all processors together, from counters of microjoules that begin again at their maximum.

    See https://docs.kernel.org/power/powercap/powercap.html.
    """

    def __init__(self, zones: Sequence[Path]) -> None:
        self._zones = tuple(zones)
        self._ranges = [_number(zone / "max_energy_range_uj") + 1 for zone in self._zones]
        self._last = [_number(zone / "energy_uj") for zone in self._zones]
        self._total = 0

    def joules(self) -> float:
        """Joules since the meter was made; correct if asked once per turn of the counters (minutes at least)."""
        try:
            now = [_number(zone / "energy_uj") for zone in self._zones]
        except (OSError, ValueError):
            return math.nan
        turns = zip(now, self._last, self._ranges, strict=True)
        self._total += sum((new - old) % span for new, old, span in turns)
        self._last = now
        return self._total / 1e6


class NvmlMeter:
    """One NVIDIA GPU since its driver was loaded (Volta or newer), in steps of a millijoule."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float:
        """Joules since the driver was loaded."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError:
            return math.nan


def _number(path: Path) -> int:
    return int(path.read_text())


def open_meter(device: str | torch.device, powercap: Path = POWERCAP) -> Meter | None:
    """The meter of the device that a run trains on.

    Args:
        device: ``"cpu"``, or a CUDA device.
        powercap: where the kernel shows its counters.

    Returns:
        None where there is no meter: no permission, a virtual machine, an old GPU, ``nvidia-ml-py`` not installed.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _nvml_meter(device)
    return _rapl_meter(powercap) if device.type == "cpu" else None


def _rapl_meter(powercap: Path) -> Meter | None:
    # Whole packages only: their parts have a second number, and "psys" counts the packages once more.
    with contextlib.suppress(OSError, ValueError):
        zones = [zone for zone in sorted(powercap.iterdir()) if re.fullmatch(r"intel-rapl:\d+", zone.name)]
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        return RaplMeter(packages) if packages else None
    return None


def _nvml_meter(device: torch.device) -> Meter | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # By identity: NVML counts GPUs that CUDA_VISIBLE_DEVICES hides.
        identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        meter = NvmlMeter(pynvml, pynvml.nvmlDeviceGetHandleByUUID(identity))
    except pynvml.NVMLError:
        return None
    return None if math.isnan(meter.joules()) else meter


class StepEnergy:
    """Joules per optimizer step, from one question to the next."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._joules = meter, meter.joules()

    def per_step(self, steps: int) -> float:
        """Joules drawn since the last question for each of the ``steps`` done since then, NaN for none."""
        joules = self._meter.joules()
        drawn, self._joules = joules - self._joules, joules
        return drawn / steps if steps > 0 else math.nan


def step_energy(signals: Sequence[Signal], device: str | torch.device) -> StepEnergy | None:
    """What measures the energy of steps, if one of the signals reads it and the device has a meter."""
    if not any(signal.metered for signal in signals):
        return None
    meter = open_meter(device)
    return None if meter is None else StepEnergy(meter)
