"""How scores spread, how far selections agree, and when the spread is too small to decide by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.inner_training.structure.arithmetic import ranks, ratio

WIDEST = 1e12  # largest dynamic range that is told apart
# The range of AGF utilities falls from about 149.4 to 21.4 when a network has converged, and the authors then stop using them
# online (figures of arXiv 2603.12354 at second hand). As a share of the logarithm, so that it fits narrow layers too.
COLLAPSED = math.log(21.4) / math.log(149.4)


def dynamic_range(scores: Tensor, alive: Tensor | None = None) -> Tensor:
    """95th over 5th percentile of the scores above 0: in [1, 1e12], 1 where fewer than two are.

    Units that score 0 (dead ones) are left out: they would make any range infinite.

    Args:
        scores: (..., U); those of several layers side by side give the range of the network.
        alive: (..., U) which units count; None for all.

    >>> dynamic_range(torch.tensor([0.0, 2.0, 2.0, 2.0]))
    tensor(1.)
    """
    counts = scores > 0 if alive is None else (scores > 0) & alive
    levels = torch.tensor([0.05, 0.95], device=scores.device)
    low, high = torch.nanquantile(torch.where(counts, scores, torch.nan), levels, dim=-1)
    return torch.where(counts.any(-1), (high / low.clamp(min=1e-30)).clamp(1.0, WIDEST), 1.0)


def agf_usable(now: Tensor, first: Tensor, share: float = COLLAPSED) -> Tensor:
    """Whether AGF utilities still tell units apart: ln of their dynamic range is at least ``share`` of what it first was.

    Args:
        now: (...) dynamic range now, >= 1.
        first: (...) dynamic range when the run began (or at the first edit), >= 1.
        share: in [0, 1]; the default 0.61 is that of a fall from 149.4 to 21.4.

    Returns:
        (...) bool; where it is False an online decision should go by something else, such as ``magnitude`` or ``random``.

    >>> agf_usable(torch.tensor([21.0, 22.0]), torch.tensor([149.4, 149.4]))
    tensor([False,  True])
    """
    return now.log() >= share * first.log()


def kept(scores: Tensor, count: int | Tensor, alive: Tensor | None = None) -> Tensor:
    """Which units stay when the ``count`` best of those alive do; among equal scores the first ones.

    Args:
        scores: (..., U).
        count: units that stay, or (...) of them.
        alive: (..., U); None for all.

    Returns:
        (..., U) bool.

    >>> kept(torch.tensor([3.0, 1.0, 2.0]), 2)
    tensor([ True, False,  True])
    """
    live = torch.ones_like(scores, dtype=torch.bool) if alive is None else alive
    order = torch.where(live, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    place = order.argsort(-1)
    most = torch.as_tensor(count, device=scores.device)[..., None]
    return live & (place < most)


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """(...) overlap of two selections (..., U) bool: common units over all of them, in [0, 1]; 1 where both are empty.

    >>> jaccard(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
    tensor(0.3333)
    """
    either = (first | second).sum(-1)
    return torch.where(either == 0, 1.0, (first & second).sum(-1) / either.clamp(min=1))


def selection_stability(selections: Sequence[Tensor]) -> Tensor:
    """(...) mean ``jaccard`` of all pairs of selections, such as those of several seeds; 1 is the same one always.

    Args:
        selections: at least two of (..., U) bool.

    Raises:
        UserError: there are fewer.
    """
    if len(selections) < 2:
        raise UserError(f"stability compares selections, and got {len(selections)}; give at least two")
    pairs = [jaccard(one, two) for at, one in enumerate(selections) for two in selections[at + 1 :]]
    return torch.stack(pairs).mean(0)


def rank_correlation(first: Tensor, second: Tensor, alive: Tensor | None = None) -> Tensor:
    """Spearman's correlation of two scores, equal scores sharing their rank: in [-1, 1], 0 where one is constant.

    Args:
        first, second: (..., U), for example ``agf`` and ``magnitude``.
        alive: (..., U) which units count; None for all.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([5.0, 6.0, 7.0])).round(decimals=4)
    tensor(1.)
    """
    live = torch.ones_like(first, dtype=torch.bool) if alive is None else alive
    count = live.sum(-1, keepdim=True)
    one, two = (torch.where(live, ranks(scores, live) - (count - 1) / 2, 0.0) for scores in (first, second))
    spread = (one.square().sum(-1) * two.square().sum(-1)).sqrt()
    return ratio((one * two).sum(-1), spread).clamp(-1.0, 1.0)
