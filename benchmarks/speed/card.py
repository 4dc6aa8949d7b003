"""What a device can do, and what a piece of work asks of it: products per second, operations, synchronisations, sizes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from speed.architectures import Architecture, ordinary
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trimtab.inner_training.task import Instance, TaskFamily

# What makes the host wait for a GPU, as a CPU's profiler names it.
WAITING = frozenset(("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"))
GAIN = 1.05  # a doubled population that is not this much quicker per run has saturated the device


@dataclass(frozen=True)
class Point:
    """A population of ``runs`` runs took ``seconds`` per run and step."""

    runs: int
    seconds: float


def saturating(measure: Callable[[int], float | None], start: int, limit: int) -> list[Point]:
    """Measures populations of doubling size, until memory is full or twice the runs hardly gain anything.

    Args:
        measure: seconds per run and step of so many runs; None when they do not fit.
        start: the first size.
        limit: the largest size that is tried.

    Returns:
        Every size that did fit, in order; the last but one or the last is the quickest.
    """
    points: list[Point] = []
    runs = start
    while runs <= limit:
        seconds = measure(runs)
        if seconds is None:
            break
        points.append(Point(runs, seconds))
        if len(points) > 1 and points[-2].seconds < GAIN * seconds:
            break
        runs *= 2
    return points


def quickest(points: Iterable[Point]) -> Point:
    """The point of the least time per run and step."""
    return min(points, key=lambda point: point.seconds)


def step_flops(architecture: Architecture, family: TaskFamily, instance: Instance) -> int:
    """Floating-point operations of the matrix products and convolutions of one step of one run, backward included.

    Counted on the network as it is written the ordinary way, on a CPU; what else a step computes is left out.
    """
    module = ordinary(architecture, family, instance)
    table = family.inputs[instance.rows[: instance.batch_size]]
    labels = torch.from_numpy(instance.labels[: instance.batch_size])
    x, y = family.present(table if table.is_floating_point() else table.long(), labels)
    # Fused attention has no formula in the counter.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        functional.cross_entropy(module(x).flatten(0, -2), y.flatten()).backward()
    return int(counter.get_total_flops())


def wait_for(device: torch.device) -> None:
    """Waits until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_ceiling(device: torch.device, sizes: Iterable[int] = (1024, 2048, 4096, 8192), rounds: int = 5) -> float:
    """Most floating-point operations per second of square float32 matrix products, as this process is set up."""
    highest = 0.0
    for size in sizes:
        left, right = (torch.ones(size, size, device=device) for _ in range(2))
        left @ right
        for _ in range(rounds):
            wait_for(device)
            start = time.perf_counter()
            left @ right
            wait_for(device)
            highest = max(highest, 2 * size**3 / (time.perf_counter() - start))
    return highest


def synchronisations(work: Callable[[], object], device: torch.device) -> int:
    """How often the host waits for the device during ``work``.

    On a GPU the driver's own count; on a CPU the operations that would wait on a GPU, which is a stand-in.
    """
    if device.type != "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            work()
        return sum(event.count for event in profile.key_averages() if event.key in WAITING)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def synchronisations_inside(advance: Callable[[int], object], device: torch.device, steps: int = 10) -> tuple[int, int]:
    """Synchronisations of an interval, and those among them that its steps make.

    Twice the steps must not cost one more: the difference of two intervals is what ``steps`` steps cost.
    """
    once, twice = (synchronisations(lambda count=count: advance(count), device) for count in (steps, 2 * steps))
    return once, twice - once
