"""Trees of numpy arrays as plain, JSON-serialisable values, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

ARRAY = "__array__"


def to_plain(tree: Any) -> Any:
    """Replaces every array in nested dicts, lists and tuples by plain values.

    >>> to_plain({"count": np.zeros(2, dtype=np.int64)})
    {'count': {'__array__': [0, 0], 'dtype': 'int64'}}
    """
    if isinstance(tree, dict):
        return {key: to_plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [to_plain(value) for value in tree]
    if isinstance(tree, np.ndarray | np.generic):
        return {ARRAY: tree.tolist(), "dtype": str(tree.dtype)}
    return tree


def from_plain(tree: Any) -> Any:
    """Restores what ``to_plain`` gave; tuples come back as lists."""
    if isinstance(tree, dict):
        if ARRAY in tree:
            return np.array(tree[ARRAY], dtype=tree["dtype"])
        return {key: from_plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [from_plain(value) for value in tree]
    return tree
