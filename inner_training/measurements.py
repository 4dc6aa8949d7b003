"""Measurements beyond those of every interval: taken only where a signal needs them, and not at every decision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trimtab.errors import MismatchError
from trimtab.inner_training.signal import Signal

PROBE_EVERY = 5  # decisions from one measurement to the next
UNITS = "units"  # taken by what edits them, not by a probe
TINY_SHARE = 0.1  # of a gradient's root mean square: elements below it are tiny; 8% of a normal distribution are


@dataclass(frozen=True)
class Measurement:
    """Something that ``Reading.probed`` may know.

    Attributes:
        doc: what is measured, on the last step of an interval.
        cost: what it takes when it is taken.
        live: whether a live run under a controller can take it too.
    """

    doc: str
    cost: str
    live: bool = True


MEASUREMENTS: dict[str, Measurement] = {
    "grad_sparsity": Measurement(
        "share of the gradient's elements below a tenth of its root mean square", "three passes over the gradient"
    ),
    "saturation": Measurement(
        "share of tanh and sigmoid outputs in the outer 1.5% of their range, where the slope is below 6% of its largest",
        "a forward pass of 32 examples",
    ),
    "dormant": Measurement(
        "share of units whose mean |output| is at most 0.025 of their layer's mean", "a forward pass of 32 examples"
    ),
    "features": Measurement(
        "inner products of the outputs of the last activation function, averaged over places, of 16 examples",
        "a forward pass of 32 examples",
    ),
    "curvature": Measurement(
        "(gradient after - gradient before) . d / |d|^2 on one batch, d the last step's change",
        "a gradient",
        live=False,
    ),
    "overshoot": Measurement(
        "(gradient after - gradient before) . d / 2 / -(gradient before . d): the share of the descent that a step was "
        "to bring, and its curvature took back",
        "a gradient, the same one as for curvature",
        live=False,
    ),
    "curvature_max": Measurement(
        "eigenvalue of the Hessian of the largest magnitude, 12 rounds of power iteration on 32 examples",
        "12 Hessian-vector products of 32 examples",
        live=False,
    ),
    "curvature_trace": Measurement(
        "trace of the Hessian, Hutchinson's estimate by 4 vectors on 32 examples",
        "4 Hessian-vector products of 32 examples",
        live=False,
    ),
    UNITS: Measurement(
        "the diagnostics of the units ([structure](structure.md#diagnostics)) with a scoring, and the age of newborns, in a "
        "scenario with structural levers, and under a controller with a structure and batches",
        "activations and their gradients of 32 examples",
    ),
}


def needs_of(signals: Iterable[Signal]) -> tuple[str, ...]:
    """Names of the measurements that some signal needs, each once."""
    return tuple(dict.fromkeys(name for signal in signals for name in signal.needs))


def check_live(what: str, needs: Iterable[str]) -> None:
    """Refuses to do without a measurement that only a population can take.

    Args:
        what: that relies on it.
        needs: names of measurements.

    Raises:
        MismatchError: naming the first that a live run cannot take.
    """
    for name in needs:
        if not MEASUREMENTS[name].live:
            raise MismatchError(
                f"{what} needs the measurement {name!r}, which only a population can take; leave it out"
            )
