"""Newborns: units that a growth method makes, before they are put in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.inner_training.structure.arithmetic import (
    directions,
    entries_at,
    live_mean,
    norm,
    norm_of_sizes,
    ratio,
    rows_at,
)
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.evidence import Evidence

# A bias that opens a unit whose row is zero: torch's derivative of relu at 0 is 0, and such a unit would never learn. It
# is as good as f(0) = 0 and f'(0) = 1, which Evci et al., arXiv 2201.05125, ask for. Newborns share it, so that together
# they shift the outputs by no more than this times the size of their columns.
OPEN = 1e-6


@dataclass(frozen=True, kw_only=True)
class Newborns:
    """k new units for each run, best first.

    Attributes:
        rows: (..., k, I) incoming weights.
        bias: (..., k); 0 and without meaning where the layer has no bias.
        columns: (..., k, O) outgoing weights.
        present: (..., k) bool which of them there are; the others are zeros (see ``GrowthMethod.make``).
        donors: (..., k) int64 incumbents that newborns copy, -1 for none; None where nobody copies.
        donor_columns: (..., U) factor on the incumbents' own outgoing weights; None for 1.
        donor_rows: (..., U, I) to be added to the incumbents' own incoming weights; None for nothing.
        chosen: (..., k) int64 inactive units that are woken with their parked weights, -1 for none; None where newborns
            are made anew.
        woken_columns: factor on the parked outgoing weights of chosen units.
    """

    rows: Tensor
    bias: Tensor
    columns: Tensor
    present: Tensor
    donors: Tensor | None = None
    donor_columns: Tensor | None = None
    donor_rows: Tensor | None = None
    chosen: Tensor | None = None
    woken_columns: float = 1.0


def where_present(newborns: Newborns) -> Newborns:
    """The same newborns, with zeros (and -1) where there is none."""
    present = newborns.present
    lost = [None if one is None else torch.where(present, one, -1) for one in (newborns.donors, newborns.chosen)]
    return replace(
        newborns,
        rows=_finite(torch.where(present[..., None], newborns.rows, 0.0)),
        bias=_finite(torch.where(present, newborns.bias, 0.0)),
        columns=_finite(torch.where(present[..., None], newborns.columns, 0.0)),
        donors=lost[0],
        chosen=lost[1],
    )


def _finite(values: Tensor) -> Tensor:
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def scaled(newborns: Newborns, rows: float = 1.0, columns: float = 1.0) -> Newborns:
    """Newborns of another insertion scale.

    Scaling the columns keeps whatever function was preserved: what a newborn takes over from its donor is scaled with it.
    Scaling the rows does so only where the columns are zero or cancel.

    Args:
        newborns: as a growth method made them.
        rows: factor on incoming weights and biases, >= 0; not of units that are woken, which have theirs.
        columns: factor on outgoing weights, >= 0.
    """
    share = newborns.donor_columns
    return replace(
        newborns,
        rows=newborns.rows * rows,
        bias=newborns.bias * rows,
        columns=newborns.columns * columns,
        donor_columns=None if share is None else 1 - columns * (1 - share),
        donor_rows=None if newborns.donor_rows is None else newborns.donor_rows * rows,
        woken_columns=newborns.woken_columns * columns,
    )


def grown(evidence: Evidence, newborns: Newborns) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of the group once newborns have been appended, and donors changed: what an edit has to reproduce.

    Chosen units are set at their places among the others; in their stead zeros are appended.

    Args:
        evidence: with ``weights_in`` and ``weights_out``; no ``bias`` counts as zeros.
        newborns: k of them.

    Returns:
        Rows (..., U + k, I), biases (..., U + k) and columns (..., U + k, O), zeros for units that are not alive.
    """
    live = evidence.live
    if newborns.chosen is not None:
        live = live | woken(newborns, live.shape[-1])
    gate = live[..., None].float()
    rows, columns = evidence.read("weights_in") * gate, evidence.read("weights_out") * gate
    bias = torch.zeros_like(gate[..., 0]) if evidence.bias is None else evidence.bias * gate[..., 0]
    if newborns.donor_rows is not None:
        rows = rows + newborns.donor_rows
    if newborns.donor_columns is not None:
        columns = columns * newborns.donor_columns[..., None]
    fresh = 1.0
    if newborns.chosen is not None:
        fresh = 0.0
        columns = torch.where(woken(newborns, live.shape[-1])[..., None], newborns.woken_columns * columns, columns)
    return (
        torch.cat([rows, fresh * newborns.rows], -2),
        torch.cat([bias, fresh * newborns.bias], -1),
        torch.cat([columns, fresh * newborns.columns], -2),
    )


def woken(newborns: Newborns, units: int) -> Tensor:
    """(..., U) bool: the inactive units that were chosen."""
    none = torch.zeros((*newborns.present.shape[:-1], units + 1), dtype=torch.bool, device=newborns.present.device)
    if newborns.chosen is None:
        return none[..., :-1]
    place = torch.where(newborns.present, newborns.chosen, units)  # those that are not there fall off the end
    return none.scatter(-1, place, True)[..., :-1]


def typical_norm(weights: Tensor, live: Tensor) -> Tensor:
    """(..., 1, 1) mean norm of the rows of (..., U, K) weights of the units that are alive."""
    return live_mean(norm(weights), live)[..., None]


def random_weights(weights: Tensor, live: Tensor, count: int, draws: Draws) -> Tensor:
    """(..., k, K) in uniformly random directions, with the mean norm of what the units alive have in (..., U, K).

    Where those have only zeros (inputs that are inactive themselves) newborns have zeros too. Where no unit is alive the
    norm is that of ``torch.nn.Linear``'s initial values, about 1/sqrt(3).
    """
    sizes = weights.abs()
    used = live[..., None, :].to(weights.dtype) @ sizes != 0  # quicker than any() of bool
    typical = live_mean(norm_of_sizes(sizes), live)[..., None]
    some = live.any(-1)[..., None, None]
    drawn = draws.normal(count, weights.shape[-1])
    drawn = torch.where(used | ~some, drawn, 0.0)
    return directions(drawn) * torch.where(some, typical, 3**-0.5)


def open_rows(evidence: Evidence, descent: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., k, I) and biases (..., k) of units that put out next to nothing, and learn under relu all the same.

    With a bias the rows are zero and the bias just above relu's kink, so the unit is open for every example. Without one
    the rows point, ever so slightly, along ``descent``.

    Args:
        evidence: tells whether there is a bias.
        descent: (..., k, I) directions of any length.
    """
    little = OPEN / descent.shape[-2]
    if evidence.bias is not None:
        return torch.zeros_like(descent), torch.full_like(descent[..., 0], little)
    return little * directions(descent), torch.zeros_like(descent[..., 0])


def parked(evidence: Evidence, chosen: Tensor, present: Tensor) -> Newborns:
    """Newborns that are inactive units, with the weights that they have."""
    bias = torch.zeros_like(chosen, dtype=torch.float32)
    return Newborns(
        rows=rows_at(evidence.read("weights_in"), chosen),
        bias=bias if evidence.bias is None else entries_at(evidence.bias, chosen),
        columns=rows_at(evidence.read("weights_out"), chosen),
        present=present,
        chosen=chosen,
    )


def mean_size(weights: Tensor, live: Tensor) -> Tensor:
    """(..., 1, 1) mean |weight| of the units alive, over the weights of (..., U, K) that are not 0."""
    sizes = torch.where(live[..., None], weights.abs(), 0.0)
    return ratio(sizes.sum((-2, -1)), (sizes > 0).sum((-2, -1)).float())[..., None, None]
