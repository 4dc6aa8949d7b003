"""Evidence about the units of all runs of a population at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from trimtab.errors import UserError
from trimtab.inner_training.networks.conv import recording
from trimtab.inner_training.stepping import compiled, logger
from trimtab.inner_training.structure.collect import OPTIONAL
from trimtab.inner_training.structure.evidence import Evidence, averaged
from trimtab.inner_training.structure.stacked_fields import Batch, Fields, Gathering, RunFields, State

Gather = Callable[[State, Batch], Fields]


class Gatherers:
    """Functions that gather evidence from one batch, made when they are first needed.

    Args:
        compile: whether they are compiled, as the population's step is: that of activity and of gradients, which is
            wanted again and again; per-example gradients and Hessians are not worth it.
    """

    def __init__(self, compile: bool) -> None:
        self._compile = compile
        self._made: dict[Any, Gather] = {}

    def gather(
        self, gathering: Gathering, state: State, weights: Mapping[str, Evidence], batches: Sequence[Batch]
    ) -> dict[str, Evidence]:
        """Evidence by group, averaged over batches; nothing given is changed.

        Args:
            gathering: what is wanted.
            state: of all runs.
            weights: evidence of the weights, by group.
            batches: at least one.

        Raises:
            UserError: a group lacks a field that is needed.
        """
        found = [self._function(gathering, state, batch)(state, batch) for batch in batches]
        result = {}
        for name in gathering.names:
            missing = sorted(gathering.moving - found[0][name].keys() - OPTIONAL)
            if missing:
                raise UserError(
                    f"{gathering.why} reads {missing[0]}, which cannot be had of {name}; choose other groups"
                )
            result[name] = averaged(_evidence(weights[name], one[name], gathering.needs) for one in found)
        return result

    def _function(self, gathering: Gathering, state: State, batch: Batch) -> Gather:
        key = gathering.names, gathering.needs, batch.x.shape
        if key not in self._made:
            plain = RunFields(gathering, batch).fields
            self._made[key] = plain
            if self._compile and gathering.kinds <= {"grad"}:
                self._made[key] = _compiled(plain, state, batch, gathering.family.name)
        return self._made[key]


def _compiled(plain: Gather, state: State, batch: Batch, name: str) -> Gather:
    """The same function, compiled from a record of what it does; the plain one, with a line in the log, if that fails."""
    try:
        with warnings.catch_warnings(), recording():
            warnings.simplefilter("ignore", DeprecationWarning)  # the compiler imports deprecated parts of torch
            recorded = make_fx(lambda state, batch: plain(state, batch))(state, batch)
            fast: Gather = compiled(lambda state, batch: recorded(state, batch))
            fast(state, batch)
    except Exception as error:  # noqa: BLE001 - any failure of the compiler has the same remedy
        reason = str(error).strip().partition("\n")[0]
        logger.warning("the evidence of %s could not be compiled, so it is gathered eagerly: %s", name, reason)
        return plain
    return fast


def _evidence(weights: Evidence, fields: Mapping[str, Tensor], needs: frozenset[str]) -> Evidence:
    values: dict[str, Any] = {**weights.given(), **{key: fields[key] for key in fields.keys() & needs}}
    return Evidence(**values)
