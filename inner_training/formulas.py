"""The formulas of the signals: vectorised over runs, NaN where a value is not known yet."""

from __future__ import annotations

import numpy as np

from trimtab.inner_training.reading import Memory, Reading

FAST, SLOW = 0.5, 0.9  # decays of the short-term and the long-term average, per decision
LEVEL_SCALE = 2.0  # scale of the level signals, so that a rule can invert them
TINY = 1e-12


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


def log(value: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(value, TINY))


def log_losses(reading: Reading, memory: Memory) -> np.ndarray:
    """ln of each step's training loss (K, N), NaN when unknown."""
    return memory.once("log_losses", lambda: log(reading.losses()))


def mean_loss(reading: Reading) -> np.ndarray:
    losses = reading.losses()
    seen = np.isfinite(losses)
    count = seen.sum(0)
    return np.divide(np.where(seen, losses, 0).sum(0), count, out=np.full(count.shape, np.nan), where=count > 0)


def log_loss(reading: Reading, memory: Memory) -> np.ndarray:
    """ln of the interval's mean training loss (N,), NaN when unknown."""
    return memory.once("log_loss", lambda: log(mean_loss(reading)))


def loss_fast(reading: Reading, memory: Memory) -> np.ndarray:
    """Short-term average of ``log_loss``."""
    return memory.ema("loss_fast", log_loss(reading, memory), FAST)


def loss_slow(reading: Reading, memory: Memory) -> np.ndarray:
    """Long-term average of ``log_loss``."""
    return memory.ema("loss_slow", log_loss(reading, memory), SLOW)


def loss_first(reading: Reading, memory: Memory) -> np.ndarray:
    return memory.first("loss", log_losses(reading, memory)[0])


def loss_best(reading: Reading, memory: Memory) -> np.ndarray:
    return memory.best("loss", loss_fast(reading, memory))


def loss_slope(reading: Reading, memory: Memory) -> np.ndarray:
    return loss_fast(reading, memory) - loss_slow(reading, memory)


def loss_curvature(reading: Reading, memory: Memory) -> np.ndarray:
    slope = loss_slope(reading, memory)
    return slope - memory.previous("loss_slope", slope)


def interval_trend(reading: Reading, memory: Memory) -> np.ndarray:
    """Correlation (N,) of the loss with time inside the interval, in [-1, 1]; NaN for intervals of fewer than 3 steps."""
    del memory
    losses = reading.losses()
    steps = losses.shape[0]
    if steps < 3:
        return np.full(reading.num_runs, np.nan)
    time = np.linspace(-1, 1, steps)[:, None]
    deviation = losses - losses.mean(0)
    denominator = np.sqrt((time**2).sum() * (deviation**2).sum(0)) + TINY
    return (time * deviation).sum(0) / denominator


def plateau(reading: Reading, memory: Memory) -> np.ndarray:
    fast = loss_fast(reading, memory)
    before = memory.previous("loss_best", memory.best("loss_for_plateau", fast))
    improved = ~(fast > before - 1e-3)
    return squash(memory.since("loss_improved", improved), 10.0)


def spike(reading: Reading, memory: Memory) -> np.ndarray:
    mean = memory.previous("loss_slow", loss_slow(reading, memory))
    losses = log_losses(reading, memory)
    worst = np.where(np.isfinite(losses).all(0), losses.max(0), np.nan)
    spread = memory.previous("loss_spread", memory.ema("loss_spread", np.abs(log_loss(reading, memory) - mean), SLOW))
    return squash((worst - mean) / (spread + 0.1), 4.0)


def oscillation(reading: Reading, memory: Memory) -> np.ndarray:
    mean = log_loss(reading, memory)
    change = np.sign(mean - memory.previous("log_loss", mean))
    flipped = change * memory.previous("log_loss_change", change)
    return memory.ema("oscillation", np.where(np.isfinite(flipped), -flipped, np.nan), 0.8)


def loss_noise(reading: Reading, memory: Memory) -> np.ndarray:
    del memory
    losses = reading.losses()
    return squash(np.log10(losses.std(0) / (np.abs(losses.mean(0)) + TINY) + 1e-3) + 1.0, 1.0)


# --- validation -------------------------------------------------------------------------------------------------


def val(reading: Reading, memory: Memory) -> np.ndarray:
    return memory.latest("val", log(reading.val_loss))


def val_level(reading: Reading, memory: Memory) -> np.ndarray:
    return squash(val(reading, memory) - loss_first(reading, memory), LEVEL_SCALE)


def val_slope(reading: Reading, memory: Memory) -> np.ndarray:
    value = log(reading.val_loss)
    return squash(memory.ema("val_fast", value, FAST) - memory.ema("val_slow", value, SLOW), 0.3)


def gap(reading: Reading, memory: Memory) -> np.ndarray:
    return squash(val(reading, memory) - loss_fast(reading, memory), 1.0)


def val_drift(reading: Reading, memory: Memory) -> np.ndarray:
    fast = memory.ema("val_fast", log(reading.val_loss), FAST)
    return squash(fast - memory.best("val_fast", fast), 0.3)


def val_plateau(reading: Reading, memory: Memory) -> np.ndarray:
    fast = memory.ema("val_fast", log(reading.val_loss), FAST)
    before = memory.previous("val_best", memory.best("val_for_plateau", fast))
    improved = ~(fast > before - 1e-3) & np.isfinite(reading.val_loss)
    seen = np.isfinite(val(reading, memory))
    return np.where(seen, squash(memory.since("val_improved", improved), 10.0), np.nan)


# --- gradients and updates --------------------------------------------------------------------------------------


def log_norm(reading: Reading) -> np.ndarray:
    norms = reading.sampled("grad_norm")
    return log(norms if norms.ndim == 1 else norms.mean(0))


def grad_level(reading: Reading, memory: Memory) -> np.ndarray:
    norm = log_norm(reading)
    return squash(memory.ema("grad_fast", norm, FAST) - memory.first("grad", norm), 2.0)


def grad_trend(reading: Reading, memory: Memory) -> np.ndarray:
    norm = log_norm(reading)
    return squash(memory.ema("grad_fast", norm, FAST) - memory.ema("grad_slow", norm, SLOW), 1.0)


def pair(reading: Reading) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    norms = reading.sampled("grad_norm")
    unknown_pair = np.full(reading.num_runs, np.nan)
    if norms.ndim == 1 or norms.shape[0] < 2:
        return unknown_pair, unknown_pair, unknown_pair
    return norms[-2] ** 2, norms[-1] ** 2, reading.sampled("grad_dot")


def grad_variance(reading: Reading, memory: Memory) -> np.ndarray:
    first, second, dot = pair(reading)
    # ||g1 - g2||^2 / 2 estimates the trace of the gradient's covariance; the average removes its own noise.
    noise = memory.ema("grad_noise", (first + second - 2 * dot) / 2, 0.8)
    total = memory.ema("grad_square", (first + second) / 2, 0.8)
    return 2 * np.clip(noise / (total + TINY), 0, 1) - 1


def grad_cosine(reading: Reading, memory: Memory) -> np.ndarray:
    first, second, dot = pair(reading)
    return memory.ema("grad_cosine", dot / (np.sqrt(first * second) + TINY), FAST)


def log_ratio(reading: Reading) -> np.ndarray:
    return np.log10(reading.total("update_norm") / (reading.total("weight_norm") + TINY) + 1e-9)


def update_ratio(reading: Reading, memory: Memory) -> np.ndarray:
    del memory
    return squash(log_ratio(reading) + 3.0, 2.0)


def weight_growth(reading: Reading, memory: Memory) -> np.ndarray:
    norm = log(reading.total("weight_norm"))
    return squash(norm - memory.first("weight_norm", norm), 1.0)


# --- budget, scale, base, guard ---------------------------------------------------------------------------------


def known(value: np.ndarray) -> np.ndarray:
    return np.isfinite(value).astype(np.float64)


def schedule(reading: Reading) -> np.ndarray:
    return log(np.maximum(reading.base["lr"] / reading.initial_lr, 1e-4))


def schedule_slope(reading: Reading, memory: Memory) -> np.ndarray:
    value = schedule(reading)
    return squash(value - memory.previous("schedule", value), 0.3)


def effective_lr(reading: Reading) -> np.ndarray:
    return reading.base["lr"] * reading.multipliers.get("lr", np.ones(reading.num_runs)) * reading.caution
