"""What structural levers do to a user's own model, and what is measured of its units: as ``population_edits`` has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trimtab.errors import UserError
from trimtab.inner_training.activations import EXAMPLES
from trimtab.inner_training.edits import EditConfig, UnitCounts
from trimtab.inner_training.measurements import PROBE_EVERY
from trimtab.inner_training.module_parts import examples_in
from trimtab.inner_training.own_randomness import ProcessRandomness
from trimtab.inner_training.structure.collect import WEIGHTS, Request, gather
from trimtab.inner_training.structure.criteria import resolve_criterion
from trimtab.inner_training.structure.edit import Edit
from trimtab.inner_training.structure.evidence import Evidence, of_runs
from trimtab.inner_training.structure.groups import Group
from trimtab.inner_training.structure.growth import resolve_growth
from trimtab.inner_training.structure.normalisations import resolve_normalisation
from trimtab.inner_training.structure.second_order import Loss
from trimtab.inner_training.structure.stacked_choice import lowest
from trimtab.inner_training.structure.stacked_diagnostics import DIAGNOSTICS, NEEDS, Scored, diagnosed
from trimtab.inner_training.structure.structure import Structure
from trimtab.inner_training.structure.units import Units
from trimtab.inner_training.structure.unsettled import Unsettled

Source = Iterable[Any] | Callable[[], Iterable[Any]]
FREE = WEIGHTS | {"flow_in", "flow_out"}  # fields of the evidence that need no data


@dataclass(frozen=True)
class Edited:
    """One edit that was made, or would be.

    Attributes:
        kind: ``prune``, ``grow`` or ``reset``.
        units: how many units by group; groups without any are left out.
    """

    kind: str
    units: Mapping[str, int]

    def words(self) -> str:
        """In words.

        >>> Edited("grow", {"0": 3, "2": 1}).words()
        'grow 3 units of 0 and 1 of 2'
        """
        first, *others = (f"{count} of {name}" for name, count in self.units.items())
        many = "" if first.startswith("1 of") else "s"
        told = [first.replace(" of", f" unit{many} of", 1), *others]
        return f"{self.kind} {' and '.join(told)}"


@dataclass(frozen=True)
class _Placed:
    span: slice
    group: Group


class _Row:
    """The groups of a model beside each other; see ``UnitRow``."""

    def __init__(self, groups: Mapping[str, Group]) -> None:
        self.total, self._placed = 0, dict[str, _Placed]()
        for name, group in groups.items():
            self._placed[name] = _Placed(slice(self.total, self.total + group.units), group)
            self.total += group.units

    def __getitem__(self, name: str) -> _Placed:
        return self._placed[name]

    def joined(self, values: dict[str, Tensor], fill: float | bool) -> Tensor:
        first = next(iter(values.values()))
        return torch.cat(
            [values.get(name, first.new_full((1, one.group.units), fill)) for name, one in self._placed.items()], 1
        )


class LiveEdits:
    """Edits of one model's units, as an ``EditConfig`` says.

    Args:
        structure: the units.
        config: the settings.
        batches: calibration batches, of which the first are read whenever there is something to score; a function makes
            them anew. None for criteria that look at weights alone.
        loss_fn: ``loss_fn(model, batch)`` gives the mean loss of a batch; None as for ``batches``.

    Attributes:
        structure, config: those.
        intervals: intervals that have ended.
    """

    def __init__(self, structure: Structure, config: EditConfig, batches: Source | None, loss_fn: Loss | None) -> None:
        self.structure, self.config, self.intervals = structure, config, 0
        self._batches, self._loss = batches, loss_fn
        self._unsettled, self._draws = Unsettled(structure.editor), structure._draws.get_state()
        self._scored: Scored | None = None
        self._edited: dict[str, Tensor] = {}  # by tensor name, entries of units that were edited

    @property
    def _groups(self) -> Mapping[str, Group]:
        return self.structure.editor.gates.groups

    @property
    def measurable(self) -> bool:
        """Whether there are data to measure units on."""
        return self._batches is not None

    def _taken(self, count: int) -> list[Any] | None:
        """The first calibration batches; reading them leaves the random states of the process as they were."""
        if self._batches is None:
            return None
        randomness = ProcessRandomness()
        before = randomness.state_dict()
        try:
            source = self._batches() if callable(self._batches) else self._batches
            return list(islice(iter(source), count))
        finally:
            randomness.load_state_dict(before)

    # --- edits ------------------------------------------------------------------------------------------------------

    def counts(self) -> UnitCounts:
        """The units now, of one run."""
        gates = self.structure.editor.gates
        rows = [(int(gates.active[name].sum()), one.units, one.minimum) for name, one in gates.groups.items()]
        active, units, minimum = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        return UnitCounts(active[None], units[None], minimum[None])

    def planned(self, name: str, share: float, units: UnitCounts) -> Edited:
        """What ``edit`` would do; nothing is changed."""
        if name == "width" and share > 0:
            sizes = zip(self._groups, units.units[0], units.active[0], strict=True)
            born = {group: int(min(np.round(share * size), size - active)) for group, size, active in sizes}
            return Edited("grow", {group: count for group, count in born.items() if count})
        kind = "reset" if name == "reset" else "prune"
        return _told(kind, self._lowest(name, share, units))

    def edit(self, name: str, share: float, units: UnitCounts) -> Edited:
        """Does what was permitted.

        Args:
            name: of the lever.
            share: as ``EditLimits.permit`` gave it, not 0.
            units: as they are.

        Raises:
            UserError: no unit can be made, or batches, loss or optimizer do not fit. Nothing is changed then.
        """
        config, structure = self.config, self.structure
        self._draws = structure._draws.get_state()
        if name == "width" and share > 0:
            made = structure.grow(
                share,
                config.growth,
                self._taken(config.batches),
                self._loss,
                newborn_state=config.newborn_state,
                scale=config.scale,
            )
        elif name == "width":
            made = structure.editor.remove(self._lowest(name, share, units))
        else:
            made = structure.reset(self._lowest(name, share, units))
        self._note(made)
        return _told(made.kind, made.units)

    def _lowest(self, name: str, share: float, units: UnitCounts) -> dict[str, Tensor]:
        """Numbers of the units that go or begin anew, by group: chosen as in a population."""
        criterion, scale, wanted = self.config.reset_criterion, "none", np.array([share])
        if name == "width":
            criterion, scale = self.config.criterion, self.config.normalisation
            wanted = units.of_active(np.array([-share]))
        scores = {one: found.cpu()[None] for one, found in self._scores(criterion, scale).items()}
        row, active = _Row(self._groups), self.structure.active
        joined = row.joined({one: mask[None] for one, mask in active.items()}, False)
        which = lowest(scores, joined, row, wanted, self.config.scope)[0]
        found = {one: which[row[one].span].nonzero()[:, 0] for one in active}
        return {one: numbers for one, numbers in found.items() if len(numbers)}

    def _scores(self, criterion: str, normalisation: str) -> dict[str, Tensor]:
        moving = (resolve_criterion(criterion).needs | resolve_normalisation(normalisation).needs) - FREE
        batches = self._taken(self.config.batches) if moving else None
        return self.structure.score(criterion, batches, self._loss, normalisation=normalisation)

    def _gathered(
        self, needs: frozenset[str], why: str, batches: list[Any] | None, draws: torch.Generator
    ) -> dict[str, Evidence]:
        structure = self.structure
        request = Request(needs=needs, names=tuple(self._groups), example=structure._example, why=why, draws=draws)
        return gather(structure.editor.gates, request, batches, self._loss)

    def _note(self, made: Edit) -> None:
        gates = self.structure.editor.gates
        self._unsettled.add(made)
        for name, numbers in made.units.items():
            for tensor, mask in gates.entries(gates.groups[name], numbers).items():
                known = self._edited.get(tensor)
                self._edited[tensor] = mask if known is None or known.shape != mask.shape else known | mask

    def settle(self) -> None:
        """What was edited up to now is not taken back any more."""
        self._unsettled.settle()

    def take_back(self) -> None:
        """Undoes what was edited since ``settle``, if nothing has happened to the model in between."""
        if self._unsettled.take_back():
            self.structure._draws.set_state(self._draws)

    def check(self, levers: Iterable[str]) -> None:
        """Scores units once by each criterion that levers need, and gathers what newborns are made of.

        Raises:
            UserError: a criterion or the growth method cannot be had of this model, its batches and its loss.
        """
        wanted = {
            "width": (self.config.criterion, self.config.normalisation),
            "reset": (self.config.reset_criterion, "none"),
        }
        names, draws = set(levers), self.structure._draws.get_state()
        try:
            for criterion, normalisation in {wanted[name] for name in names & wanted.keys()}:
                what = f"criterion {criterion!r}"
                self._scores(criterion, normalisation)
            if "width" in names:
                what = f"growth method {self.config.growth!r}"
                needs = resolve_growth(self.config.growth).needs
                batches = self._taken(self.config.batches) if needs - FREE else None
                self._gathered(needs, what, batches, self.structure._draws)
        except UserError:
            raise
        except Exception as error:  # of a source or a loss of somebody else's
            raise UserError(
                f"what {what} reads could not be had ({type(error).__name__}: {error}); batches must give batches again and "
                "again, and loss_fn(model, batch) the mean loss of one"
            ) from error
        finally:
            self.structure._draws.set_state(draws)

    def spared(self, parameter: Tensor) -> Tensor | None:
        """Bool of a parameter's shape, what an anchor must not pull on: units that are held at zero or were edited; None
        for nothing."""
        gates = self.structure.editor.gates
        for name in self._edited:
            if gates.tensor(name) is parameter:
                return gates.held(name) | self._edited[name].to(parameter.device)
        held = next((name for name in gates.parked if gates.tensor(name) is parameter), None)
        return None if held is None else gates.held(held)

    # --- looking at units -------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """An interval has ended: whether units are to be measured now."""
        self.intervals += 1
        return self.measurable and (self.intervals - 1) % PROBE_EVERY == 0

    def measured(self) -> np.ndarray:
        """(R, 1) by ``DIAGNOSTICS``, on the first examples of a calibration batch.

        Raises:
            UserError: batches or loss do not fit.
        """
        gates, criterion = self.structure.editor.gates, resolve_criterion(self.config.criterion)
        draws = torch.Generator().manual_seed(gates.steps)  # of its own, so that edits draw what they would draw anyway
        few = [_first(batch) for batch in self._taken(1) or ()]
        single = self._gathered(NEEDS | criterion.needs, "the structure's signals", few, draws)
        scores = {name: criterion.score(one, draws)[None] for name, one in single.items()}
        evidence, row = {name: of_runs([one]) for name, one in single.items()}, _Row(gates.groups)
        device = next(iter(single.values())).device
        if self._scored is None or self._scored.last.shape[1] != row.total:
            self._scored = Scored(1, row.total, device)
        self._scored.note(row.joined(scores, torch.nan))
        newborn = {name: self._newborn(name)[None].to(device) for name in gates.groups}
        found = diagnosed(evidence, self._units(row, device), row, newborn, self._scored)
        return torch.stack([found[name] for name in DIAGNOSTICS]).double().cpu().numpy()

    def _newborn(self, name: str) -> Tensor:
        gates = self.structure.editor.gates
        active, born = gates.active[name], gates.born[name]
        latest: Tensor = active & (born >= 0) & (born == torch.where(active, born, -1).max())
        return latest

    def _units(self, row: _Row, device: torch.device) -> Units:
        gates, nothing = self.structure.editor.gates, torch.zeros(1, dtype=torch.int64, device=device)
        active, born = (
            row.joined({name: one[None] for name, one in held.items()}, False).to(device)
            for held in (gates.active, gates.born)
        )
        empty = torch.zeros(1, 0, device=device)
        return Units(active, born, nothing + gates.steps, nothing, nothing, empty, empty.bool())


def _told(kind: str, units: Mapping[str, Tensor]) -> Edited:
    return Edited(kind, {name: len(numbers) for name, numbers in units.items() if len(numbers)})


def _first(batch: Any) -> Any:
    """The first examples of a batch of any nesting."""
    examples = examples_in(batch)

    def few(leaf: Any) -> Any:
        whole = isinstance(leaf, Tensor | np.ndarray) and leaf.ndim > 0 and len(leaf) == examples
        return leaf[:EXAMPLES] if whole else leaf

    return batch if examples is None or examples <= EXAMPLES else pytree.tree_map(few, batch)
