"""Signals that a benchmark records of every run, whatever a policy reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trimtab.inner_training.task import Instance

STABILITY, PLASTICITY = ("stability_margin",), ("dormant", "effective_rank")

# What ``DiagnosticRecord.measures`` gives, by signal: the name of the figure, and what it is.
FIGURES: Mapping[str, tuple[str, str]] = {
    "stability_margin": (
        "stability_margin",
        "the signal averaged over the run: tanh(octaves / 8) of the learning rate below the edge of stability; SGD kinds only",
    ),
    "dormant": ("dormant_at_end", "share of dormant units when the run ended"),
    "effective_rank": ("effective_rank_at_end", "2 x effective rank of the features / most possible - 1, at the end"),
}

# What is recorded of runs in scenarios with structural levers, by figure.
STRUCTURE: Mapping[str, str] = {
    "mean_active_share": "share of the widest network's units that were active, averaged over the run",
    "mean_active_work": "share of the widest network's multiplications that active units did, averaged over the run",
    "edits": "structural edits per run",
}


def diagnostics_of(instances: Sequence[Instance]) -> tuple[str, ...]:
    """The signals to record: of stability for all runs, and of plasticity where tasks change."""
    return STABILITY + (PLASTICITY if any(instance.phases for instance in instances) else ())


class DiagnosticRecord:
    """Averages and last values of signals, run by run; NaN where a run never knew one.

    Args:
        names: of signals.
        runs: how many.
    """

    def __init__(self, names: Sequence[str], runs: int) -> None:
        self._names = tuple(names)
        self._sum = {name: np.zeros(runs) for name in names}
        self._count = {name: np.zeros(runs) for name in names}
        self._last = {name: np.full(runs, np.nan) for name in names}

    def note(self, values: Mapping[str, np.ndarray], run_of: np.ndarray, live: np.ndarray) -> None:
        """Notes an interval: values (N,) by signal, the run in each slot, and the slots whose run was under way."""
        for name in self._names:
            known = live & np.isfinite(values[name])
            self._sum[name][run_of[known]] += values[name][known]
            self._count[name][run_of[known]] += 1
            self._last[name][run_of[known]] = values[name][known]

    def measures(self) -> dict[str, np.ndarray]:
        """Figures (runs,) by the names of ``FIGURES``: means for the margin, last values for the others."""
        found = {}
        for name in self._names:
            count = self._count[name]
            mean = np.divide(self._sum[name], count, out=np.full(len(count), np.nan), where=count > 0)
            found[FIGURES[name][0]] = mean if name in STABILITY else self._last[name]
        return found
