"""Levers: the named, bounded things that a policy may move, each in a coordinate where a nudge means the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.errors import ConfigError, unknown

Effective = Callable[[np.ndarray, np.ndarray], np.ndarray]
Available = Callable[[np.ndarray], np.ndarray]


def _always(base: np.ndarray) -> np.ndarray:
    return np.ones(base.shape, dtype=bool)


def _positive(base: np.ndarray) -> np.ndarray:
    return base > 0


def _scaled(base: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    return base * multiplier


def _momentum(base: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    """The multiplier acts on ``1 - momentum``, the reciprocal of the averaging time."""
    return np.clip(1 - (1 - base) * multiplier, 0.0, 0.999)


CLIP_OFF = 10.0  # a threshold of ten average gradient norms, below which clipping starts to act


def _clip(base: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    """Threshold in average gradient norms; infinite (off) at multiplier 1."""
    del base
    return np.where(multiplier >= 1, np.inf, CLIP_OFF * multiplier)


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One bounded hyperparameter nudge. The position of a lever is a multiplier; 1 is the null position.

    Attributes:
        name: lower-case words with underscores.
        hyperparameter: what it governs in a population (``Population.hyperparameters``) or an optimizer.
        doc: one line for tables.
        low, high: absolute bounds of the multiplier under *moves*; *targets* may go down to ``target_low``.
        rate: largest change of ``log(multiplier)`` in one decision under *moves*, at action -1 or 1.
        effective: ``(base, multiplier) -> value``; shapes (N,). Used only where the multiplier is not exactly 1.
        available: ``base -> bool``: can this lever act on a run with that base?
        unavailable: why not, in words.
        null: value at multiplier 1; None for "the base itself, bit for bit".
        step: change of the ln of the optimizer's step by that of the multiplier: 1, -1, or 0 for neither; by it the guard
            holds levers together (see ``GuardConfig.joint``).
        per_grad_norm: the value is in units of the average gradient norm, and is made absolute by ``Steering``.
    """

    name: str
    hyperparameter: str
    doc: str
    low: float
    high: float
    rate: float
    target_low: float = 0.0
    effective: Effective = _scaled
    available: Available = _always
    unavailable: str = ""
    null: float | None = None
    step: float = 0.0
    per_grad_norm: bool = False

    def value(self, base: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
        """Effective hyperparameter (N,) float64; exactly ``base`` (or ``null``) where the multiplier is 1.

        >>> LEVERS["momentum"].value(np.array([0.9]), np.array([0.5])).round(3).tolist()
        [0.95]
        """
        null = base if self.null is None else np.full_like(base, self.null)
        return np.where(multiplier == 1, null, self.effective(base, multiplier))

    def position(self, multiplier: np.ndarray) -> np.ndarray:
        """Position in [-1, 1]: log multiplier over its largest magnitude; 0 is null."""
        span = max(abs(np.log(self.low)), abs(np.log(self.high)))
        return np.clip(np.log(np.maximum(multiplier, 1e-30)) / span, -1.0, 1.0)


LEVERS: dict[str, Lever] = {
    lever.name: lever
    for lever in (
        Lever(
            name="lr",
            hyperparameter="lr",
            doc="learning rate: scheduled rate x multiplier",
            low=1e-4,
            high=1e4,
            rate=1.0,
            step=1.0,
        ),
        Lever(
            name="momentum",
            hyperparameter="momentum",
            doc="momentum (SGD, RMSprop, Muon) or beta1 (Adam kinds, Lion): the multiplier acts on 1 - momentum; "
            "momentum stays in [0, 0.999]",
            low=0.1,
            high=10.0,
            rate=0.3,
            target_low=1e-3,
            effective=_momentum,
            step=-1.0,  # of a step that follows the average gradient, 1 / (1 - momentum)
        ),
        Lever(
            name="weight_decay",
            hyperparameter="weight_decay",
            doc="weight decay x multiplier; unavailable where the base is zero",
            low=1e-2,
            high=1e2,
            rate=0.5,
            available=_positive,
            unavailable="the optimizer has no weight decay, and a multiple of zero is zero",
        ),
        Lever(
            name="grad_clip",
            hyperparameter="grad_clip",
            doc=f"gradient clip at {CLIP_OFF:g} x multiplier average gradient norms; off at multiplier 1",
            low=0.03,
            high=1.0,
            rate=0.5,
            target_low=0.03,
            effective=_clip,
            null=float("inf"),
            per_grad_norm=True,
        ),
    )
}


def register_lever(lever: Lever) -> None:
    """Adds a lever to the table; a name that exists is refused with ``ConfigError``."""
    if lever.name in LEVERS:
        raise ConfigError(f"lever {lever.name!r} is registered already; choose another name")
    if not 0 < lever.low <= 1 <= lever.high:
        raise ConfigError(
            f"lever {lever.name!r}: bounds must satisfy 0 < low <= 1 <= high, got {lever.low}, {lever.high}"
        )
    LEVERS[lever.name] = lever


def resolve_levers(names: Sequence[str]) -> tuple[Lever, ...]:
    """Levers by name, in order; ``UnknownNameError`` names the nearest match."""
    for name in names:
        if name not in LEVERS:
            raise unknown("lever", name, LEVERS)
    return tuple(LEVERS[name] for name in names)
