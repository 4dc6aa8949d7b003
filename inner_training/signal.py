"""One entry of the observation: what the table of signals is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trimtab.inner_training.reading import Memory, Reading

Compute = Callable[[Reading, Memory], np.ndarray]

HOST = "host"  # the cost of a signal that is arithmetic on numbers which every decision has at hand


@dataclass(frozen=True, kw_only=True)
class Signal:
    """One entry of the observation.

    Attributes:
        name: lower-case words with underscores.
        group: a group of docs/signals.md.
        doc: the formula in one line.
        missing: when it is 0 for want of data; empty for never.
        compute: ``(reading, memory) -> (N,)`` float64, NaN where unknown.
        source: where the formula comes from; empty for ours.
        low, high: its range.
        cost: what it takes when a policy reads it: ``"host"`` for arithmetic on numbers that are at hand at every
            decision, else what is measured for it. Nothing, when no policy reads it.
        default: whether scenarios observe it unless they name their own signals.
        needs: names of the measurements that it reads by ``Reading.probed`` (see ``probe.MEASUREMENTS``); they are taken
            only where a signal in use needs them.
        metered: whether it reads ``Reading.energy``; a meter is asked only where a signal in use does.
    """

    name: str
    group: str
    doc: str
    missing: str
    compute: Compute
    source: str = ""
    low: float = -1.0
    high: float = 1.0
    cost: str = HOST
    default: bool = True
    needs: tuple[str, ...] = ()
    metered: bool = False


def row(
    group: str,
    name: str,
    compute: Compute,
    doc: str,
    missing: str = "",
    source: str = "",
    need: str = "",
    default: bool = True,
) -> Signal:
    """A signal of the range [-1, 1] in one line of a table; it costs the measurement that it needs, if any."""
    return Signal(
        name=name,
        group=group,
        doc=doc,
        missing=missing,
        compute=compute,
        source=source,
        cost=need or HOST,
        default=default,
        needs=(need,) if need else (),
    )
