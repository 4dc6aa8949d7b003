"""Bounds that a user sets on levers: narrower than a lever's own, the same in populations and in live runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from trimtab.errors import RangeError, unknown
from trimtab.inner_training.levers import LEVERS, Lever

Bounds = tuple[tuple[str, tuple[float, float]], ...]  # by lever, in the order of their names: it can be hashed

EXAMPLE = "{'lr': (0.1, 3.0)}"


def check_bounds(given: object) -> Bounds:
    """Bounds by lever as they are kept; read back from JSON or YAML they may be lists of pairs.

    Raises:
        UserError: a lever is unknown, its bounds are no two numbers around 1, or they are wider than its own.

    >>> check_bounds({"momentum": (0.5, 2), "lr": [0.1, 3.0]})
    (('lr', (0.1, 3.0)), ('momentum', (0.5, 2.0)))
    """
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, list | tuple) or not all(_is_pair(one) and isinstance(one[0], str) for one in pairs):
        raise RangeError(
            f"bounds is {given!r}; it must be a mapping of levers to the (lowest, highest) multiplier, such as {EXAMPLE}"
        )
    found = {name: _check_pair(name, one) for name, one in pairs}
    if len(found) < len(pairs):
        raise RangeError(f"bounds is {given!r}, which names a lever twice; name each one once, such as {EXAMPLE}")
    return tuple(sorted(found.items()))


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _check_pair(name: str, given: object) -> tuple[float, float]:
    if name not in LEVERS:
        raise unknown("lever", name, LEVERS)
    lever = LEVERS[name]
    lowest = min(lever.low, lever.target_low)
    said = f"bounds of the lever {name!r} are {given!r}"
    allowed = f"{lowest:g} <= lowest <= 1 <= highest <= {lever.high:g}"
    if not isinstance(given, list | tuple) or len(given) != 2 or not all(map(_is_number, given)):
        raise RangeError(f"{said}; they must be two numbers, (lowest, highest), with {allowed}")
    low, high = (float(one) for one in given)
    if low > high:
        raise RangeError(f"{said}; the lowest comes first, with {allowed}: give ({high:g}, {low:g})")
    if not low <= 1 <= high:
        raise RangeError(
            f"{said}, which leaves out 1, the null position; they must be {allowed}: to shift what a multiplier of 1 means, "
            "change the optimizer's own setting"
        )
    if low < lowest or high > lever.high:
        raise RangeError(
            f"{said}; they can only narrow the lever's own: {allowed}, so give ({max(low, lowest):g}, {min(high, lever.high):g})"
        )
    return low, high


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def bounded(levers: Sequence[Lever], bounds: Bounds) -> tuple[Lever, ...]:
    """Levers within bounds, of moves and of targets; those that are not named as they are.

    >>> lever, = bounded([LEVERS["lr"]], check_bounds({"lr": (0, 3.0)}))
    >>> lever.low, lever.target_low, lever.high
    (0.0001, 0.0, 3.0)
    """
    known = dict(bounds)
    return tuple(_bounded(lever, *known[lever.name]) if lever.name in known else lever for lever in levers)


def _bounded(lever: Lever, low: float, high: float) -> Lever:
    return replace(lever, low=max(lever.low, low), target_low=max(lever.target_low, low), high=min(lever.high, high))
