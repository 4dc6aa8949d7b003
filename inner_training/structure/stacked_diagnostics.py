"""How the units of each run do, as one number for each run: what signals read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trimtab.inner_training.structure.arithmetic import live_mean, ratio
from trimtab.inner_training.structure.diagnostics import DORMANT
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.selections import dynamic_range, jaccard, kept
from trimtab.inner_training.structure.stacked_choice import UnitRow
from trimtab.inner_training.structure.units import Units

NEEDS = frozenset(("mean_abs", "active", "pre_grad"))
PARITY = 6.0  # largest |log parity|
DIAGNOSTICS: dict[str, str] = {
    "log_gradient_parity": "mean over groups of ln(E|dL/dz| of newborns / of incumbents), in [-6, 6]; 0 without newborns",
    "log_activation_parity": "the same of the share of outputs above 0.05",
    "parity_known": "1 where a group has both newborns and incumbents",
    "mean_age": "mean over active units of their age, in steps",
    "newborn_age": "mean over newborns of their age, in steps; 0 without newborns",
    "newborn_share": "share of the active units that are newborns",
    "active_share": "share of all units that are active",
    "dormant_share": "share of the active units whose E|h| is at most 0.025 of their group's mean",
    "log_dynamic_range": "ln of the 95th over the 5th percentile of the last scores above 0 of active units",
    "overlap": "Jaccard index of the better halves of the active units, by the last two scorings",
    "scored": "1 where units have been scored",
    "overlap_known": "1 where they have been scored twice",
}


class Scored:
    """The last two scorings of all units, (N, T) each; NaN where a group was not scored."""

    def __init__(self, num_runs: int, total: int, device: torch.device) -> None:
        nothing = torch.full((num_runs, total), torch.nan, device=device)
        self.last, self.before = nothing, nothing

    def note(self, scores: Tensor, runs: Tensor | None = None) -> None:
        """Remembers scores of the runs (N,) bool; None is all."""
        if runs is None:
            self.last, self.before = scores, self.last
        else:
            later = (scores, self.last), (self.last, self.before)
            self.last, self.before = (torch.where(runs[:, None], new, old) for new, old in later)

    def forget(self, runs: Tensor) -> None:
        """The runs (N,) bool have new units."""
        self.last, self.before = (torch.where(runs[:, None], torch.nan, one) for one in (self.last, self.before))


def diagnosed(
    evidence: Mapping[str, Evidence],
    units: Units,
    groups: UnitRow,
    newborn: Mapping[str, Tensor],
    scored: Scored,
) -> dict[str, Tensor]:
    """(N,) float32 by the names of ``DIAGNOSTICS``, all finite.

    Args:
        evidence: with ``NEEDS``, by group.
        units: of the runs.
        groups: of them.
        newborn: (N, U) bool by group.
        scored: its last scorings.
    """
    active, counts = units.active, units.active.sum(1).clamp(min=1)
    both = {name: newborn[name].any(1) & (one.live & ~newborn[name]).any(1) for name, one in evidence.items()}
    known = torch.stack(list(both.values())).sum(0)
    found = {"parity_known": (known > 0).float()}
    for parity, field in (("log_gradient_parity", "pre_grad"), ("log_activation_parity", "active")):
        logs = [
            torch.where(both[name], _log_parity(one.read(field), newborn[name], one.live), 0.0)
            for name, one in evidence.items()
        ]
        found[parity] = ratio(torch.stack(logs).sum(0), known.float())
    age, born = units.age(), groups.joined(dict(newborn), False)
    found["mean_age"] = age.clamp(min=0).sum(1) / counts
    found["newborn_age"] = (age * born).sum(1) / born.sum(1).clamp(min=1)
    found["newborn_share"] = born.sum(1) / counts
    found["active_share"] = active.float().mean(1)
    dormant = [_dormant(one) for one in evidence.values()]
    found["dormant_share"] = torch.stack(dormant).sum(0) / counts
    return {
        name: torch.nan_to_num(value.float(), 0.0) for name, value in {**found, **_of_scores(active, scored)}.items()
    }


def _log_parity(values: Tensor, newborn: Tensor, live: Tensor) -> Tensor:
    new, old = (live_mean(values, which)[:, 0].clamp(min=1e-12) for which in (newborn, live & ~newborn))
    return (new / old).log().clamp(-PARITY, PARITY)


def _dormant(evidence: Evidence) -> Tensor:
    size, live = evidence.read("mean_abs"), evidence.live
    return (live & (size <= DORMANT * live_mean(size, live))).sum(1)


def _of_scores(active: Tensor, scored: Scored) -> dict[str, Tensor]:
    last, before = ((active & ~scores.isnan()) for scores in (scored.last, scored.before))
    both = last & before
    half = both.sum(1) // 2
    halves = [kept(torch.nan_to_num(scores), half, both) for scores in (scored.last, scored.before)]
    twice = both.any(1)
    return {
        "log_dynamic_range": dynamic_range(torch.nan_to_num(scored.last), last).log(),
        "scored": last.any(1).float(),
        "overlap": torch.where(twice, jaccard(halves[0], halves[1]), 0.0),
        "overlap_known": twice.float(),
    }
