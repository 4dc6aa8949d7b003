"""Which units of which runs an edit takes: shares turned into units, of all runs at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import MismatchError, out_of_range, unknown
from trimtab.inner_training.structure.groups import Group

SCOPES = ("global", "layer")


class Placed(Protocol):
    """A group of units in a row of them all."""

    @property
    def span(self) -> slice:
        """Its units in the row."""
        ...

    @property
    def group(self) -> Group:
        """What it is."""
        ...


class UnitRow(Protocol):
    """Groups of units beside each other in one row of T units."""

    def __getitem__(self, name: str) -> Placed:
        """A group by name."""
        ...

    def joined(self, values: dict[str, Tensor], fill: float | bool) -> Tensor:
        """(N, T) from (N, U) by group; groups that are missing get ``fill``."""
        ...


def check_shares(shares: object, num_runs: int) -> np.ndarray:
    """Shares (N,) float64 in [0, 1], from one for all or one for each run.

    Raises:
        RangeError, MismatchError: they are not.
    """
    given = np.asarray(shares, dtype=np.float64)
    if given.shape not in ((), (num_runs,)):
        raise MismatchError(f"shares have the shape {given.shape}; give one number, or one for each of {num_runs} runs")
    wrong = given[~((given >= 0) & (given <= 1))]
    if wrong.size:
        raise out_of_range("share", float(wrong.flat[0]), 0, 1)
    return np.broadcast_to(given, (num_runs,)).copy()


def check_runs(runs: object, num_runs: int) -> np.ndarray:
    """A mask (N,) bool; None is all runs.

    Raises:
        MismatchError: it is none.
    """
    given = np.ones(num_runs, dtype=bool) if runs is None else np.asarray(runs)
    if given.shape != (num_runs,) or given.dtype != bool:
        raise MismatchError(f"runs are {given.dtype} of shape {given.shape}; give a mask, bool of shape ({num_runs},)")
    return given


def check_scope(scope: str) -> None:
    """Raises ``UnknownNameError`` unless it is ``global`` or ``layer``."""
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)


def ascending(scores: Tensor, among: Tensor) -> Tensor:
    """(..., U) int64 place of each unit among those marked, the lowest score first; equal scores by number."""
    size = torch.finfo(scores.dtype).max
    order = torch.where(among, scores.clamp(-size, size), torch.inf).argsort(dim=-1, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def lowest(scores: Mapping[str, Tensor], active: Tensor, groups: UnitRow, shares: np.ndarray, scope: str) -> Tensor:
    """(N, T) bool: the active units of the lowest scores; the best ones of each group stay, up to its minimum.

    Args:
        scores: (N, U) by group; units of other groups stay.
        active: (N, T) bool.
        groups: of the runs.
        shares: (N,) of the units that are active in these groups; rounded to the nearest number of units.
        scope: ``global`` compares the scores of all groups, ``layer`` takes the share of each group.
    """
    gone, counts = [], []
    share = torch.from_numpy(shares).to(active.device)
    alone = scope == "layer" or len(scores) == 1
    for name, values in scores.items():
        own = active[:, groups[name].span]
        count = own.sum(1)
        most = count - groups[name].group.minimum
        if alone:
            most = torch.minimum(most, torch.round(share * count))
        gone.append(own & (ascending(values, own) < most[:, None]))
        counts.append(count)
    if not alone:
        able = torch.cat(gone, 1)
        wanted = torch.round(share * torch.stack(counts).sum(0))
        both = able & (ascending(torch.cat(list(scores.values()), 1), able) < wanted[:, None])
        gone = list(torch.split(both, [one.shape[1] for one in gone], 1))
    return groups.joined(dict(zip(scores, gone, strict=True)), False)
