"""Growth where the loss wants it: GradMax and NeST, both from the gradient of a bypass of zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.inner_training.structure.arithmetic import directions, top
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.newborns import Newborns, mean_size, open_rows, typical_norm
from trimtab.inner_training.structure.splitting import faced

FLAT = 1e-5  # of the largest singular value: below it a direction has no gradient


def gradmax(evidence: Evidence, wanted: Tensor, draws: Draws) -> Newborns:
    """Rows of zeros, and the columns that give these rows the largest gradient: the top left singular vectors.

    The columns have the mean norm of the incumbents' ones. Where k exceeds the rank of the bypass gradient the further
    columns are random mixtures of all directions, each in proportion to its singular value. Of the two signs of a column
    that one is taken whose bias the next step raises, where ``next_grad`` is known: with the other one a relu closes for
    most examples right after its birth.
    """
    count, bypass = wanted.shape[-1], torch.nan_to_num(evidence.read("bypass"), nan=0.0, posinf=0.0, neginf=0.0)
    left, values, _ = torch.linalg.svd(bypass, full_matrices=False)
    leading = torch.where((values > FLAT * values[..., :1])[..., None], faced(left.mT), 0.0)[..., :count, :]
    mixed = draws.normal(count, bypass.shape[-1]) @ bypass.mT
    some = (leading != 0).any(-1, keepdim=True)
    chosen = torch.where(some, leading, directions(mixed[..., : leading.shape[-2], :]))
    chosen = _opening(torch.cat([chosen, directions(mixed[..., leading.shape[-2] :, :])], -2), evidence)
    columns = chosen * typical_norm(evidence.read("weights_out"), evidence.live)
    rows, bias = open_rows(evidence, -(chosen @ bypass))
    present = wanted & (bypass != 0).flatten(-2).any(-1, keepdim=True)
    return Newborns(rows=rows, bias=bias, columns=columns, present=present)


def _opening(columns: Tensor, evidence: Evidence) -> Tensor:
    """Columns (..., k, O), or their opposites, such that descent raises what the unit puts out."""
    if evidence.next_grad is None:
        return columns
    falls = (columns * evidence.next_grad[..., None, :]).sum(-1, keepdim=True) > 0
    return torch.where(falls, -columns, columns)


def nest(evidence: Evidence, wanted: Tensor, draws: Draws) -> Newborns:
    """One input and one output each, those between which a connection is missed most: the largest entries of the bypass.

    Row and column are the square root of the entry, with signs whose product opposes it, rescaled to the mean size of
    the incumbents' weights. Which of the two is negative is drawn; with a relu and inputs above 0 a negative row is dead
    at birth, as it is in the source.
    """
    bypass, count = evidence.read("bypass"), wanted.shape[-1]
    inputs, live = bypass.shape[-1], evidence.live
    entries = torch.nan_to_num(bypass, nan=0.0, posinf=0.0, neginf=0.0).flatten(-2)
    places, found = top(entries.abs(), count, entries != 0)
    present = found & wanted
    picked = torch.where(present, entries.gather(-1, places.clamp(min=0)), 0.0)
    root = picked.abs().sqrt()
    root = root / torch.where(present, root, 0.0).sum(-1, keepdim=True).clamp(min=1e-30)
    root = root * present.sum(-1, keepdim=True)  # of mean 1 among the newborns
    sign = draws.signs(count)
    at_input, at_output = places.clamp(min=0) % inputs, places.clamp(min=0) // inputs
    rows = torch.zeros((*present.shape, inputs), device=bypass.device)
    columns = torch.zeros((*present.shape, bypass.shape[-2]), device=bypass.device)
    rows = rows.scatter(-1, at_input[..., None], (sign * root)[..., None])
    columns = columns.scatter(-1, at_output[..., None], (-sign * picked.sign() * root)[..., None])
    return Newborns(
        rows=rows * mean_size(evidence.read("weights_in"), live),
        bias=torch.zeros_like(root),
        columns=columns * mean_size(evidence.read("weights_out"), live),
        present=present,
    )


def matched_donors(rows: Tensor, columns: Tensor, evidence: Evidence) -> Tensor:
    """(..., k) int64 the incumbent that each newborn is most alike: the highest cosine of the rows.

    A newborn whose row is zeros is matched by its column. -1 where no unit is alive.

    Args:
        rows: (..., k, I) of newborns.
        columns: (..., k, O) of newborns.
        evidence: with ``weights_in`` and ``weights_out``.
    """
    by_row = directions(rows) @ directions(evidence.read("weights_in")).mT
    by_column = directions(columns) @ directions(evidence.read("weights_out")).mT
    alike = torch.where((rows == 0).all(-1, keepdim=True), by_column, by_row)
    live = evidence.live[..., None, :]
    best = torch.where(live, alike, -torch.inf).argmax(-1)
    return torch.where(live.any(-1), best, -1)
