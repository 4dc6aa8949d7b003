"""Means with intervals over seeds, paired comparisons, and how many of many comparisons hold."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.stats import t as student

LEVEL = 0.05


def interval(values: np.ndarray) -> list[float]:
    """Mean of (S,) values with the ends of its 95 % interval, by Student's t; S >= 2.

    >>> interval(np.array([1.0, 2.0, 3.0]))
    [2.0, -0.4841, 4.4841]
    """
    middle, error = float(values.mean()), float(values.std(ddof=1)) / np.sqrt(len(values))
    wide = float(student.ppf(1 - LEVEL / 2, len(values) - 1)) * error
    return [round(float(one), 4) for one in (middle, middle - wide, middle + wide)]


def p_value(differences: np.ndarray) -> float:
    """Two-sided p of the paired t-test, of (S,) differences; 1 where all are 0."""
    error = float(differences.std(ddof=1)) / np.sqrt(len(differences))
    if error == 0:
        return 1.0 if differences.mean() == 0 else 0.0
    return float(2 * student.sf(abs(differences.mean()) / error, len(differences) - 1))


def holm(p_values: Mapping[str, float], level: float = LEVEL) -> set[str]:
    """The comparisons that hold together at a level, by Holm's step-down procedure (Scand. J. Statist. 6, 1979).

    >>> sorted(holm({"a": 0.001, "b": 0.02, "c": 0.04, "d": 0.5}))
    ['a']
    """
    held: set[str] = set()
    for place, name in enumerate(sorted(p_values, key=lambda one: p_values[one])):
        if p_values[name] > level / (len(p_values) - place):
            break
        held.add(name)
    return held


def against(values: Mapping[str, np.ndarray], control: np.ndarray) -> dict[str, dict[str, object]]:
    """Each of some (S,) values minus a control (S,), paired: the difference with its interval, and the verdict by Holm.

    The verdict is 1 for higher, -1 for lower, 0 for neither.
    """
    differences = {name: one - control for name, one in values.items()}
    held = holm({name: p_value(one) for name, one in differences.items()})
    return {
        name: {
            "value": interval(values[name]),
            "minus_control": interval(one),
            "verdict": int(np.sign(one.mean())) if name in held else 0,
        }
        for name, one in differences.items()
    }
