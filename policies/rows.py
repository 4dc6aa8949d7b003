"""Rows of numbers, as ranks exchange them: places by name, and trees without their shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class Form:
    """Places by name in a row of numbers.

    >>> form = Form({"step": 1, "losses": 2})
    >>> row = form.row({"losses": [0.5]})
    >>> row.tolist(), form.read(row[None], "losses").tolist()
    ([nan, 0.5, nan], [[0.5, nan]])
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        ends = np.cumsum([0, *sizes.values()]).tolist()
        self._places = {name: slice(ends[k], ends[k + 1]) for k, name in enumerate(sizes)}
        self._length = ends[-1]

    def row(self, values: Mapping[str, Any]) -> np.ndarray:
        """A row (n,) float64 that holds these; NaN where nothing is given."""
        made = np.full(self._length, np.nan)
        for name, value in values.items():
            numbers, place = np.ravel(np.asarray(value, dtype=np.float64)), self._places[name]
            if place.start + len(numbers) > place.stop:
                raise ValueError(f"{len(numbers)} numbers for {name}, which has {place.stop - place.start} places")
            made[place.start : place.start + len(numbers)] = numbers
        return made

    def read(self, rows: np.ndarray, name: str) -> np.ndarray:
        """What all rows (W, n) hold under that name, (W, size)."""
        return rows[:, self._places[name]]


def numbers(tree: Any) -> list[float]:
    """Every number of a tree of dicts and lists, in order.

    >>> numbers({"levers": ["lr"], "left": [[1, 2.5]], "lost": [True]})
    [1.0, 2.5, 1.0]
    """
    if isinstance(tree, Mapping):
        return [number for value in tree.values() for number in numbers(value)]
    if isinstance(tree, list):
        return [number for value in tree for number in numbers(value)]
    return [] if isinstance(tree, str) else [float(tree)]


def with_numbers(tree: Any, source: Iterator[float]) -> Any:
    """The same tree with other numbers.

    >>> with_numbers({"levers": ["lr"], "left": [[1, 2.5]]}, iter([7.0, 8.0]))
    {'levers': ['lr'], 'left': [[7.0, 8.0]]}
    """
    if isinstance(tree, Mapping):
        return {name: with_numbers(value, source) for name, value in tree.items()}
    if isinstance(tree, list):
        return [with_numbers(value, source) for value in tree]
    return tree if isinstance(tree, str) else next(source)
