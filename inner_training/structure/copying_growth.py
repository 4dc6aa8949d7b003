"""Growth from donors: copies of incumbents that share their outgoing weights."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.inner_training.structure.arithmetic import entries_at, rows_at, top
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.newborns import Newborns, typical_norm
from trimtab.inner_training.structure.splitting import steepest_splits

UNEVEN = 0.1  # of an equal share: how much a copy's share may differ from it, so that copies do not stay copies
SPLIT_STEP = 0.01  # of the mean row norm: how far the two halves of a split unit part


def net2wider(evidence: Evidence, wanted: Tensor, draws: Draws) -> Newborns:
    """Copies of incumbents, drawn with replacement; a donor and its copies share its columns almost evenly.

    The shares sum to 1, so the function stays exactly; they differ a little, so that the copies drift apart without the
    noise that would change it.
    """
    live, count = evidence.live, wanted.shape[-1]
    present = wanted & live.any(-1, keepdim=True)
    order = live.float().argsort(dim=-1, descending=True, stable=True)  # the ones alive come first
    drawn = (draws.uniform(count) * live.sum(-1, keepdim=True)).long().clamp(max=live.shape[-1] - 1)
    donors = order.gather(-1, drawn)
    replicas = torch.ones(live.shape, device=live.device).scatter_add(-1, donors, present.float())
    equal = 1 / replicas.gather(-1, donors)
    shares = torch.where(present, equal * (1 + UNEVEN * (2 * draws.uniform(count) - 1)), 0.0)
    taken = torch.zeros(live.shape, device=live.device).scatter_add(-1, donors, shares)
    return Newborns(
        rows=rows_at(evidence.read("weights_in"), donors),
        bias=torch.zeros_like(shares) if evidence.bias is None else entries_at(evidence.bias, donors),
        columns=rows_at(evidence.read("weights_out"), donors) * shares[..., None],
        present=present,
        donors=donors,
        donor_columns=1 - taken,
    )


def splitting(evidence: Evidence, wanted: Tensor, draws: Draws) -> Newborns:
    """Incumbents whose splitting matrix has an eigenvalue below 0, the lowest first, part along its eigenvector.

    Both halves keep half of the columns: to first order nothing changes, to second order the loss falls by the eigenvalue
    times half the squared step.
    """
    del draws
    rows, live = evidence.read("weights_in"), evidence.live
    values, vectors = steepest_splits(evidence.read("split"))
    donors, found = top(-values, wanted.shape[-1], live & (values < 0))
    present = found & wanted
    step = SPLIT_STEP * typical_norm(rows, live)
    split = torch.where(present, donors, live.shape[-1])
    halved = torch.zeros((*live.shape[:-1], live.shape[-1] + 1), device=live.device).scatter(-1, split, 1.0)[..., :-1]
    return Newborns(
        rows=rows_at(rows - step * vectors, donors),
        bias=torch.zeros_like(present, dtype=rows.dtype)
        if evidence.bias is None
        else entries_at(evidence.bias, donors),
        columns=0.5 * rows_at(evidence.read("weights_out"), donors),
        present=present,
        donors=donors,
        donor_columns=1 - 0.5 * halved,
        donor_rows=step * vectors * halved[..., None],
    )
