"""Rows of the table of signals that tell about the units of a run; see ``edits`` and ``structure.population_edits``."""

from __future__ import annotations

from functools import partial

import numpy as np

from trimtab.inner_training import formulas as f
from trimtab.inner_training.measurements import UNITS
from trimtab.inner_training.reading import Memory, Reading
from trimtab.inner_training.signal import Compute, Signal, row
from trimtab.inner_training.structure.stacked_diagnostics import DIAGNOSTICS

_ROWS = tuple(DIAGNOSTICS)
_row = partial(row, "structure", default=False)
_measured = partial(_row, need=UNITS)
_NONE, _PARITY, _SCORES = "no structural lever", "no newborns beside incumbents", "not scored yet"


def _held(reading: Reading, memory: Memory, name: str) -> np.ndarray:
    """The newest value (N,) of a diagnostic, held until the next one."""
    taken = reading.probed(UNITS)
    value = taken if taken.ndim == 1 else taken[_ROWS.index(name)]
    return memory.latest(f"{UNITS}/{name}", value)


def _diagnostic(name: str, scale: float | None, known: str | None = None) -> Compute:
    """``tanh(diagnostic / scale)``, or as it is for no scale; NaN where another diagnostic says that it is not known."""

    def compute(reading: Reading, memory: Memory) -> np.ndarray:
        value = _held(reading, memory, name)
        shown = value if scale is None else f.squash(value, scale)
        return shown if known is None else np.where(_held(reading, memory, known) > 0, shown, np.nan)

    return compute


def _bit(name: str) -> Compute:
    """1 where a diagnostic is above 0."""
    return lambda reading, memory: np.where(_held(reading, memory, name) > 0, 1.0, 0.0)


def _available(reading: Reading, memory: Memory) -> np.ndarray:
    del memory
    return np.zeros(reading.num_runs) if reading.units is None else reading.units.known.astype(np.float64)


def _active_share(reading: Reading, memory: Memory) -> np.ndarray:
    del memory
    return np.full(reading.num_runs, np.nan) if reading.units is None else reading.units.share


def _newborn_age(reading: Reading, memory: Memory) -> np.ndarray:
    known = _held(reading, memory, "newborn_share") > 0
    share = (1 + _held(reading, memory, "newborn_age")) / reading.total_steps
    return np.where(known, 1 + np.log10(share) / 2, np.nan)


STRUCTURE_ROWS: tuple[Signal, ...] = (
    _row("structure_available", _available, "1 where there are units to edit"),
    _row("active_share", _active_share, "active units / units of the widest network", _NONE),
    _row("edits_left", lambda r, m: r.edits_left, "share of the budget of structural edits left", _NONE),
    _row("edit_rest", lambda r, m: r.edit_rest, "share of the rest after a structural edit that is left", _NONE),
    _measured("parity_available", _bit("parity_known"), "1 where newborns were measured beside incumbents"),
    _measured("newborn_parity", _diagnostic("log_gradient_parity", 2.0, "parity_known"),
              "tanh(ln(E|dL/dz| of newborns / of incumbents) / 2)", _PARITY,
              "Lillo & Cheney, arXiv 2605.15435"),
    _measured("newborn_activity", _diagnostic("log_activation_parity", 2.0, "parity_known"),
              "tanh(ln(share of outputs above 0.05 of newborns / of incumbents) / 2)", _PARITY,
              "Lillo & Cheney, arXiv 2605.15435"),
    _measured("newborn_age", _newborn_age, "1 + log10((1 + mean age of newborns in steps) / budget) / 2",
              "no newborns, or budget unknown"),
    _measured("newborn_share", _diagnostic("newborn_share", None), "newborns / active units", _NONE),
    _measured("dormant_share", _diagnostic("dormant_share", None),
              "share of the active units whose E|h| is at most 0.025 of their group's mean", _NONE,
              "Sokar et al., arXiv 2302.12902"),
    _measured("scores_available", _bit("scored"), "1 where units have been scored"),
    _measured("utility_range", _diagnostic("log_dynamic_range", 6.0, "scored"),
              "tanh(ln(95th / 5th percentile of the scores of active units) / 6)", _SCORES,
              "after Qian et al., arXiv 2603.12354"),
    _measured("selection_overlap", _diagnostic("overlap", None, "overlap_known"),
              "Jaccard index of the better halves of the units by the last two scorings", "not scored twice yet"),
)  # fmt: skip
