"""Evidence about the units of all runs of a population at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trimtab.errors import UserError
from trimtab.inner_training.structure.collect import OPTIONAL
from trimtab.inner_training.structure.evidence import Evidence, averaged
from trimtab.inner_training.structure.stacked_fields import Batch, Gathering, RunFields, State


def gather(
    gathering: Gathering, state: State, weights: Mapping[str, Evidence], batches: Sequence[Batch]
) -> dict[str, Evidence]:
    """Evidence by group, averaged over batches; nothing given is changed.

    Args:
        gathering: what is wanted.
        state: of all runs.
        weights: evidence of the weights, by group.
        batches: at least one where something is wanted that moves.

    Raises:
        UserError: see ``Gathering.check``; there is no batch, or a group lacks a field that is needed.
    """
    if not gathering.moving:
        return dict(weights)
    if not batches:
        raise UserError(f"{gathering.why} needs batches, and there is none; give at least one")
    found = [RunFields(gathering, batch).fields(state, batch) for batch in batches]
    result = {}
    for name in gathering.names:
        missing = sorted(gathering.moving - found[0][name].keys() - OPTIONAL)
        if missing:
            raise UserError(f"{gathering.why} reads {missing[0]}, which cannot be had of {name}; choose other groups")
        result[name] = averaged(_evidence(weights[name], one[name], gathering.needs) for one in found)
    return result


def _evidence(weights: Evidence, fields: Mapping[str, Tensor], needs: frozenset[str]) -> Evidence:
    values: dict[str, Any] = {**weights.given(), **{key: fields[key] for key in fields.keys() & needs}}
    return Evidence(**values)
