"""Growth from nothing: random units, half-silent ones, and pairs that cancel."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.newborns import Newborns, open_rows, random_weights


def _rows(evidence: Evidence, count: int, draws: Draws) -> Tensor:
    return random_weights(evidence.read("weights_in"), evidence.live, count, draws)


def _columns(evidence: Evidence, count: int, draws: Draws) -> Tensor:
    return random_weights(evidence.read("weights_out"), evidence.live, count, draws)


def random(evidence: Evidence, wanted: Tensor, draws: Draws) -> Newborns:
    """Both sides random, bias 0."""
    count = wanted.shape[-1]
    rows, columns = _rows(evidence, count, draws), _columns(evidence, count, draws)
    return Newborns(rows=rows, bias=torch.zeros_like(rows[..., 0]), columns=columns, present=wanted)


def zero_out(evidence: Evidence, wanted: Tensor, draws: Draws) -> Newborns:
    """Random rows, columns of zeros: the columns get a gradient at once, the rows from the second step on."""
    rows = _rows(evidence, wanted.shape[-1], draws)
    columns = rows.new_zeros((*rows.shape[:-1], evidence.read("weights_out").shape[-1]))
    return Newborns(rows=rows, bias=torch.zeros_like(rows[..., 0]), columns=columns, present=wanted)


def zero_in(evidence: Evidence, wanted: Tensor, draws: Draws) -> Newborns:
    """Rows of zeros (see ``open_rows``), random columns: the reverse."""
    columns = _columns(evidence, wanted.shape[-1], draws)
    rows, bias = open_rows(evidence, _rows(evidence, wanted.shape[-1], draws))
    return Newborns(rows=rows, bias=bias, columns=columns, present=wanted)


def _pairs(evidence: Evidence, wanted: Tensor, draws: Draws, row_sign: float, column_sign: float) -> Newborns:
    """Units 0 and 1, 2 and 3, ... share their weights up to a sign; one that is left alone gets columns of zeros."""
    half = (wanted.shape[-1] + 1) // 2
    rows, columns = _rows(evidence, half, draws), _columns(evidence, half, draws)
    rows = torch.stack([rows, row_sign * rows], -2).flatten(-3, -2)[..., : wanted.shape[-1], :]
    columns = torch.stack([columns, column_sign * columns], -2).flatten(-3, -2)[..., : wanted.shape[-1], :]
    padded = torch.nn.functional.pad(wanted, (0, 2 * half - wanted.shape[-1]))
    whole = padded.reshape(*wanted.shape[:-1], half, 2).all(-1).repeat_interleave(2, -1)[..., : wanted.shape[-1]]
    return Newborns(
        rows=rows,
        bias=torch.zeros_like(rows[..., 0]),
        columns=torch.where(whole[..., None], columns, 0.0),
        present=wanted,
    )


def pairing(evidence: Evidence, wanted: Tensor, draws: Draws) -> Newborns:
    """Rows (v, v), columns (z, -z): they cancel for any activation, and get gradients on both sides at once."""
    return _pairs(evidence, wanted, draws, 1.0, -1.0)


def pairing_odd(evidence: Evidence, wanted: Tensor, draws: Draws) -> Newborns:
    """Rows (v, -v), columns (z, z): they cancel for an odd activation, such as tanh."""
    return _pairs(evidence, wanted, draws, -1.0, 1.0)
