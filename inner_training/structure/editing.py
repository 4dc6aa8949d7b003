"""The edits of a plain module: removal, birth, reset, masks and compaction, with the history that undoes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UserError, unknown
from trimtab.inner_training.structure import compaction, state
from trimtab.inner_training.structure.births import OwnSteps, begin_state, put, put_newborns, slots_for, touched_by
from trimtab.inner_training.structure.choosing import check_masks, numbers
from trimtab.inner_training.structure.edit import Edit, Record, put_back, take_record
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.gating import Gates
from trimtab.inner_training.structure.gradient_growth import matched_donors
from trimtab.inner_training.structure.groups import split
from trimtab.inner_training.structure.newborn_state import NewbornState
from trimtab.inner_training.structure.newborns import Newborns
from trimtab.inner_training.structure.resets import compensate, compensated, fresh_units
from trimtab.inner_training.structure.saved import VERSION, check_saved

Touched = dict[str, Tensor]  # bool of a tensor's shape, by its name


@dataclass(frozen=True)
class _Done:
    """An edit that can be undone, and what there was before it."""

    edit: Edit
    records: tuple[Record, ...]
    cohorts: list[tuple[str, Tensor, Tensor]]


class Editor:
    """Edits gates; everything is checked before anything is changed.

    Attributes:
        gates: what is edited.
        refused: why other units are not offered, by name.
    """

    def __init__(self, gates: Gates, refused: Mapping[str, str]) -> None:
        self.gates, self.refused = gates, dict(refused)
        self._own_steps = OwnSteps()
        self._history: list[_Done] = []
        self._waiting: list[Callable[[], None]] = []
        gates.close_as_given()
        hook = gates.optimizer.register_step_post_hook(self._after_step)
        # Before all others, such as those of a controller that puts scheduled values back after the step.
        hooks: Any = hook.hooks_dict_ref()
        hooks.move_to_end(hook.id, last=False)

    def at_next_step(self, call: Callable[[], None]) -> None:
        """Calls something once, after the next optimizer step."""
        self._waiting.append(call)

    def _after_step(self, *_: Any) -> None:
        self.gates.count()
        self.gates.hold()
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()
        if self._own_steps.cohorts:
            self._own_steps.after_step(self.gates)

    def numbered(self, units: Mapping[str, Any]) -> dict[str, Tensor]:
        """Numbers of active units by group, from masks or numbers; groups without any are left out.

        Raises:
            UserError: a group is unknown, they do not fit it, or one is not active.
        """
        if not isinstance(units, Mapping):
            raise UserError(f"units are a {type(units).__name__}; give numbers by group, such as {{'layer': [0, 3]}}")
        found = {}
        for name, given in units.items():
            if name not in self.gates.groups:
                raise unknown("group", name, self.gates.groups)
            chosen = numbers(given, self.gates.groups[name])
            idle = chosen[~self.gates.active[name][chosen]]
            if len(idle):
                raise UserError(f"units {idle.tolist()} of {name} are not active; choose from those that .active shows")
            if len(chosen):
                found[name] = chosen
        return found

    def remove(self, units: Mapping[str, Tensor], columns: Mapping[str, Tensor] | None = None) -> Edit:
        """Takes units out.

        Args:
            units: numbers by group.
            columns: (units, O) by group, what the columns of the units that stay become; None for what they are.

        Raises:
            UserError: fewer than a group's minimum would stay, or the optimizer's state is unknown.
        """
        held = self.gates
        for name, gone in units.items():
            if int(held.active[name].sum()) - len(gone) < held.groups[name].minimum:
                raise UserError(f"{name} has to keep {held.groups[name].minimum} active units; remove fewer")
        touched = self._merged(held.entries(held.groups[name], gone) for name, gone in units.items())
        shapes = {name: held.tensor(name).shape for name in touched}
        repaired = []
        for name, values in (columns or {}).items():
            stay = held.active[name].clone()
            stay[units[name]] = False
            staying = stay.nonzero()[:, 0]
            values = values[staying.to(values.device)]
            for member, entries in split(held.groups[name].of_role("column"), shapes, values):
                touched[member.parameter] |= member.mask(shapes[member.parameter], staying)
                repaired.append((member, staying, entries))

        def change() -> None:
            for member, staying, entries in repaired:
                put(held, member, staying, entries)
            for name, gone in units.items():
                held.active[name][gone] = False
            held.refresh(touched)

        return self._edit("prune", units, touched, change)

    def bear(self, name: str, born: Newborns, mode: NewbornState, evidence: Evidence) -> Edit:
        """Puts newborns in.

        Args:
            name: of the group.
            born: no more than it has inactive units.
            mode: how their optimizer state begins.
            evidence: of the weights of the group as they are now.

        Raises:
            UserError: the optimizer's state is unknown.
        """
        held, group = self.gates, self.gates.groups[name]
        slots = slots_for(held, group, born)
        found = matched_donors(born.rows, born.columns, evidence) if born.donors is None else born.donors
        touched = touched_by(held, group, slots, born)

        def change() -> None:
            held.active[name][slots] = True
            held.born[name][slots] = held.steps
            held.refresh(touched)
            put_newborns(held, group, slots, born)
            self._begin({name: slots}, mode, {name: found[born.present].cpu()})

        return self._edit("grow", {name: slots}, touched, change)

    def reset(
        self, units: Mapping[str, Tensor], mode: NewbornState, draws: torch.Generator, means: Mapping[str, Evidence]
    ) -> Edit:
        """Makes active units begin anew.

        Args:
            units: numbers by group.
            mode: how their optimizer state begins.
            draws: for the new rows.
            means: evidence of their outputs by group, to compensate for; empty for no compensation.

        Raises:
            UserError: no bias can compensate, or the optimizer's state is unknown.
        """
        held = self.gates
        fresh = {name: fresh_units(held, held.groups[name], gone, draws) for name, gone in units.items()}
        biases = compensated(held, {name: (held.groups[name], units[name], means[name]) for name in units if means})
        touched = self._merged([held.entries(held.groups[name], gone) for name, gone in units.items()] + [
            {name: torch.ones(values.shape, dtype=torch.bool) for name, values in biases.items()}
        ])  # fmt: skip

        def change() -> None:
            compensate(held, biases)  # before the newborns, of which some may read others: their biases are zero
            for name, gone in units.items():
                put_newborns(held, held.groups[name], gone, fresh[name])
                held.born[name][gone] = held.steps
            none = {name: torch.full((len(gone),), -1) for name, gone in units.items()}
            self._begin(units, mode, none)

        return self._edit("reset", units, touched, change)

    def _begin(self, units: Mapping[str, Tensor], mode: NewbornState, donors: Mapping[str, Tensor]) -> None:
        for name, slots in units.items():
            begin_state(self.gates, self.gates.groups[name], slots, mode, donors[name])
        for name, slots in units.items() if mode.own_steps else ():
            self._own_steps.forget(self.gates.entries(self.gates.groups[name], slots))
            self._own_steps.add(self.gates, self.gates.groups[name], slots)

    def mask(self, masks: Mapping[str, Tensor]) -> Edit:
        """Sets weight-level masks: bool of a parameter's shape, by its name.

        Raises:
            UserError: a parameter is unknown, or a mask does not fit.
        """
        held, parameters = self.gates, dict(self.gates.model.named_parameters())
        touched = {}
        check_masks(masks, parameters)
        for name, live in masks.items():
            before = held.live.get(name, torch.ones_like(live))
            touched[name] = before.cpu() != live.cpu()

        def change() -> None:
            for name, live in masks.items():
                woken = touched[name] & live.cpu()
                held.live[name] = live.detach().clone()
                if name in held.parked:
                    held.parked[name].masked_fill_(woken.to(held.parked[name].device), 0)
                if live.all():
                    del held.live[name]
            held.refresh(masks)

        return self._edit("mask", {}, touched, change)

    def _merged(self, parts: Iterable[Touched]) -> Touched:
        touched: Touched = {}
        for part in parts:
            for name, mask in part.items():
                touched[name] = touched[name] | mask if name in touched else mask
        return touched

    def _edit(self, kind: str, units: Mapping[str, Tensor], touched: Touched, change: Callable[[], None]) -> Edit:
        """Makes a change, of which only marked entries may be part, and remembers how to undo it."""
        self.gates.check_held()
        tensors = {name: self.gates.tensor(name) for name in touched}
        trained = {name: one for name, one in tensors.items() if isinstance(one, nn.Parameter)}
        state.check_state(self.gates.optimizer, trained)
        record, cohorts = take_record(self.gates, touched), list(self._own_steps.cohorts)
        self._own_steps.forget(touched)
        with torch.no_grad():
            change()
        edit = Edit(kind, units, self._undo)
        self._history.append(_Done(edit, (record.changed(self.gates),), cohorts))
        return edit

    def joined(self, kind: str, steps: Iterable[Callable[[], Edit | None]]) -> Edit | None:
        """Edits made one after the other, as one edit; None where none of them was made.

        If one of them fails, those before it are undone.
        """
        begin = len(self._history)
        try:
            for step in steps:
                step()
        except BaseException:
            while len(self._history) > begin:
                self._history[-1].edit.undo()
            raise
        done = self._history[begin:]
        if len(done) < 2:
            return done[0].edit if done else None
        units = {name: found for one in done for name, found in one.edit.units.items()}
        edit = Edit(kind, units, self._undo)
        self._history[begin:] = [_Done(edit, tuple(record for one in done for record in one.records), done[0].cohorts)]
        return edit

    def touched(self, edit: Edit) -> list[tuple[str, Tensor]]:
        """Tensors by name, with the flat positions that an edit may have changed; empty where it cannot be undone."""
        records = (record for done in self._history if done.edit is edit for record in done.records)
        return [(name, entries.where) for record in records for name, entries in record.entries.items()]

    def settle(self, edit: Edit) -> None:
        """Forgets how to undo the latest edit: from now on it counts as training, over which earlier ones are undone."""
        self._history = [done for done in self._history if done.edit is not edit]

    def _undo(self, edit: Edit) -> None:
        if all(done.edit is not edit for done in self._history):
            raise UserError(
                f"{edit!r} can no longer be undone: the structure has been compacted, loaded or rolled back since"
            )
        last = self._history[-1]
        if last.edit is not edit:
            raise UserError(f"{edit!r} is not the latest edit; undo {last.edit!r} first")
        for name, born in edit.units.items() if edit.kind == "grow" else ():
            stay, least = self.gates.active[name].clone(), self.gates.groups[name].minimum
            stay[born] = False
            if int(stay.sum()) < least:
                raise UserError(
                    f"{edit!r} cannot be undone: units of {name} have gone since, and it has to keep {least}"
                )
        for record in reversed(last.records):
            put_back(self.gates, record)
        self._own_steps.take_up(self.gates, last.cohorts, self.touched(edit))
        self._history.pop()

    def compact(self, example: Any, copies: Sequence[nn.Module]) -> None:
        """See ``compaction.compact``; the history ends."""
        compaction.check_free(self.gates)
        groups, cuts = compaction.compact(self.gates, example, copies)
        shapes = {name: cut.shape for name, cut in cuts.items()}
        cohorts = []
        for name, where, begun in self._own_steps.cohorts:
            if name in cuts:
                steps = torch.full(shapes[name], -1.0, device=where.device)
                steps.view(-1)[where] = begun.to(steps)
                steps = cuts[name].of(steps).reshape(-1)
                where, begun = (steps >= 0).nonzero()[:, 0], steps[steps >= 0].to(begun)
            cohorts.append((name, where, begun))
        self._own_steps.cohorts = cohorts
        self.gates.renew(groups, {name: cut.of for name, cut in cuts.items()})
        self._history.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "version": VERSION,
            **self.gates.state_dict(),
            "cohorts": [[name, where.clone(), begun.clone()] for name, where, begun in self._own_steps.cohorts],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a saved state; the history ends.

        Raises:
            MismatchError: see ``check_saved``; nothing is changed then.
        """
        check_saved(self.gates, saved)
        self.gates.load_state_dict(saved)
        self._own_steps = OwnSteps()
        self._own_steps.resume(self.gates, [(name, where, begun) for name, where, begun in saved["cohorts"]])
        self._history.clear()
