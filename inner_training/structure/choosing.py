"""How many units of which group an edit takes, and which: shares turned into numbers of units."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import UserError, out_of_range, unknown
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.groups import Group

Scope = Literal["global", "layer"]


def check_share(share: object) -> float:
    """A share as Python's float.

    Raises:
        RangeError: it does not lie in (0, 1].
    """
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) <= 1:
        raise out_of_range("share", share, 0, 1, remedy="above 0; 0.1 edits a tenth of the units")
    return float(share)


def named(groups: Mapping[str, Group], wanted: Iterable[str] | None) -> list[str]:
    """The names of the groups that are wanted, all of them for None.

    Raises:
        UserError: one is unknown, or there is none.
    """
    names = list(groups) if wanted is None else list(wanted)
    for name in names:
        if name not in groups:
            raise unknown("group", name, groups)
    if not names:
        raise UserError("there is no group of units to edit; see .refused for why none is offered")
    return names


def least(
    scores: Mapping[str, Tensor], active: Mapping[str, Tensor], groups: Mapping[str, Group], share: float, scope: str
) -> dict[str, Tensor]:
    """The active units of the lowest scores, by group.

    Args:
        scores: (units,) by group, high for what is kept.
        active: bool (units,) by group.
        groups: all groups.
        share: of the active units, in (0, 1].
        scope: ``layer`` takes the share of each group, ``global`` of all groups together, but leaves the best units of each
            group up to its minimum.

    Raises:
        UserError: fewer units would stay active than a group's minimum, or the share amounts to no unit.
    """
    if scope not in ("global", "layer"):
        raise unknown("scope", scope, ("global", "layer"))
    ordered = {}
    for name, values in scores.items():
        units = active[name].nonzero()[:, 0]
        ordered[name] = units[values.cpu()[units].argsort(stable=True)]
    if scope == "layer":
        counts = {name: round(share * len(units)) for name, units in ordered.items()}
        for name, count in counts.items():
            _check_minimum(groups[name], len(ordered[name]), count)
    else:
        counts = _globally(scores, ordered, groups, share)
    if not sum(counts.values()):
        raise UserError(f"a share of {share:g} amounts to no unit in {', '.join(scores)}; give a larger one")
    return {name: ordered[name][:count].sort().values for name, count in counts.items() if count}


def _globally(
    scores: Mapping[str, Tensor], ordered: Mapping[str, Tensor], groups: Mapping[str, Group], share: float
) -> dict[str, int]:
    free = {name: units[: len(units) - groups[name].minimum] for name, units in ordered.items()}
    total, wanted = sum(map(len, ordered.values())), round(share * sum(map(len, ordered.values())))
    if wanted > sum(map(len, free.values())):
        needed = sum(groups[name].minimum for name in ordered)
        raise UserError(
            f"a share of {share:g} takes {wanted} of {total} active units, but {needed} have to stay, at least "
            "one in each group; give a smaller share"
        )
    values = torch.cat([scores[name].cpu()[units] for name, units in free.items()])
    owners = [name for name, units in free.items() for _ in range(len(units))]
    counts = dict.fromkeys(ordered, 0)
    for place in values.argsort(stable=True)[:wanted].tolist():
        counts[owners[place]] += 1
    return counts


def _check_minimum(group: Group, active: int, count: int) -> None:
    if active - count < group.minimum:
        raise UserError(
            f"{group.name} has {active} active units, of which {count} would go; at least {group.minimum} must stay active: "
            "give a smaller share"
        )


def room(active: Mapping[str, Tensor], names: Iterable[str], share: float) -> dict[str, int]:
    """How many units each group gets: a share of its full width, no more than are inactive.

    Raises:
        UserError: no group has an inactive unit, or the share amounts to none.
    """
    free = {name: int((~active[name]).sum()) for name in names}
    if not any(free.values()):
        raise UserError(f"all units of {', '.join(free)} are active, so none can be born; prune some first")
    counts = {name: min(round(share * len(active[name])), count) for name, count in free.items()}
    if not any(counts.values()):
        raise UserError(f"a share of {share:g} amounts to no unit in {', '.join(free)}; give a larger one")
    return {name: count for name, count in counts.items() if count}


def check_numbers(evidence: Mapping[str, Evidence], fields: Iterable[str], why: str) -> None:
    """Refuses to choose units by what is not a number; infinities, as of squares that overflow, are ranked.

    Args:
        evidence: by group.
        fields: that are read.
        why: who reads them, for the message.

    Raises:
        UserError: one has NaN, as where the loss or a weight is NaN.
    """
    for name, one in evidence.items():
        for field in sorted(fields):
            values = getattr(one, field)
            if values is not None and bool(values.isnan().any()):
                raise UserError(
                    f"{why} reads {field}, which is NaN in {name}, so units cannot be told apart; look at the loss and the weights "
                    "for NaN, and go back to finite ones first"
                )


def marked(units: Tensor, evidence: Evidence) -> Tensor:
    """Bool (units,): those of the numbers, beside what is known of all."""
    mask = torch.zeros(evidence.shape, dtype=torch.bool, device=evidence.device)
    mask[units.to(evidence.device)] = True
    return mask


def check_masks(masks: object, parameters: Mapping[str, Tensor]) -> None:
    """Refuses weight-level masks that do not fit.

    Raises:
        UserError: a parameter is unknown, or a mask is not bool of its shape.
    """
    if not isinstance(masks, Mapping):
        raise UserError(f"masks are a {type(masks).__name__}; give bool tensors by name of a parameter")
    for name, live in masks.items():
        if name not in parameters:
            raise unknown("parameter", name, parameters)
        wanted = tuple(parameters[name].shape)
        if not isinstance(live, Tensor):
            raise UserError(f"the mask of {name} is a {type(live).__name__}; give a tensor of bool of shape {wanted}")
        if live.dtype != torch.bool or live.shape != wanted:
            raise UserError(f"the mask of {name} is {live.dtype} of shape {tuple(live.shape)}; give bool of {wanted}")


def numbers(units: object, group: Group) -> Tensor:
    """Numbers of units from a bool mask (units,) or from numbers.

    Raises:
        UserError: they do not fit the group.
    """
    try:
        given = torch.as_tensor(units).cpu()
    except (TypeError, ValueError, RuntimeError):
        given = torch.zeros(0, 0, 0)
    if given.is_floating_point() and given.numel() or given.is_complex() or given.ndim > 1:
        raise UserError(f"units of {group.name} are {reprlib.repr(units)}; give a bool mask, or whole numbers of units")
    if given.dtype == torch.bool:
        if given.shape != (group.units,):
            raise UserError(f"the mask of {group.name} has the shape {tuple(given.shape)}; it must be ({group.units},)")
        return given.nonzero()[:, 0]
    found = torch.unique(given.to(torch.int64))
    if len(found) and (found[0] < 0 or found[-1] >= group.units):
        raise UserError(f"units of {group.name} are numbered from 0 to {group.units - 1}; {found.tolist()} do not fit")
    return found
