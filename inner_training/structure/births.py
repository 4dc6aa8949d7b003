"""Newborn units: their values, and the optimizer state that they begin with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.inner_training.structure import state
from trimtab.inner_training.structure.edit import put_flat
from trimtab.inner_training.structure.gating import Gates
from trimtab.inner_training.structure.groups import Group, Member, split
from trimtab.inner_training.structure.newborn_state import NewbornState
from trimtab.inner_training.structure.newborns import OPEN, Newborns

MAGNIFIED = 1e-3  # of what newborns that are just open give, where a norm of epsilon 1e-5 makes 316 times as much of it


def check_newborn_state(mode: NewbornState, optimizer: torch.optim.Optimizer) -> None:
    """Refuses ``fresh-step`` for optimizers of which it is not known how they correct their moments.

    Raises:
        UserError: see above.
    """
    if mode.own_steps and not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        corrected = any("step" in held for held in optimizer.state.values()) and "betas" in optimizer.param_groups[0]
        if corrected or {"NAdam", "RAdam", "Adamax"} & state.class_names(optimizer):
            raise UserError(
                f"{mode.name} does not know how {type(optimizer).__name__} corrects its moments; "
                "use the state 'zero' or 'transplant'"
            )


def slots_for(gates: Gates, group: Group, born: Newborns) -> Tensor:
    """(k,) the inactive units that newborns become: those that they chose, else the first ones."""
    count = int(born.present.sum())
    if born.chosen is not None:
        return born.chosen[born.present].cpu()
    return (~gates.active[group.name]).nonzero()[:count, 0]


def touched_by(gates: Gates, group: Group, units: Tensor, born: Newborns) -> dict[str, Tensor]:
    """Bool by tensor name: the entries of newborns, and those of incumbents that are changed for them."""
    touched = gates.entries(group, units)
    for members, donors in (
        (group.of_role("column"), _changed(born.donor_columns, 1.0)),
        (group.incoming, _changed(born.donor_rows, 0.0)),
    ):
        for member in members if len(donors) else ():
            touched[member.parameter] |= member.mask(gates.tensor(member.parameter).shape, donors)
    return touched


def _changed(values: Tensor | None, nothing: float) -> Tensor:
    """Numbers of the incumbents that a donor's share or change touches."""
    if values is None:
        return torch.zeros(0, dtype=torch.int64)
    return (values != nothing).reshape(len(values), -1).any(1).nonzero()[:, 0].cpu()


@torch.no_grad()
def put_newborns(gates: Gates, group: Group, units: Tensor, born: Newborns) -> None:
    """Writes the values of newborns into units that are active by now, and changes their donors.

    Newborns that are woken have their parked values already, up to a factor on their columns. Norms of others are those of
    the donors, else begin with scale 1, shift 0 (but see ``_behind_norms``), running mean 0 and variance 1; what else a unit
    has, such as the slope of a PReLU, is the incumbents' mean.
    """
    columns, shapes = (
        group.of_role("column"),
        {one.parameter: gates.tensor(one.parameter).shape for one in group.members},
    )
    if born.chosen is None:
        born, shift = _behind_norms(gates, group, born)
        pieces = split(group.incoming, shapes, born.rows[born.present]) + split(
            columns, shapes, born.columns[born.present]
        )
        if group.bias is not None:
            pieces.append((group.bias, born.bias[born.present][:, None]))
        for member, values in pieces:
            put(gates, member, units, values)
        _begin_others(gates, group, units, None if born.donors is None else born.donors[born.present], shift)
    for member in columns if born.chosen is not None and born.woken_columns != 1 else ():
        entries = member.of(gates.virtual(member.parameter))
        put(gates, member, units, born.woken_columns * entries[units.to(entries.device)])
    donors = _changed(born.donor_columns, 1.0)
    for member in columns if len(donors) else ():
        assert born.donor_columns is not None
        entries = member.of(gates.virtual(member.parameter))
        shares = born.donor_columns.to(entries.device, entries.dtype)
        put(gates, member, donors, (entries * shares[:, None])[donors.to(entries.device)])
    donors = _changed(born.donor_rows, 0.0)
    if len(donors) and born.donor_rows is not None:
        for member, values in split(group.incoming, shapes, born.donor_rows[donors.to(born.donor_rows.device)]):
            entries = member.of(gates.virtual(member.parameter))[donors.to(values.device)]
            put(gates, member, donors, entries + values.to(entries.device))


def put(gates: Gates, member: Member, units: Tensor, values: Tensor) -> None:
    """Writes entries of units, as ``Member.of`` lays them out; what is held goes to the park."""
    target = gates.virtual(member.parameter).clone()
    member.put(target, units, values)
    gates.write(member.parameter, member.mask(target.shape, units), target)


def _is_norm(gates: Gates, name: str) -> bool:
    return "Norm" in type(gates.model.get_submodule(name)).__name__


def _behind_norms(gates: Gates, group: Group, born: Newborns) -> tuple[Newborns, Tensor]:
    """Newborns that are just open (see ``open_rows``), as a norm behind them needs them, and (k,) their shift in it.

    A norm magnifies the little that they give some 300 times, or takes it away where it is the same everywhere. So they
    give a thousandth of it, and it is the norm's shift that opens them; a norm without shift may leave them closed.
    """
    little = (born.rows.norm(dim=-1) <= 1.001 * OPEN) & (born.bias.abs() <= 1.001 * OPEN)
    opened = little & ((born.rows != 0).any(-1) | (born.bias != 0))
    if born.donors is not None:
        opened &= born.donors < 0  # copies are what they are
    normed = bool(group.bare) or any(_is_norm(gates, member.owner) for member in group.others)
    factor = torch.where(opened & normed, MAGNIFIED, 1.0)
    born = replace(born, rows=born.rows * factor[..., None], bias=born.bias * factor)
    return born, torch.where(opened, OPEN / max(1, len(opened)), 0.0)[born.present]


def _begin_others(gates: Gates, group: Group, units: Tensor, donors: Tensor | None, shift: Tensor) -> None:
    for member in group.others:
        entries = member.of(gates.virtual(member.parameter))
        norm = _is_norm(gates, member.owner)
        start = 1.0 if member.parameter.endswith(("weight", "running_var")) else 0.0
        values = torch.full_like(entries[: len(units)], start)
        if norm and member.parameter.endswith("bias"):
            values += shift.to(values)[:, None]
        if not norm:
            incumbents = gates.active[group.name].clone()
            incumbents[units] = False
            chosen = entries[incumbents.to(entries.device)] if incumbents.any() else entries
            values = chosen.mean(0, keepdim=True).expand_as(values)
        if donors is not None:
            copied = entries[donors.clamp(min=0).to(entries.device)]
            values = torch.where((donors >= 0).to(entries.device)[:, None], copied, values)
        put(gates, member, units, values)


@torch.no_grad()
def begin_state(gates: Gates, group: Group, units: Tensor, mode: NewbornState, donors: Tensor) -> None:
    """Gives the optimizer state of newborns its beginning: none, or that of their donors, entry by entry.

    Args:
        gates: in which the newborns are active already.
        group: theirs.
        units: (k,) their numbers.
        mode: one of the table.
        donors: (k,) the incumbent that each is most alike, -1 for none.
    """
    for name, mask in gates.entries(group, units).items():
        tensor = gates.tensor(name)
        if not isinstance(tensor, nn.Parameter):
            continue
        where = mask.to(tensor.device) & ~gates.held(name)
        state.clear(gates.optimizer, tensor, where)
        if not mode.copies:
            continue
        for key, value in state.entries(gates.optimizer, tensor).items():
            if state.repeats_weight(gates.optimizer, key):
                continue
            target = value.clone()
            for member in group.members:
                if member.parameter == name:
                    copied = member.of(value)[donors.clamp(min=0).to(value.device)]
                    none = (donors < 0).to(value.device)[:, None]
                    member.put(target, units, torch.where(none, state.neutral(gates.optimizer, tensor, key), copied))
            value[where] = target[where]


class OwnSteps:
    """Bias correction of Adam by the age of each newborn (``fresh-step``).

    Adam and AdamW keep one step number t per parameter, and divide its moments by 1 - beta**t. Moments of a newborn start
    at zero, so at age a (in steps) its correction would be 1 - beta**a; uncorrected, its first updates are too large by
    sqrt((1 - beta1)**2 / (1 - beta2)), 3.2 by default. The stored moments do not depend on t. So after each
    step, the newborns' entries get the difference between the update with their own a and the one that was made with t. This
    ends when both agree to 1e-4. Other optimizers do not correct, and nothing is done for them.
    """

    def __init__(self) -> None:
        # One for each parameter: its name, flat positions in it, and t at the birth of each of them.
        self.cohorts: list[tuple[str, Tensor, Tensor]] = []
        self._last: dict[str, Tensor] = {}

    def forget(self, touched: Mapping[str, Tensor]) -> None:
        """Leaves marked entries to the optimizer's own count, as their state begins anew or ends.

        Args:
            touched: bool by tensor name, of the tensor's shape.
        """
        kept = []
        for name, where, begun in self.cohorts:
            if name in touched:
                stay = ~touched[name].reshape(-1).to(where.device)[where]
                where, begun = where[stay], begun[stay.to(begun.device)]
            if len(where):
                kept.append((name, where, begun))
        self.cohorts = kept

    def add(self, gates: Gates, group: Group, units: Tensor) -> None:
        """Notes the live entries of newborns, which are noted no more since before (see ``forget``)."""
        if not isinstance(gates.optimizer, torch.optim.Adam):
            return
        for name, mask in gates.entries(group, units).items():
            tensor = gates.tensor(name)
            held = gates.optimizer.state.get(tensor, {}) if isinstance(tensor, nn.Parameter) else {}
            if "step" in held:
                where = (mask.to(tensor.device) & ~gates.held(name)).reshape(-1).nonzero()[:, 0]
                self._join(name, where, torch.as_tensor(held["step"]).expand(len(where)))
                self._last[name] = torch.as_tensor(held["step"]).clone()

    def _join(self, name: str, where: Tensor, begun: Tensor) -> None:
        known = [(one[1], one[2]) for one in self.cohorts if one[0] == name] + [(where, begun)]
        joined = (torch.cat([places for places, _ in known]), torch.cat([steps for _, steps in known]))
        self.cohorts = [one for one in self.cohorts if one[0] != name] + [(name, *joined)]

    def resume(self, gates: Gates, cohorts: list[tuple[str, Tensor, Tensor]]) -> None:
        """Goes on with saved cohorts, beside the state that the optimizer has now."""
        for name, where, begun in cohorts:
            held = gates.optimizer.state.get(gates.tensor(name), {})
            if "step" in held:
                step = torch.as_tensor(held["step"])
                self._join(name, where.to(gates.tensor(name).device), begun.to(step).expand(len(where)))
                self._last[name] = step.clone()

    def take_up(
        self, gates: Gates, cohorts: list[tuple[str, Tensor, Tensor]], touched: list[tuple[str, Tensor]]
    ) -> None:
        """Goes on with cohorts of before an edit that is undone, at the flat positions that it touched; elsewhere nothing
        changes."""
        masks = {name: torch.zeros(gates.tensor(name).shape, dtype=torch.bool) for name, _ in touched}
        for name, where in touched:
            masks[name].view(-1)[where.cpu()] = True
        self.forget(masks)
        for name, where, begun in cohorts:
            back = masks[name].view(-1)[where.cpu()] if name in masks else torch.zeros(len(where), dtype=torch.bool)
            if back.any():
                self._join(name, where[back.to(where.device)], begun[back.to(begun.device)])
        for name, _, _ in self.cohorts:
            held = gates.optimizer.state.get(gates.tensor(name), {})
            self._last[name] = torch.as_tensor(held.get("step", 0)).clone()

    @torch.no_grad()
    def after_step(self, gates: Gates) -> None:
        """Corrects what the step did to newborns; to be called right after it."""
        kept, seen = [], {}
        for name, where, begun in self.cohorts:
            tensor = gates.tensor(name)
            held, group = gates.optimizer.state[tensor], state.group_of(gates.optimizer, tensor)
            if group is None or "exp_avg" not in held:
                continue
            now = torch.as_tensor(held["step"]).clone()
            moved, seen[name] = now > self._last[name], now
            alive = ~gates.held(name).reshape(-1)[where]
            places, ages = where[alive], (now - begun).to(where.device)[alive]
            wrong, right = (self._update(held, group, places, count) for count in (now, ages))
            delta = torch.where(moved.to(wrong.device), wrong - right, 0.0) * group["lr"]
            flat = tensor.detach().reshape(-1)[places]
            put_flat(tensor, places, flat + delta.to(flat.dtype))
            if begun.device.type == "cpu":  # elsewhere it would have to be waited for
                young = group["betas"][1] ** (now - begun).double() > 1e-4
                if not young.all():
                    where, begun = where[young.to(where.device)], begun[young]
            if len(where):
                kept.append((name, where, begun))
        self.cohorts = kept
        self._last = seen

    @staticmethod
    def _update(held: dict[str, Tensor], group: dict[str, object], where: Tensor, count: Tensor) -> Tensor:
        first, second = group["betas"]  # type: ignore[misc]
        spread = held["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"].reshape(-1)[where]
        mean = held["exp_avg"].reshape(-1)[where]
        count = count.to(mean.device).double().clamp(min=1)  # 0.999**1 is too near to one for float32
        return mean / (1 - first**count) / (spread.sqrt() / (1 - second**count).sqrt() + group["eps"])  # type: ignore[has-type]
