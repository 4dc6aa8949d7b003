"""Structure: the units of a user's own model, which are scored, removed, grown, reset and cut out while it trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import MismatchError, UserError, out_of_range
from trimtab.inner_training.structure import brain_surgeon, compaction
from trimtab.inner_training.structure.births import check_newborn_state
from trimtab.inner_training.structure.choosing import check_numbers, check_share, least, marked, named, room
from trimtab.inner_training.structure.collect import Request, gather, listed, weights_of
from trimtab.inner_training.structure.criteria import resolve_criterion
from trimtab.inner_training.structure.diagnostics import Diagnosis, diagnose
from trimtab.inner_training.structure.edit import Edit
from trimtab.inner_training.structure.editing import Editor
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.growth import resolve_growth
from trimtab.inner_training.structure.newborn_state import resolve_newborn_state
from trimtab.inner_training.structure.newborns import scaled
from trimtab.inner_training.structure.normalisations import resolve_normalisation
from trimtab.inner_training.structure.second_order import Loss
from trimtab.inner_training.structure.sight import passed_on_average

MOST_SCALE = 1000.0  # of newborns' columns


class Structure:
    """Units of a model in named groups, and reversible edits of them.

    A unit that is not active gives nothing: all weights that touch it are zero and stay zero in training, in every
    optimizer (see ``Gates``). The model keeps its shapes until ``compact``. Edits keep the optimizer state of everything
    that they do not touch bit for bit.

    Attributes:
        refused: why other units are not offered, by name.
    """

    def __init__(self, given: nn.Module, editor: Editor, example: Any) -> None:
        self.refused = dict(editor.refused)
        self._given, self._gates, self._example = given, editor.gates, example
        self._editor = editor
        self._draws = torch.Generator().manual_seed(0)

    @property
    def groups(self) -> dict[str, int]:
        """Number of units, active or not, by name of the group."""
        return {name: group.units for name, group in self._gates.groups.items()}

    @property
    def active(self) -> dict[str, Tensor]:
        """Bool (units,) by name of the group, a copy: which units are active."""
        return {name: mask.clone() for name, mask in self._gates.active.items()}

    @property
    def ages(self) -> dict[str, Tensor]:
        """int64 (units,) by group: optimizer steps since a unit became active, -1 for inactive ones."""
        return {name: self._gates.ages(name) for name in self._gates.groups}

    @property
    def editor(self) -> Editor:
        """What makes the edits, below this face: for keepers (see ``keeping.maintain``)."""
        return self._editor

    def score(
        self,
        criterion: str,
        batches: Iterable[Any] | None = None,
        loss_fn: Loss | None = None,
        *,
        groups: Iterable[str] | None = None,
        normalisation: str = "none",
    ) -> dict[str, Tensor]:
        """Scores of units by a criterion; the model, its gradients, buffers and random states stay as they are.

        Activations and gradients are those in evaluation mode.

        Args:
            criterion: name from the table of criteria.
            batches: an iterable of batches, read once; None for criteria that look at weights alone.
            loss_fn: ``loss_fn(model, batch)`` gives the mean loss of a batch, a scalar.
            groups: names of groups; None for all.
            normalisation: name from the table of normalisations.

        Returns:
            float32 (units,) by group; high is kept. Inactive units are scored by what they would be.

        Raises:
            UserError: an unknown name; a criterion that needs batches and a loss gets none, or cannot be had of a group.
        """
        chosen, scale = resolve_criterion(criterion), resolve_normalisation(normalisation)
        names = self._named(groups)
        evidence = self._evidence(chosen.needs | scale.needs, names, batches, loss_fn, f"criterion {criterion!r}")
        return {name: scale.apply(chosen.score(one, self._draws), one) for name, one in evidence.items()}

    def prune(
        self,
        share: float,
        criterion: str = "agf",
        scope: str = "global",
        batches: Iterable[Any] | None = None,
        loss_fn: Loss | None = None,
        *,
        groups: Iterable[str] | None = None,
        normalisation: str = "mean",
        repair: bool = False,
    ) -> Edit:
        """Takes the active units of the lowest scores out.

        Args:
            share: of the units that are active now, in (0, 1].
            criterion, batches, loss_fn, groups: see ``score``.
            scope: ``global`` compares the scores of all groups, ``layer`` takes the share of each group.
            normalisation: see ``score``; raw scores (``none``) of groups of other sizes or places may empty one of them.
            repair: whether the units that stay make up, by least squares, for what went out of what reads them (see
                ``brain_surgeon.repair``); this needs batches and a loss.

        Raises:
            UserError: see ``score``; fewer units than a group's minimum would stay. Nothing is changed then.
        """
        share = check_share(share)
        batches = listed(batches)
        scores = self.score(criterion, batches, loss_fn, groups=groups, normalisation=normalisation)
        units = least(scores, self._gates.active, self._gates.groups, share, scope)
        columns: dict[str, Tensor] = {}
        if repair:
            needs = frozenset(("weights_out", "output_cov"))
            for name, evidence in self._evidence(needs, list(units), batches, loss_fn, "repair").items():
                columns[name] = brain_surgeon.repair(evidence, marked(units[name], evidence))
        return self._editor.remove(units, columns)

    def grow(
        self,
        share: float,
        method: str = "pairing",
        batches: Iterable[Any] | None = None,
        loss_fn: Loss | None = None,
        *,
        groups: Iterable[str] | None = None,
        newborn_state: str = "zero",
        scale: float = 1.0,
    ) -> Edit:
        """Makes inactive units active again, as newborns.

        Args:
            share: of each group's units, active or not, in (0, 1]; no more than are inactive.
            method: name from the table of growth methods.
            batches, loss_fn, groups: see ``score``.
            newborn_state: name from the table of newborn states; ``fresh-step`` is for Adam and AdamW (see ``OwnSteps``), and
                equals ``zero`` in optimizers that correct nothing by their number of steps.
            scale: factor on the newborns' columns, in [0, 1000].

        Raises:
            UserError: all units are active, the method finds none to make, or see ``score``. Nothing is changed then.
        """
        counts = room(self._gates.active, self._named(groups), check_share(share))
        chosen, mode = resolve_growth(method), resolve_newborn_state(newborn_state)
        if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 <= scale <= MOST_SCALE:
            raise out_of_range("scale", scale, 0, MOST_SCALE)
        check_newborn_state(mode, self._gates.optimizer)
        evidence = self._evidence(chosen.needs, list(counts), batches, loss_fn, f"growth method {method!r}")

        def bear(name: str, count: int) -> Edit | None:
            # What was born into one group belongs to the weights of the next one.
            weights: dict[str, Any] = dict(weights_of(self._gates, self._gates.groups[name]))
            now = replace(evidence[name], **weights)
            born = scaled(chosen.make(now, count, self._draws), columns=scale)
            return self._editor.bear(name, born, mode, now) if bool(born.present.any()) else None

        edit = self._editor.joined("grow", [partial(bear, name, count) for name, count in counts.items()])
        if edit is None:
            raise UserError(
                f"growth method {method!r} finds no unit to make in {', '.join(counts)}; choose another one"
            )
        return edit

    def reset(
        self,
        units: Mapping[str, Any] | None = None,
        *,
        criterion: str = "redo",
        below: float = 0.025,
        batches: Iterable[Any] | None = None,
        loss_fn: Loss | None = None,
        newborn_state: str = "zero",
        compensate: bool = False,
    ) -> Edit:
        """Makes active units begin anew: rows as ``torch.nn.Linear`` draws them, columns and biases zero.

        The default resets dormant units as ReDo does (Sokar et al., arXiv 2302.12902, with the threshold of its code).
        Without any unit to reset the edit is empty.

        Args:
            units: by group, a bool mask (units,) or numbers of active units; None for those whose score is low.
            criterion: name from the table of criteria.
            below: the largest score of a unit that is reset.
            batches, loss_fn: see ``score``; also needed by ``compensate``.
            newborn_state: see ``grow``.
            compensate: whether what a unit gave on average goes into the biases of what reads it (Dohare et al., Nature
                632, 2024).

        Raises:
            UserError: see ``score``; a unit is not active; no bias can compensate. Nothing is changed then.
        """
        mode = resolve_newborn_state(newborn_state)
        check_newborn_state(mode, self._gates.optimizer)
        batches = listed(batches)
        if isinstance(below, bool) or not isinstance(below, Real) or math.isnan(below):
            raise UserError(f"below is {below!r}; it must be a number, the largest score of a unit that is reset")
        if units is None:
            scores = self.score(criterion, batches, loss_fn)
            units = {name: (values.cpu() <= below) & self._gates.active[name] for name, values in scores.items()}
        found = self._editor.numbered(units)
        means: dict[str, Evidence] = {}
        if compensate:
            means = passed_on_average(self._gates, found, batches, loss_fn)
        return self._editor.reset(found, mode, self._draws, means)

    def mask(self, masks: Mapping[str, Tensor]) -> Edit:
        """Sets weight-level masks, for dynamic sparse training: what is masked is held at zero like an inactive unit.

        Args:
            masks: by name of a parameter, bool of its shape, True for the weights that live. They replace earlier masks of
                these parameters. Weights that come to life begin at zero, with optimizer state that begins anew (Evci et
                al., arXiv 1911.11134).

        Raises:
            UserError: a parameter is unknown, or a mask does not fit. Nothing is changed then.
        """
        return self._editor.mask(masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The weight-level masks that are set, by name of the parameter, copies."""
        return {name: mask.clone() for name, mask in self._gates.live.items()}

    def diagnostics(self, batch: Any, loss_fn: Loss) -> dict[str, Diagnosis]:
        """How the units of each group do on one batch: see ``Diagnosis``.

        The model, its gradients, buffers and random states stay as they are.

        Args:
            batch: of some examples.
            loss_fn: see ``score``.

        Raises:
            UserError: see ``score``.
        """
        return diagnose(self._gates, batch, loss_fn)

    def compact(self, *, copies: Sequence[nn.Module] = ()) -> nn.Module:
        """Cuts inactive units out, in place: the model gets smaller tensors, the optimizer's parameters and state with it.

        Parameters that shrink become new objects; the optimizer is pointed to them. Heads of torch's own attention are
        kept, as gates. Edits from before can no longer be undone.

        Args:
            copies: averaged copies of the model (``AveragedModel``, or of its class), to be cut likewise.

        Returns:
            The model itself, whose outputs on the example input are the same within 1e-5 of the largest.

        Raises:
            UserError: the model is compiled, wrapped, sharded or scripted, has tied weights among those to cut, or its
                forward does not work with other sizes. Model and optimizer are untouched then.
        """
        compaction.check_whole_model(self._given)
        self._editor.compact(self._example, copies)
        return self._given

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers: active units, masks, parked values, ages. Save it beside those of model and optimizer."""
        return {**self._editor.state_dict(), "draws": self._draws.get_state()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a saved state, after the model and the optimizer have loaded theirs; earlier edits stay.

        Raises:
            MismatchError: it is of another structure.
        """
        draws = saved.get("draws") if isinstance(saved, Mapping) and "version" in saved else self._draws.get_state()
        if not isinstance(draws, Tensor) or draws.dtype != torch.uint8 or draws.shape != self._draws.get_state().shape:
            raise MismatchError(
                "the state is damaged: draws is not what structure.state_dict() gives; load it as it was saved"
            )
        self._editor.load_state_dict(saved)
        self._draws.set_state(draws)

    def __repr__(self) -> str:
        counts = (f"{name}: {int(mask.sum())} of {len(mask)}" for name, mask in self._gates.active.items())
        return f"Structure({', '.join(counts)})"

    def _named(self, groups: Iterable[str] | None) -> list[str]:
        if groups is not None and not isinstance(groups, Iterable):
            raise UserError(f"groups is a {type(groups).__name__}; give a list of names, or None for all")
        wanted = [groups] if isinstance(groups, str) else None if groups is None else list(groups)
        for name in wanted or ():
            if name not in self._gates.groups and name in self.refused:
                raise UserError(f"units of {name} are not offered: {self.refused[name]}; choose other groups")
        return named(self._gates.groups, wanted)

    def _evidence(
        self, needs: frozenset[str], names: Sequence[str], batches: Iterable[Any] | None, loss_fn: Loss | None, why: str
    ) -> dict[str, Evidence]:
        request = Request(needs=needs, names=tuple(names), example=self._example, why=why, draws=self._draws)
        evidence = gather(self._gates, request, batches, loss_fn)
        check_numbers(evidence, needs, why)
        return evidence
