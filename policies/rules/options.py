"""Checks of the options that rules take."""

from __future__ import annotations

import math
import numbers

from trimtab.errors import out_of_range


def number(name: str, value: float, low: float, high: float | None = None) -> float:
    """A finite number in [low, high], or ``RangeError``.

    >>> number("factor", 0.5, 0.001, 0.999)
    0.5
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value < low or (high is not None and value > high):
        raise out_of_range(name, value, low, high)
    return float(value)


def whole(name: str, value: int, low: int, high: int | None = None) -> int:
    """A whole number in [low, high], or ``RangeError``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise out_of_range(name, value, low, high, remedy="a whole number")
    return int(number(name, int(value), low, high))
