"""Signals: named, unitless, bounded, NaN-free functions of a reading. One table; the same code observes a population
in an environment and a single live run.

Every signal lies in [-1, 1] after clipping; a signal that cannot be known is 0, and the availability signals
(``started``, ``val_available``, ``progress_available``, ``<lever>_available``) say so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trimtab.errors import ConfigError, unknown
from trimtab.inner_training import formulas as f
from trimtab.inner_training.host_signals import HOST_ROWS
from trimtab.inner_training.levers import LEVERS, Lever
from trimtab.inner_training.measurements import MEASUREMENTS
from trimtab.inner_training.probe_signals import PROBE_ROWS
from trimtab.inner_training.reading import Memory, Reading
from trimtab.inner_training.signal import Signal, row
from trimtab.inner_training.structure_signals import STRUCTURE_ROWS

__all__ = ["SIGNALS", "Signal", "all_signals", "lever_signals", "observe", "register_signal", "resolve_signals"]


def _table() -> tuple[Signal, ...]:
    start, val, two = "before the first interval", "no validation loss was given yet", "before the second interval"
    return (
        row("progress", "progress", lambda r, m: r.step / r.total_steps, "steps done / budget", "budget unknown"),
        row("progress", "progress_available", lambda r, m: f.known(r.total_steps), "1 if the budget is known"),
        row("progress", "time", lambda r, m: np.log10(1 + r.step) / 6, "log10(1 + steps done) / 6"),
        row("progress", "started", lambda r, m: 1.0 - r.fresh, "1 once an interval has been measured"),
        row("loss", "loss_level", lambda r, m: f.squash(f.loss_fast(r, m) - f.loss_first(r, m), f.LEVEL_SCALE),
            "tanh((short-term ln loss - ln first loss) / 2)", start),
        row("loss", "loss_above_best", lambda r, m: f.squash(f.loss_fast(r, m) - f.loss_best(r, m), 0.3),
            "tanh((short-term ln loss - its best) / 0.3)", start),
        row("loss", "loss_slope", lambda r, m: f.squash(f.loss_slope(r, m), 0.3),
            "tanh((short-term - long-term ln loss) / 0.3)", start),
        row("loss", "loss_curvature", lambda r, m: f.squash(f.loss_curvature(r, m), 0.2),
            "tanh(change of the slope / 0.2)", two),
        row("loss", "interval_trend", f.interval_trend, "correlation of loss with time inside the interval", start),
        row("loss", "plateau", f.plateau, "tanh(decisions since the short-term ln loss last fell by 1e-3 below its best / 10)"),
        row("loss", "spike", f.spike, "tanh(z / 4), z = (interval's worst ln loss - long-term ln loss) / (its usual distance from that + 0.1)", two,
            "z-score as in ZClip, arXiv 2504.02507"),
        row("loss", "oscillation", f.oscillation, "average of -sign(change of ln loss x the change before)", two),
        row("loss", "loss_noise", f.loss_noise, "tanh(1 + log10(std / mean of the interval's losses))", start),
        row("validation", "val_available", lambda r, m: f.known(f.val(r, m)), "1 once a validation loss was given"),
        row("validation", "val_level", f.val_level, "tanh((ln validation loss - ln first training loss) / 2)", val),
        row("validation", "val_slope", f.val_slope, "tanh((short-term - long-term ln validation loss) / 0.3)", val),
        row("validation", "val_drift", f.val_drift, "tanh((short-term ln validation loss - its best) / 0.3)", val),
        row("validation", "val_plateau", f.val_plateau, "tanh(decisions since validation improved by 1e-3 / 10)", val),
        row("validation", "gap", f.gap, "tanh(ln validation loss - short-term ln training loss)", val),
        row("gradient", "grad_level", f.grad_level, "tanh((short-term ln gradient norm - its first) / 2)", start),
        row("gradient", "grad_trend", f.grad_trend, "tanh(short-term - long-term ln gradient norm)", start),
        row("gradient", "grad_variance", f.grad_variance, "2 E||g1 - g2||^2 / E(||g1||^2 + ||g2||^2) - 1, clipped", start,
            "McCandlish et al., arXiv 1812.06162, appendix A"),
        row("gradient", "grad_cosine", f.grad_cosine, "short-term cosine of two successive gradients", start),
        row("update", "update_ratio", f.update_ratio, "tanh((3 + log10 |update| / |weights|) / 2)", start,
            "the 1e-3 rule of thumb, Karpathy, CS231n notes"),
        row("update", "weight_growth", f.weight_growth, "tanh(ln weight norm - its first)", start),
        row("scale", "log_parameters", lambda r, m: np.log10(r.parameters) / 10, "log10(parameters) / 10"),
        row("scale", "log_batch", lambda r, m: np.log2(r.batch_size) / 20, "log2(examples per step) / 20", "batch size unknown"),
        row("scale", "depth", lambda r, m: f.squash(r.depth, 20.0), "tanh(weight matrices / 20)"),
        row("base", "adaptive", lambda r, m: r.adaptive, "0 for SGD, 1 for the other update rules"),
        row("base", "log_lr", lambda r, m: f.squash(np.log10(f.effective_lr(r) + f.TINY) + 2.5, 3.0),
            "tanh((2.5 + log10 effective learning rate) / 3)"),
        row("base", "schedule_position", lambda r, m: np.maximum(f.schedule(r) / np.log(1e4), -1), "ln(scheduled / initial rate) / ln 1e4"),
        row("base", "schedule_slope", f.schedule_slope, "tanh(change of ln scheduled rate since the last decision / 0.3)", two),
        row("guard", "caution", lambda r, m: np.log10(np.maximum(r.caution, 1e-4)) / 4, "log10(the guard's factor on the rate) / 4"),
        row("guard", "rollbacks_left", lambda r, m: r.rollbacks_left, "share of the rollback budget left"),
        row("guard", "rolled_back", lambda r, m: r.rolled_back.astype(np.float64), "1 if a snapshot was restored at this decision"),
    )  # fmt: skip


SIGNALS: dict[str, Signal] = {signal.name: signal for signal in (*_table(), *HOST_ROWS, *PROBE_ROWS, *STRUCTURE_ROWS)}


def lever_signals(lever: Lever) -> tuple[Signal, ...]:
    """The three signals that every lever brings: its position, its recent moves, and whether it is available."""
    name = lever.name

    def position(reading: Reading, memory: Memory) -> np.ndarray:
        del memory
        return lever.position(reading.multipliers[name])

    def moved(reading: Reading, memory: Memory) -> np.ndarray:
        return f.squash(memory.ema(name + "_moved", reading.moves[name], f.FAST), lever.rate)

    def available(reading: Reading, memory: Memory) -> np.ndarray:
        del memory
        return reading.available[name].astype(np.float64)

    return (
        Signal(name=f"{name}_position", group="levers", doc=f"ln multiplier of {name} / its largest", missing="",
               compute=position),
        Signal(name=f"{name}_moved", group="levers", doc=f"tanh(short-term change of ln multiplier of {name} / rate)",
               missing="", compute=moved),
        Signal(name=f"{name}_available", group="levers", doc=f"1 if {name} can act on this run", missing="",
               compute=available),
    )  # fmt: skip


def all_signals() -> dict[str, Signal]:
    """Every signal there is: the table, and three for each lever of the lever table."""
    return {**SIGNALS, **{signal.name: signal for lever in LEVERS.values() for signal in lever_signals(lever)}}


def register_signal(signal: Signal) -> None:
    """Adds a signal to the table; a name that exists, or a measurement that does not, is refused (``UserError``)."""
    if signal.name in all_signals():
        raise ConfigError(f"signal {signal.name!r} is registered already; choose another name")
    for name in signal.needs:
        if name not in MEASUREMENTS:
            raise unknown("measurement", name, MEASUREMENTS)
    SIGNALS[signal.name] = signal


def resolve_signals(names: Sequence[str]) -> tuple[Signal, ...]:
    """Signals by name, in order; ``UnknownNameError`` names the nearest match."""
    known = all_signals()
    for name in names:
        if name not in known:
            raise unknown("signal", name, known)
    return tuple(known[name] for name in names)


def observe(signals: Sequence[Signal], reading: Reading, memory: Memory) -> np.ndarray:
    """(N, S) float32: each signal clipped to its range, 0 where it is unknown. Unread signals cost nothing."""
    columns = np.empty((reading.num_runs, len(signals)))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for column, signal in enumerate(signals):
            columns[:, column] = signal.compute(reading, memory)
    known = np.where(np.isfinite(columns), columns, 0.0)
    return known.clip([signal.low for signal in signals], [signal.high for signal in signals]).astype(np.float32)
