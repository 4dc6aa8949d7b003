"""Newborn units: their values, and the optimizer state that they begin with."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.errors import MismatchError, UserError, unknown
from trimtab.inner_training.structure import state
from trimtab.inner_training.structure.gating import Gates
from trimtab.inner_training.structure.groups import Group, joined, split

NewbornState = Literal["zero", "transplant", "fresh-step"]
STATES: tuple[NewbornState, ...] = ("zero", "transplant", "fresh-step")


class Born(Protocol):
    """What a growth method gives for k newborns of a group (see ``Evidence`` for I, O and U)."""

    @property
    def rows(self) -> Tensor:
        """(k, I)."""

    @property
    def bias(self) -> Tensor | None:
        """(k,), or None for zeros."""

    @property
    def columns(self) -> Tensor:
        """(k, O)."""

    @property
    def donors(self) -> Tensor | None:
        """(k,) numbers of the incumbents that newborns were copied from; None for none."""

    @property
    def donor_columns(self) -> Tensor | None:
        """(U,) factors of the incumbents' own columns; None for ones."""

    @property
    def chosen(self) -> Tensor | None:
        """(k,) numbers of the inactive units that newborns become; None where it does not matter."""


def check_newborn_state(mode: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuses an unknown state of newborns, and ``fresh-step`` for optimizers whose steps it does not know.

    Raises:
        UserError: see above.
    """
    if mode not in STATES:
        raise unknown("state of newborns", mode, STATES)
    if mode == "fresh-step" and not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        corrected = {"NAdam", "RAdam", "Adamax", "SparseAdam"} & state.class_names(optimizer)
        if corrected or ("betas" in optimizer.param_groups[0] and type(optimizer).__module__.startswith("torch.")):
            raise UserError(
                f"fresh-step does not know how {type(optimizer).__name__} corrects its moments; "
                "use the state 'zero' or 'transplant'"
            )


def check_newborns(gates: Gates, group: Group, born: Born, count: int) -> None:
    """Refuses newborns whose shapes do not fit the group.

    Raises:
        MismatchError: naming the shape that does not fit.
    """
    rows, columns = joined(group.incoming, gates.tensor).shape[1], joined(group.of_role("column"), gates.tensor).shape[1]
    for what, given, wanted in (("rows", born.rows, rows), ("columns", born.columns, columns)):
        if tuple(given.shape) != (count, wanted):
            raise MismatchError(
                f"the newborns of {group.name} have {what} of shape {tuple(given.shape)}; it must be {(count, wanted)}"
            )
        if not torch.isfinite(given).all():
            raise MismatchError(f"the newborns of {group.name} have {what} that are not finite; nothing was changed")


@torch.no_grad()
def put_newborns(gates: Gates, group: Group, units: Tensor, born: Born) -> None:
    """Writes the values of newborns into units that are active already, and rescales their donors' columns."""
    shapes = {member.parameter: gates.tensor(member.parameter).shape for member in group.members}
    columns = group.of_role("column")
    pieces = split(group.incoming, shapes, born.rows) + split(columns, shapes, born.columns)
    if group.bias is not None:
        bias = torch.zeros(len(units)) if born.bias is None else born.bias
        pieces.append((group.bias, bias[:, None]))
    for member, values in pieces:
        target = gates.virtual(member.parameter).clone()
        member.put(target, units, values)
        gates.write(member.parameter, member.mask(target.shape, units), target)
    if born.donor_columns is not None:
        scaled = (born.donor_columns.cpu() != 1).nonzero()[:, 0]
        for member in columns:
            target = gates.virtual(member.parameter).clone()
            values = member.of(target) * born.donor_columns.to(target.device, target.dtype)[:, None]
            member.put(target, scaled, values[scaled.to(target.device)])
            gates.write(member.parameter, member.mask(target.shape, scaled), target)
    if born.chosen is None:
        _begin_others(gates, group, units, born.donors)


def _begin_others(gates: Gates, group: Group, units: Tensor, donors: Tensor | None) -> None:
    """Norms of newborns: those of the donors, else scale 1, shift 0, running mean 0 and variance 1."""
    for member in group.others:
        name = member.parameter
        target = gates.virtual(name).clone()
        if donors is not None:
            member.put(target, units, member.of(target)[donors.to(target.device)])
        elif "Norm" in type(gates.model.get_submodule(member.owner)).__name__:
            start = 1.0 if name.endswith(("weight", "running_var")) else 0.0
            member.put(target, units, torch.full_like(member.of(target)[: len(units)], start))
        else:
            continue  # such as the slopes of a PReLU: they keep what is parked
        gates.write(name, member.mask(target.shape, units), target)


def matched_donors(gates: Gates, group: Group, units: Tensor) -> Tensor:
    """(k,) the incumbent whose rows are nearest by cosine to those of each newborn."""
    rows = functional.normalize(joined(group.incoming, gates.virtual), dim=1)
    likeness = rows[units.to(rows.device)] @ rows.T
    incumbent = gates.active[group.name].clone()
    incumbent[units.cpu()] = False
    if not incumbent.any():
        raise UserError(f"{group.name} has no incumbent to transplant state from; use the state 'zero'")
    return likeness.masked_fill(~incumbent.to(rows.device), -torch.inf).argmax(1).cpu()


@torch.no_grad()
def transplant(gates: Gates, group: Group, units: Tensor, donors: Tensor) -> None:
    """Copies optimizer state from donors to newborns, entry by entry, but for entries that are held.

    The intervention *moment transplant* of Lillo & Cheney, arXiv 2605.15435.
    """
    for member in group.members:
        tensor = gates.tensor(member.parameter)
        if not isinstance(tensor, nn.Parameter):
            continue
        where = member.mask(tensor.shape, units).to(tensor.device) & ~gates.held(member.parameter)
        for key, value in state.entries(gates.optimizer, tensor).items():
            if state.repeats_weight(gates.optimizer, key):
                continue
            target = value.clone()
            member.put(target, units, member.of(value)[donors.to(value.device)])
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
        self.cohorts: list[tuple[str, Tensor, Tensor]] = []  # parameter, flat positions, t at birth
        self._last: dict[str, Tensor] = {}

    def add(self, gates: Gates, group: Group, units: Tensor) -> None:
        """Notes the live entries of newborns."""
        if not isinstance(gates.optimizer, torch.optim.Adam):
            return
        for name, mask in gates.entries(group, units).items():
            tensor = gates.tensor(name)
            held = gates.optimizer.state.get(tensor, {}) if isinstance(tensor, nn.Parameter) else {}
            if "step" in held:
                where = (mask.to(tensor.device) & ~gates.held(name)).reshape(-1).nonzero()[:, 0]
                self.cohorts.append((name, where, torch.as_tensor(held["step"]).clone()))
                self._last[name] = self.cohorts[-1][2]

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
            alive = where[~gates.held(name).reshape(-1)[where]]
            wrong, right = (self._update(held, group, alive, count) for count in (now, now - begun))
            delta = torch.where(moved.to(wrong.device), wrong - right, 0.0) * group["lr"]
            flat = tensor.detach().reshape(-1)[alive]
            _put(tensor, alive, flat + delta.to(flat.dtype))
            if begun.device.type != "cpu" or group["betas"][1] ** float(now - begun) > 1e-4:
                kept.append((name, where, begun))
        self.cohorts = kept
        self._last = seen

    @staticmethod
    def _update(held: dict[str, Tensor], group: dict[str, object], where: Tensor, count: Tensor) -> Tensor:
        first, second = group["betas"]  # type: ignore[misc]
        spread = held["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"].reshape(-1)[where]
        mean = held["exp_avg"].reshape(-1)[where]
        count = count.double().clamp(min=1)  # 0.999**1 is too near to one for float32
        return mean / (1 - first**count) / (spread.sqrt() / (1 - second**count).sqrt() + group["eps"])  # type: ignore[has-type]


def _put(tensor: Tensor, where: Tensor, values: Tensor) -> None:
    if tensor.is_contiguous():
        tensor.detach().view(-1)[where] = values
    else:
        flat = tensor.detach().reshape(-1).clone()
        flat[where] = values
        tensor.copy_(flat.view(tensor.shape))
