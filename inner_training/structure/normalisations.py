"""Normalisations: how scores of different layers are made to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import unknown
from trimtab.inner_training.structure.arithmetic import live_max, live_mean, ranks, ratio
from trimtab.inner_training.structure.evidence import Evidence

LOG_FLOOR = 1e-12  # of the group's largest score: what is smaller, or 0, counts as this


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """One way to make the scores of a group comparable with those of others.

    Attributes:
        name: lower-case word.
        doc: the formula in one line.
        source: where it comes from.
        needs: fields of ``Evidence`` that it reads.
        apply: scores (..., U) and evidence give (..., U), finite for finite scores, in the same order within the group.
    """

    name: str
    doc: str
    source: str
    needs: frozenset[str]
    apply: Callable[[Tensor, Evidence], Tensor]


def _none(scores: Tensor, evidence: Evidence) -> Tensor:
    del evidence
    return scores


def _mean(scores: Tensor, evidence: Evidence) -> Tensor:
    return ratio(scores, live_mean(scores.abs(), evidence.live))


def _max(scores: Tensor, evidence: Evidence) -> Tensor:
    return ratio(scores, live_max(scores.abs(), evidence.live))


def _rank(scores: Tensor, evidence: Evidence) -> Tensor:
    live = evidence.live
    return (ranks(scores, live) / (live.sum(-1, keepdim=True) - 1).clamp(min=1)).clamp(max=1.0)


def _log(scores: Tensor, evidence: Evidence) -> Tensor:
    floor = (LOG_FLOOR * live_max(scores.abs(), evidence.live)).clamp(min=1e-30)
    return torch.maximum(scores, floor).log()


def fisher_trace(evidence: Evidence) -> Tensor:
    """(..., 1) trace of the empirical Fisher matrix of the rows and biases of the units that are alive, >= 0."""
    per_unit = evidence.read("square_in").sum(-1)
    if evidence.square_bias is not None:
        per_unit = per_unit + evidence.square_bias
    return torch.where(evidence.live, per_unit, 0.0).sum(-1, keepdim=True)


def _fisher(scores: Tensor, evidence: Evidence) -> Tensor:
    return ratio(scores, fisher_trace(evidence))


NORMALISATIONS: dict[str, Normalisation] = {
    one.name: one
    for one in (
        Normalisation(name="none", doc="the score as it is", source="", needs=frozenset(), apply=_none),
        Normalisation(name="mean", doc="score / mean |score| of the group", source="Fang et al., arXiv 2301.12900",
                      needs=frozenset(), apply=_mean),
        Normalisation(name="max", doc="score / largest |score| of the group", source="Fang et al., arXiv 2301.12900",
                      needs=frozenset(), apply=_max),
        Normalisation(name="rank", doc="rank in the group, from 0 to 1; equal scores share theirs", source="",
                      needs=frozenset(), apply=_rank),
        Normalisation(name="log", doc="ln of the score, from 1e-12 of the group's largest up", source="",
                      needs=frozenset(), apply=_log),
        Normalisation(name="fisher", doc="score / trace of the empirical Fisher matrix of the group's rows and biases",
                      source="after the abstract of arXiv 2605.09008", needs=frozenset({"square_in", "square_bias"}),
                      apply=_fisher),
    )
}  # fmt: skip


def resolve_normalisation(name: str) -> Normalisation:
    """The normalisation of a name.

    Raises:
        UnknownNameError: there is none; the message names the nearest.

    >>> scores = torch.tensor([1.0, 3.0])
    >>> resolve_normalisation("mean").apply(scores, Evidence(agf=scores))
    tensor([0.5000, 1.5000])
    """
    if name not in NORMALISATIONS:
        raise unknown("normalisation", name, NORMALISATIONS)
    return NORMALISATIONS[name]
