"""The structure of a population: units of all its runs scored, removed, born and renewed at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError, check_whole, unknown
from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.brain_surgeon import repair as repaired
from trimtab.inner_training.structure.collect import WEIGHTS
from trimtab.inner_training.structure.criteria import resolve_criterion
from trimtab.inner_training.structure.draft import Draft, with_weights, without
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.groups import Group
from trimtab.inner_training.structure.growth import resolve_growth
from trimtab.inner_training.structure.newborn_state import resolve_newborn_state
from trimtab.inner_training.structure.newborns import scaled
from trimtab.inner_training.structure.normalisations import resolve_normalisation
from trimtab.inner_training.structure.stacked_choice import check_runs, check_scope, check_shares, lowest
from trimtab.inner_training.structure.stacked_diagnostics import NEEDS, Scored, diagnosed
from trimtab.inner_training.structure.stacked_edit import StackedEdit
from trimtab.inner_training.structure.stacked_masks import StackedMasks

SHARED_STATES = ("zero", "transplant")


class Stacked(StackedMasks):
    """The units of all runs of a population, made when somebody wants to edit them; it is one population's for life.

    An inactive unit has rows, biases and columns of exactly zero, and zero optimizer state. Its gradients are then exactly
    zero, so it stays as it is under every update rule, and a step costs nothing more. The values that it had are parked.
    Activity, ages and parked values go back with a rollback, and a reset run starts with its instance's own widths. Nothing
    here waits for the device, and what a run gets depends on its own stream alone.

    Args:
        population: of runs; one without units that can be told is refused.
        groups: its groups; None for those of ``stacked_groups``.
        compile: whether what gathers activity and gradients is compiled, at its first use; None is as the population's
            step is.

    Attributes:
        population: the runs.
        refused: by group, why it is not offered.

    Raises:
        UserError: no group is offered, or the population has a structure already.
    """

    def __init__(
        self, population: Population, groups: Iterable[Group] | None = None, *, compile: bool | None = None
    ) -> None:
        super().__init__(population, groups, compile)
        self._scored = Scored(population.num_runs, self._flat.total, population.device)

    def _forget_scores(self, runs: Tensor) -> None:
        self._scored.forget(runs)

    # --- looking at units -------------------------------------------------------------------------------------------

    @property
    def groups(self) -> dict[str, int]:
        """Units U by group, active or not."""
        return {one.name: one.units for one in self._flat}

    @property
    def active(self) -> dict[str, Tensor]:
        """(N, U) bool by group."""
        return self._flat.by_group(self._units.active)

    @property
    def age(self) -> dict[str, Tensor]:
        """(N, U) int64 by group: steps since a unit was born or renewed, or since its run began; -1 for inactive ones."""
        return self._flat.by_group(self._units.age())

    @property
    def newborn(self) -> dict[str, Tensor]:
        """(N, U) bool by group: active units of the group's latest growth or renewal in their run."""
        return self._flat.by_group(self._newborn())

    def _newborn(self) -> Tensor:
        found = []
        for one in self._flat:
            active, born = (value[:, one.span] for value in (self._units.active, self._units.born))
            latest = torch.where(active, born, -1).amax(1, keepdim=True)
            found.append(active & (born == latest) & (born >= 0))
        return torch.cat(found, 1)

    def evidence(
        self,
        needs: Iterable[str],
        *,
        batches: int = 1,
        split: str | None = None,
        examples: int | None = None,
        groups: Iterable[str] | None = None,
        why: str = "evidence",
    ) -> dict[str, Evidence]:
        """Evidence (N, ...) by group, of the parameters as they are; runs are left as they are.

        Args:
            needs: fields of ``Evidence``.
            batches: how many, >= 1.
            split: None for the batches that each run trains on next, else ``train``, ``validation`` or ``test``, whose first
                examples are taken.
            examples: of each batch, the first ones; None for the family's ``max_batch``.
            groups: names; None for all.
            why: who asks, for messages.

        Raises:
            UserError: an unknown name, or what cannot be gathered of all runs at once.
        """
        check_whole("batches", batches, 1)
        return self._evidence(frozenset(needs), self._named(groups), (batches, split, examples), why)

    def score(
        self,
        criterion: str = "agf",
        *,
        normalisation: str = "none",
        evidence: Mapping[str, Evidence] | None = None,
        batches: int = 1,
        split: str | None = None,
        examples: int | None = None,
        groups: Iterable[str] | None = None,
        noted: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Scores (N, U) by group; high is kept. Inactive units are scored by what they would be.

        Scores are remembered for ``diagnostics``.

        Args:
            criterion: name from the table of criteria.
            normalisation: name from the table of normalisations.
            evidence: to score from; None gathers what is needed.
            batches, split, examples, groups: see ``evidence``.
            noted: (N,) bool on the device, the runs whose scores are remembered; None for all.

        Raises:
            UserError: see ``evidence``.
        """
        chosen, scale = resolve_criterion(criterion), resolve_normalisation(normalisation)
        if evidence is None:
            needs = chosen.needs | scale.needs
            evidence = self.evidence(needs, batches=batches, split=split, examples=examples, groups=groups,
                                     why=f"criterion {criterion!r}")  # fmt: skip
        scores, seeds = {}, self._seeds_of(self._units.edits)
        for name, one in evidence.items():
            scores[name] = scale.apply(chosen.score(one, self._seeds(self._flat[name], seeds)), one)
        self._scored.note(self._flat.joined(scores, torch.nan), noted)
        return scores

    def diagnostics(
        self, evidence: Mapping[str, Evidence] | None = None, *, examples: int | None = None
    ) -> dict[str, Tensor]:
        """How the units of each run do: (N,) float32 by name, finite (see ``stacked_diagnostics.DIAGNOSTICS``).

        Args:
            evidence: with ``stacked_diagnostics.NEEDS``; None gathers them from the batch that each run trains on next.
            examples: see ``evidence``.
        """
        known = self.evidence(NEEDS, examples=examples, why="diagnostics") if evidence is None else evidence
        return diagnosed(known, self._units, self._flat, self._flat.by_group(self._newborn()), self._scored)

    # --- edits ------------------------------------------------------------------------------------------------------

    def prune(
        self,
        shares: float | np.ndarray,
        scores: Mapping[str, Tensor],
        *,
        scope: str = "global",
        runs: np.ndarray | None = None,
        repair: Mapping[str, Evidence] | None = None,
    ) -> StackedEdit:
        """Takes the active units of the lowest scores out; their entries become zero, and all others stay bit for bit.

        Args:
            shares: one, or (N,), of the units that are active in the scored groups, in [0, 1]; a share that amounts to no
                unit does nothing, and a group keeps its minimum.
            scores: (N, U) by group, as ``score`` gives them.
            scope: ``global`` compares the scores of all groups, ``layer`` takes the share of each.
            runs: mask (N,) bool; None for all.
            repair: evidence with ``output_cov`` by group, for the units that stay to make up, by least squares, for what
                went out of what reads them (see ``brain_surgeon.repair``); None for no repair.

        Raises:
            UserError: a share, scope, mask or group that does not fit.
        """
        check_scope(scope)
        self._named(scores)
        masked = check_shares(shares, self._num_runs) * check_runs(runs, self._num_runs)
        return self._removed("prune", lowest(scores, self._units.active, self._flat, masked, scope), repair or {})

    def remove(self, units: Mapping[str, Tensor]) -> StackedEdit:
        """Takes chosen units out: (N, U) bool by group. Where fewer than a group's minimum would stay, none of it goes."""
        self._named(units)
        gone = {}
        for name, chosen in units.items():
            active = self.active[name]
            stay = (active & ~chosen).sum(1, keepdim=True) >= self._flat[name].group.minimum
            gone[name] = active & chosen & stay
        return self._removed("prune", self._flat.joined(gone, False), {})

    def _removed(self, kind: str, gone: Tensor, repair: Mapping[str, Evidence]) -> StackedEdit:
        if not repair:
            return self._changed(kind, partial(without, self._flat, self.population._learner, self._units, gone))
        draft = self._draft()
        columns = {name: (gone[:, self._flat[name].span], one) for name, one in repair.items()}
        fresh = {
            name: (repaired(with_weights(one, draft.weights(self._flat[name])), which), which)
            for name, (which, one) in columns.items()
        }
        draft.remove(gone)
        for name, (values, which) in fresh.items():
            draft.set_columns(self._flat[name], values, which.any(1))
        return self._done(kind, draft)

    def grow(
        self,
        shares: float | np.ndarray,
        method: str = "pairing",
        *,
        newborn_state: str = "zero",
        scale: float = 1.0,
        runs: np.ndarray | None = None,
        evidence: Mapping[str, Evidence] | None = None,
        batches: int = 1,
        groups: Iterable[str] | None = None,
    ) -> StackedEdit:
        """Makes inactive units active, as newborns; groups come one after the other, so one's newborns read another's.

        Args:
            shares: one, or (N,), of each group's units, active or not, in [0, 1]; no more than are inactive.
            method: name from the table of growth methods.
            newborn_state: ``zero`` or ``transplant``.
            scale: factor on the newborns' columns, >= 0.
            runs: mask (N,) bool; None for all.
            evidence: with what the method needs beside weights; None gathers it.
            batches, groups: see ``evidence``.

        Raises:
            UserError: see ``evidence``; a share or mask that does not fit, or a newborn state that populations do not have.
        """
        chosen, mode = resolve_growth(method), resolve_newborn_state(newborn_state)
        if newborn_state not in SHARED_STATES:
            raise UserError(
                f"newborn state {newborn_state!r} needs a count of steps for each weight, which a population does not keep; "
                f"use {' or '.join(map(repr, SHARED_STATES))}"
            )
        masked = check_shares(shares, self._num_runs) * check_runs(runs, self._num_runs)
        names = self._named(groups)
        moving = chosen.needs - WEIGHTS
        if evidence is None and moving:
            evidence = self._evidence(moving, names, (batches, None, None), f"growth method {method!r}")
        draft = self._draft()
        for one in (self._flat[name] for name in names):
            counts = np.round(masked * one.units).astype(np.int64)
            if not counts.any():
                continue
            known = draft.weights(one) if evidence is None else with_weights(evidence[one.name], draft.weights(one))
            room = (~known.live).sum(1)
            wanted = torch.minimum(torch.from_numpy(counts).to(room.device), room)
            born = chosen.make(known, int(counts.max()), self._seeds(one), wanted)
            draft.bear(one, scaled(born, columns=scale), copies=mode.copies)
        return self._done("grow", draft)

    def reset(self, units: Mapping[str, Tensor], *, compensate: Mapping[str, Evidence] | None = None) -> StackedEdit:
        """Makes chosen active units begin anew: rows as ``torch.nn.Linear`` draws them, all else zero, state of zero.

        Args:
            units: (N, U) bool by group; inactive ones are passed over.
            compensate: evidence with ``mean`` by group: what a unit gave on average goes into the biases of what reads it
                (Dohare et al., Nature 632, 2024); None for no compensation.

        Raises:
            UserError: an unknown group, or no bias that could compensate.
        """
        self._named(units)
        draft = self._draft()
        for name, given in units.items():
            one = self._flat[name]
            chosen = given & self.active[name]
            if compensate is not None:
                if any(bias is None for _, bias in one.readers):
                    raise UserError(f"something that reads {name} has no bias that could compensate; leave that out")
                draft.compensate(one, chosen, compensate[name].read("mean"))
            draft.renew(one, chosen, Draws(self._seeds(one), (self._num_runs,), chosen.device))
        return self._done("reset", draft)

    def _draft(self) -> Draft:
        return Draft(self._flat, self.population._learner, self._units)

    def _named(self, groups: Iterable[str] | None) -> list[str]:
        wanted = self._flat.names() if groups is None else [groups] if isinstance(groups, str) else list(groups)
        for name in wanted:
            if name not in self._flat and name in self.refused:
                raise UserError(f"units of {name} are not offered: {self.refused[name]}; choose other groups")
            if name not in self._flat:
                raise unknown("group", name, self._flat.names())
        return wanted
