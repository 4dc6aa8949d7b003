"""Signals that judge a run from what telemetry gives anyway: shifts, what became of a jump, fit, margins, resources."""

from __future__ import annotations

import numpy as np

from trimtab.inner_training import formulas as f
from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.reading import Memory, Reading
from trimtab.inner_training.shift import SUSPICION, AdaptiveWindow, PageHinkley

LOSS_TEST = PageHinkley()  # on every step's loss, in units of its usual spread
VAL_TEST = PageHinkley(threshold=6.0, patience=4)  # validation losses come one by one
WINDOW = AdaptiveWindow()
LARGEST_JUMP = 8.0  # no single step may raise an alarm
LEAST_SPREAD = 0.05  # nats
HORIZON = 20  # decisions for which a jump is followed
FADE = 0.9  # weight per decision of what became of a jump
MARGIN_SCALE = 8.0  # octaves; of most runs the margin is 3 to 18, and 40 where the loss curves down


# --- shifts -----------------------------------------------------------------------------------------------------


def jumps(reading: Reading, memory: Memory) -> np.ndarray:
    """(K, N) height of each step's ln loss above its long-term average, in usual deviations within an interval."""
    losses = f.log_losses(reading, memory)
    usual = memory.previous("loss_slow", f.loss_slow(reading, memory))
    spread = memory.previous("step_spread", memory.ema("step_spread", losses.std(0), f.SLOW))
    return np.clip((losses - usual) / (spread + LEAST_SPREAD), 0.0, LARGEST_JUMP)


def shift(reading: Reading, memory: Memory) -> np.ndarray:
    """The highest Page-Hinkley score (N,) of the interval."""

    def update(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        after, score = LOSS_TEST.update(state, jumps(reading, memory))
        return after, score.max(0)

    return memory.fold("shift", LOSS_TEST.width, update)


def val_shift(reading: Reading, memory: Memory) -> np.ndarray:
    """The newest Page-Hinkley score (N,) of the validation losses, held between them."""
    value = f.log(reading.val_loss)
    usual = memory.previous("val_slow", memory.ema("val_slow", value, f.SLOW))
    spread = memory.previous("val_spread", memory.ema("val_spread", np.abs(value - usual), f.SLOW))
    height = np.clip((value - usual) / (spread + LEAST_SPREAD), 0.0, LARGEST_JUMP)

    def update(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        after, score = VAL_TEST.update(state, height[None])
        return after, np.where(np.isfinite(height), score[0], np.nan)

    return memory.latest("val_shift", memory.fold("val_shift", VAL_TEST.width, update))


def shift_window(reading: Reading, memory: Memory) -> np.ndarray:
    """The adaptive window's score (N,) of an increase of ln loss."""

    def update(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        after, score, _ = WINDOW.update(state, f.log_losses(reading, memory))
        return after, score

    return memory.fold("shift_window", WINDOW.width, update)


def persistence(reading: Reading, memory: Memory) -> np.ndarray:
    """Does what the last jump added to the loss stay (towards 1), or has it gone (towards -1)?"""
    suspicion = shift(reading, memory)
    level = f.loss_fast(reading, memory)
    usual = memory.previous("loss_slow", f.loss_slow(reading, memory))
    seen = np.isfinite(f.log_loss(reading, memory))
    return memory.fold("persistence", 3, lambda state: follow_jump(state, level, usual, suspicion * seen))


def follow_jump(
    state: np.ndarray, level: np.ndarray, usual: np.ndarray, suspicion: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Follows a jump for ``HORIZON`` decisions from where it was last rising.

    Args:
        state: (N, 3), the level before the jump, the height of the jump, and decisions since its top + 1; the last
            is 0 where no jump is being followed.
        level: (N,) short-term ln loss.
        usual: (N,) long-term ln loss before this decision.
        suspicion: (N,) score of a shift; one of ``SUSPICION`` or more begins a jump.

    Returns:
        The next state, and ``2 share - 1`` with the share of the jump's height that is left, weighted by
        ``(1 - 2^-age) 0.9^age`` with the age of its top in decisions; 0 where there is no jump.
    """
    base, top, age = state.T
    begins = (age == 0) & (suspicion >= SUSPICION) & (level > usual)
    followed = np.isfinite(level) & ((age > 0) | begins)
    base = np.where(begins, usual, base)
    height = level - base
    rises = followed & (begins | (height > 1.2 * top))
    top = np.where(rises, height, top)
    age = np.where(rises, 1.0, age + followed)
    share = np.clip(height / np.maximum(top, f.TINY), 0.0, 1.0)
    value = np.where(followed, (2 * share - 1) * (1 - 0.5 ** (age - 1)) * FADE ** (age - 1), 0.0)
    ended = age > HORIZON
    after = np.where(ended | (age == 0), 0.0, np.stack([base, top, age]))
    return after.T, value


# --- fit --------------------------------------------------------------------------------------------------------


def remaining(reading: Reading, memory: Memory) -> np.ndarray:
    """Share (N,) of the first training loss that the best short-term one still is, in [0, 1]."""
    return np.exp(np.minimum(f.loss_best(reading, memory) - f.loss_first(reading, memory), 0.0))


def flat(reading: Reading, memory: Memory) -> np.ndarray:
    """1 where the training loss is not falling (N,), towards 0 where it falls fast."""
    return 1 - f.squash(np.maximum(-f.loss_slope(reading, memory), 0.0), 0.3)


def smooth_gap(reading: Reading, memory: Memory) -> np.ndarray:
    """Short-term ln validation loss minus short-term ln training loss (N,)."""
    return memory.ema("val_fast", f.log(reading.val_loss), f.FAST) - f.loss_fast(reading, memory)


def underfitting(reading: Reading, memory: Memory) -> np.ndarray:
    """High: much of the first loss remains, it no longer falls, and validation is no worse than training."""
    gap = np.nan_to_num(np.maximum(smooth_gap(reading, memory), 0.0))
    left = np.exp(np.minimum(f.loss_fast(reading, memory) - f.loss_first(reading, memory), 0.0))
    return left * flat(reading, memory) * np.exp(-gap)


def overfitting(reading: Reading, memory: Memory) -> np.ndarray:
    """High: validation has risen above its best while the gap to training has grown."""
    gap = smooth_gap(reading, memory)
    fast = memory.ema("val_fast", f.log(reading.val_loss), f.FAST)
    drift = fast - memory.best("val_fast", fast)
    return f.squash(drift, 0.1) * f.squash(gap - memory.best("gap", gap), 0.5)


def noise_share(reading: Reading, memory: Memory) -> np.ndarray:
    """Share (N,) of a step's squared gradient that is noise of the batch, in [0, 1]."""
    return (f.grad_variance(reading, memory) + 1) / 2


def noisy_data(reading: Reading, memory: Memory) -> np.ndarray:
    """High: the loss has stopped part of the way down among gradients that are noise, or above the validation loss."""
    share, left = noise_share(reading, memory), remaining(reading, memory)
    irreducible = 4 * left * (1 - left) * flat(reading, memory) * share
    excess = f.squash(np.nan_to_num(np.maximum(-smooth_gap(reading, memory), 0.0)), 1.0) * share
    return 1 - (1 - irreducible) * (1 - excess)


# --- gradients and stability ------------------------------------------------------------------------------------


def grad_noise_scale(reading: Reading, memory: Memory) -> np.ndarray:
    """log10 of tr(covariance) / (batch size |gradient|^2), squashed; a gradient lost in noise gives 1."""
    first, second, dot = f.pair(reading)
    noise = memory.ema("grad_noise", (first + second - 2 * dot) / 2, 0.8)
    square = memory.ema("grad_product", dot, 0.8)
    ratio = np.where(square > 0, np.log10(np.maximum(noise / square, f.TINY)), np.inf)
    return np.where(np.isnan(square), np.nan, f.squash(ratio, 2.0))


def stability_margin(reading: Reading, memory: Memory) -> np.ndarray:
    """Octaves (N,) from the effective learning rate to the largest stable one on a quadratic of this curvature, squashed."""
    curvature = memory.latest("curvature", reading.probed("curvature"))
    ones = np.ones(reading.num_runs)
    lever = LEVERS["momentum"]
    momentum = lever.value(reading.base[lever.hyperparameter], reading.multipliers.get(lever.name, ones))
    octaves = np.log2(2 * (1 + momentum) / np.maximum(f.effective_lr(reading) * curvature, f.TINY))
    return np.where((reading.adaptive > 0) | np.isnan(curvature), np.nan, f.squash(octaves, MARGIN_SCALE))


# --- resources --------------------------------------------------------------------------------------------------


def deadline_left(reading: Reading, memory: Memory) -> np.ndarray:
    """Share (N,) of the allowed time that is left, in [0, 1]."""
    del memory
    return np.clip(1 - reading.clock / reading.deadline, 0.0, 1.0)


def deadline_available(reading: Reading, memory: Memory) -> np.ndarray:
    return f.known(deadline_left(reading, memory))


def energy(reading: Reading, memory: Memory) -> np.ndarray:
    """Short-term ln energy per step minus its first value (N,), squashed."""
    spent = np.broadcast_to(np.where(reading.energy > 0, np.log(reading.energy), np.nan), reading.num_runs)
    fast = memory.ema("energy", spent, f.FAST)
    return f.squash(fast - memory.first("energy", spent), 1.0)
