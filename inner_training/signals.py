"""Signals: named, unitless, bounded, NaN-free functions of a reading. One table; the same code observes a population
in an environment and a single live run.

Every signal lies in [-1, 1] after clipping; a signal that cannot be known is 0, and the availability signals
(``started``, ``val_available``, ``progress_available``, ``<lever>_available``) say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.errors import ConfigError, unknown
from trimtab.inner_training.levers import LEVERS, Lever
from trimtab.inner_training.reading import Memory, Reading

Compute = Callable[[Reading, Memory], np.ndarray]
FAST, SLOW = 0.5, 0.9  # decays of the short-term and the long-term average, per decision
TINY = 1e-12


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
    """

    name: str
    group: str
    doc: str
    missing: str
    compute: Compute
    source: str = ""
    low: float = -1.0
    high: float = 1.0


def squash(value: np.ndarray, scale: float) -> np.ndarray:
    """``tanh(value / scale)``: half way to the bound at about 0.55 x scale."""
    return np.tanh(value / scale)


def unsquash(signal: np.ndarray, scale: float) -> np.ndarray:
    """Inverse of ``squash`` (float32-safe near the bounds).

    >>> bool(np.isclose(unsquash(squash(np.array([0.3]), 2.0), 2.0), 0.3).all())
    True
    """
    return scale * np.arctanh(np.clip(signal, -1 + 1e-7, 1 - 1e-7))


# --- loss -------------------------------------------------------------------------------------------------------


def _log(value: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(value, TINY))


def _mean_loss(reading: Reading) -> np.ndarray:
    losses = reading.losses()
    seen = np.isfinite(losses)
    count = seen.sum(0)
    return np.divide(np.where(seen, losses, 0).sum(0), count, out=np.full(count.shape, np.nan), where=count > 0)


def log_loss(reading: Reading) -> np.ndarray:
    """ln of the interval's mean training loss (N,), NaN when unknown."""
    return _log(_mean_loss(reading))


def loss_fast(reading: Reading, memory: Memory) -> np.ndarray:
    """Short-term average of ``log_loss``."""
    return memory.ema("loss_fast", log_loss(reading), FAST)


def loss_slow(reading: Reading, memory: Memory) -> np.ndarray:
    """Long-term average of ``log_loss``."""
    return memory.ema("loss_slow", log_loss(reading), SLOW)


def _loss_first(reading: Reading, memory: Memory) -> np.ndarray:
    return memory.first("loss", _log(reading.losses()[0]))


def _loss_best(reading: Reading, memory: Memory) -> np.ndarray:
    return memory.best("loss", loss_fast(reading, memory))


def _loss_slope(reading: Reading, memory: Memory) -> np.ndarray:
    return loss_fast(reading, memory) - loss_slow(reading, memory)


def _loss_curvature(reading: Reading, memory: Memory) -> np.ndarray:
    slope = _loss_slope(reading, memory)
    return slope - memory.previous("loss_slope", slope)


def _interval_trend(reading: Reading, memory: Memory) -> np.ndarray:
    del memory
    losses = reading.losses()
    steps = losses.shape[0]
    if steps < 3:
        return np.full(reading.num_runs, np.nan)
    time = np.linspace(-1, 1, steps)[:, None]
    deviation = losses - losses.mean(0)
    denominator = np.sqrt((time**2).sum() * (deviation**2).sum(0)) + TINY
    return (time * deviation).sum(0) / denominator


def _plateau(reading: Reading, memory: Memory) -> np.ndarray:
    fast = loss_fast(reading, memory)
    before = memory.previous("loss_best", memory.best("loss_for_plateau", fast))
    improved = ~(fast > before - 1e-3)
    return squash(memory.since("loss_improved", improved), 10.0)


def _spike(reading: Reading, memory: Memory) -> np.ndarray:
    mean = memory.previous("loss_slow", loss_slow(reading, memory))
    losses = _log(reading.losses())
    worst = np.where(np.isfinite(losses).all(0), losses.max(0), np.nan)
    spread = memory.previous("loss_spread", memory.ema("loss_spread", np.abs(log_loss(reading) - mean), SLOW))
    return squash((worst - mean) / (spread + 0.1), 4.0)


def _oscillation(reading: Reading, memory: Memory) -> np.ndarray:
    mean = log_loss(reading)
    change = np.sign(mean - memory.previous("log_loss", mean))
    flipped = change * memory.previous("log_loss_change", change)
    return memory.ema("oscillation", np.where(np.isfinite(flipped), -flipped, np.nan), 0.8)


def _loss_noise(reading: Reading, memory: Memory) -> np.ndarray:
    del memory
    losses = reading.losses()
    return squash(np.log10(losses.std(0) / (np.abs(losses.mean(0)) + TINY) + 1e-3) + 1.0, 1.0)


# --- validation -------------------------------------------------------------------------------------------------


def _val(reading: Reading, memory: Memory) -> np.ndarray:
    return memory.latest("val", _log(reading.val_loss))


def _val_level(reading: Reading, memory: Memory) -> np.ndarray:
    return squash(_val(reading, memory) - _loss_first(reading, memory), 2.0)


def _val_slope(reading: Reading, memory: Memory) -> np.ndarray:
    value = _log(reading.val_loss)
    return squash(memory.ema("val_fast", value, FAST) - memory.ema("val_slow", value, SLOW), 0.3)


def _gap(reading: Reading, memory: Memory) -> np.ndarray:
    return squash(_val(reading, memory) - loss_fast(reading, memory), 1.0)


def _val_drift(reading: Reading, memory: Memory) -> np.ndarray:
    fast = memory.ema("val_fast", _log(reading.val_loss), FAST)
    return squash(fast - memory.best("val_fast", fast), 0.3)


def _val_plateau(reading: Reading, memory: Memory) -> np.ndarray:
    fast = memory.ema("val_fast", _log(reading.val_loss), FAST)
    before = memory.previous("val_best", memory.best("val_for_plateau", fast))
    improved = ~(fast > before - 1e-3) & np.isfinite(reading.val_loss)
    seen = np.isfinite(_val(reading, memory))
    return np.where(seen, squash(memory.since("val_improved", improved), 10.0), np.nan)


# --- gradients and updates --------------------------------------------------------------------------------------


def _log_norm(reading: Reading) -> np.ndarray:
    norms = reading.sampled("grad_norm")
    return _log(norms if norms.ndim == 1 else norms.mean(0))


def _grad_level(reading: Reading, memory: Memory) -> np.ndarray:
    norm = _log_norm(reading)
    return squash(memory.ema("grad_fast", norm, FAST) - memory.first("grad", norm), 2.0)


def _grad_trend(reading: Reading, memory: Memory) -> np.ndarray:
    norm = _log_norm(reading)
    return squash(memory.ema("grad_fast", norm, FAST) - memory.ema("grad_slow", norm, SLOW), 1.0)


def _pair(reading: Reading) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    norms = reading.sampled("grad_norm")
    unknown_pair = np.full(reading.num_runs, np.nan)
    if norms.ndim == 1 or norms.shape[0] < 2:
        return unknown_pair, unknown_pair, unknown_pair
    return norms[-2] ** 2, norms[-1] ** 2, reading.sampled("grad_dot")


def _grad_variance(reading: Reading, memory: Memory) -> np.ndarray:
    first, second, dot = _pair(reading)
    # ||g1 - g2||^2 / 2 estimates the trace of the gradient's covariance; the average removes its own noise.
    noise = memory.ema("grad_noise", (first + second - 2 * dot) / 2, 0.8)
    total = memory.ema("grad_square", (first + second) / 2, 0.8)
    return 2 * np.clip(noise / (total + TINY), 0, 1) - 1


def _grad_cosine(reading: Reading, memory: Memory) -> np.ndarray:
    first, second, dot = _pair(reading)
    return memory.ema("grad_cosine", dot / (np.sqrt(first * second) + TINY), FAST)


def _log_ratio(reading: Reading) -> np.ndarray:
    return np.log10(reading.sampled("update_norm") / (reading.sampled("weight_norm") + TINY) + 1e-9)


def _update_ratio(reading: Reading, memory: Memory) -> np.ndarray:
    del memory
    return squash(_log_ratio(reading) + 3.0, 2.0)


def _weight_growth(reading: Reading, memory: Memory) -> np.ndarray:
    norm = _log(reading.sampled("weight_norm"))
    return squash(norm - memory.first("weight_norm", norm), 1.0)


# --- budget, scale, base, guard ---------------------------------------------------------------------------------


def _known(value: np.ndarray) -> np.ndarray:
    return np.isfinite(value).astype(np.float64)


def _schedule(reading: Reading) -> np.ndarray:
    return _log(np.maximum(reading.base["lr"] / reading.initial_lr, 1e-4))


def _schedule_slope(reading: Reading, memory: Memory) -> np.ndarray:
    value = _schedule(reading)
    return squash(value - memory.previous("schedule", value), 0.3)


def _effective_lr(reading: Reading) -> np.ndarray:
    return reading.base["lr"] * reading.multipliers.get("lr", np.ones(reading.num_runs)) * reading.caution


def _table() -> tuple[Signal, ...]:
    def row(group: str, name: str, compute: Compute, doc: str, missing: str = "", source: str = "") -> Signal:
        return Signal(name=name, group=group, doc=doc, missing=missing, compute=compute, source=source)

    start, val, two = "before the first interval", "no validation loss was given yet", "before the second interval"
    return (
        row("progress", "progress", lambda r, m: r.step / r.total_steps, "steps done / budget", "budget unknown"),
        row("progress", "progress_available", lambda r, m: _known(r.total_steps), "1 if the budget is known"),
        row("progress", "time", lambda r, m: np.log10(1 + r.step) / 6, "log10(1 + steps done) / 6"),
        row("progress", "started", lambda r, m: 1.0 - r.fresh, "1 once an interval has been measured"),
        row("loss", "loss_level", lambda r, m: squash(loss_fast(r, m) - _loss_first(r, m), 2.0),
            "tanh((short-term ln loss - ln first loss) / 2)", start),
        row("loss", "loss_above_best", lambda r, m: squash(loss_fast(r, m) - _loss_best(r, m), 0.3),
            "tanh((short-term ln loss - its best) / 0.3)", start),
        row("loss", "loss_slope", lambda r, m: squash(_loss_slope(r, m), 0.3),
            "tanh((short-term - long-term ln loss) / 0.3)", start),
        row("loss", "loss_curvature", lambda r, m: squash(_loss_curvature(r, m), 0.2),
            "tanh(change of the slope / 0.2)", two),
        row("loss", "interval_trend", _interval_trend, "correlation of loss with time inside the interval", start),
        row("loss", "plateau", _plateau, "tanh(decisions since the short-term ln loss last fell by 1e-3 below its best / 10)"),
        row("loss", "spike", _spike, "tanh(z-score of the interval's worst ln loss / 4)", two,
            "z-score as in ZClip, arXiv 2504.02507"),
        row("loss", "oscillation", _oscillation, "average of -sign(change of ln loss x the change before)", two),
        row("loss", "loss_noise", _loss_noise, "tanh(1 + log10(std / mean of the interval's losses))", start),
        row("validation", "val_available", lambda r, m: _known(_val(r, m)), "1 once a validation loss was given"),
        row("validation", "val_level", _val_level, "tanh((ln validation loss - ln first training loss) / 2)", val),
        row("validation", "val_slope", _val_slope, "tanh((short-term - long-term ln validation loss) / 0.3)", val),
        row("validation", "val_drift", _val_drift, "tanh((short-term ln validation loss - its best) / 0.3)", val),
        row("validation", "val_plateau", _val_plateau, "tanh(decisions since validation improved by 1e-3 / 10)", val),
        row("validation", "gap", _gap, "tanh(ln validation loss - short-term ln training loss)", val),
        row("gradient", "grad_level", _grad_level, "tanh((short-term ln gradient norm - its first) / 2)", start),
        row("gradient", "grad_trend", _grad_trend, "tanh(short-term - long-term ln gradient norm)", start),
        row("gradient", "grad_variance", _grad_variance, "2 E||g1 - g2||^2 / E(||g1||^2 + ||g2||^2) - 1, clipped", start,
            "McCandlish et al., arXiv 1812.06162, appendix A"),
        row("gradient", "grad_cosine", _grad_cosine, "short-term cosine of two successive gradients", start),
        row("update", "update_ratio", _update_ratio, "tanh((3 + log10 |update| / |weights|) / 2)", start,
            "the 1e-3 rule of thumb, Karpathy, CS231n notes"),
        row("update", "weight_growth", _weight_growth, "tanh(ln weight norm - its first)", start),
        row("scale", "log_parameters", lambda r, m: np.log10(r.parameters) / 10, "log10(parameters) / 10"),
        row("scale", "log_batch", lambda r, m: np.log2(r.batch_size) / 20, "log2(examples per step) / 20", "batch size unknown"),
        row("scale", "depth", lambda r, m: squash(r.depth, 20.0), "tanh(weight matrices / 20)"),
        row("base", "adaptive", lambda r, m: r.adaptive, "1 for the Adam kinds, 0 for SGD"),
        row("base", "log_lr", lambda r, m: squash(np.log10(_effective_lr(r) + TINY) + 2.5, 3.0),
            "tanh((2.5 + log10 effective learning rate) / 3)"),
        row("base", "schedule_position", lambda r, m: np.maximum(_schedule(r) / np.log(1e4), -1), "ln(scheduled / initial rate) / ln 1e4"),
        row("base", "schedule_slope", _schedule_slope, "tanh(change of ln scheduled rate since the last decision / 0.3)", two),
        row("guard", "caution", lambda r, m: np.log10(np.maximum(r.caution, 1e-4)) / 4, "log10(the guard's factor on the rate) / 4"),
        row("guard", "rollbacks_left", lambda r, m: r.rollbacks_left, "share of the rollback budget left"),
        row("guard", "rolled_back", lambda r, m: r.rolled_back.astype(np.float64), "1 if a snapshot was restored at this decision"),
    )  # fmt: skip


SIGNALS: dict[str, Signal] = {signal.name: signal for signal in _table()}


def lever_signals(lever: Lever) -> tuple[Signal, ...]:
    """The three signals that every lever brings: its position, its recent moves, and whether it is available."""
    name = lever.name

    def position(reading: Reading, memory: Memory) -> np.ndarray:
        del memory
        return lever.position(reading.multipliers[name])

    def moved(reading: Reading, memory: Memory) -> np.ndarray:
        return squash(memory.ema(name + "_moved", reading.moves[name], FAST), lever.rate)

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
    """Adds a signal to the table; a name that exists is refused with ``ConfigError``."""
    if signal.name in all_signals():
        raise ConfigError(f"signal {signal.name!r} is registered already; choose another name")
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
    columns = np.zeros((reading.num_runs, len(signals)), dtype=np.float32)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for column, signal in enumerate(signals):
            value = signal.compute(reading, memory)
            columns[:, column] = np.clip(np.where(np.isfinite(value), value, 0.0), signal.low, signal.high)
    return columns
