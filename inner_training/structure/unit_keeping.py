"""Keepers that reset units of a user's own model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.structure.births import check_newborn_state
from trimtab.inner_training.structure.collect import Request, gather, made, weights_of
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.gating import Gates
from trimtab.inner_training.structure.groups import Group
from trimtab.inner_training.structure.maintenance import Method
from trimtab.inner_training.structure.newborn_state import NewbornState, resolve_newborn_state
from trimtab.inner_training.structure.resets import compensated
from trimtab.inner_training.structure.resetter import Resetter
from trimtab.inner_training.structure.second_order import Loss
from trimtab.inner_training.structure.sight import Sight, looked_at, mean_abs, passed_on
from trimtab.inner_training.structure.structure import Structure
from trimtab.inner_training.structure.watching import watchable


class UnitKeeper:
    """Resets units of a model when a method says that they are due.

    Attributes:
        method: its entry in the table.
        resets: how many units have been reset so far, by group.
    """

    def __init__(self, structure: Structure, method: Method, groups: list[str], options: Mapping[str, Any]) -> None:
        """Use ``keeping.maintain``."""
        self.method, self._structure = method, structure
        held = structure.editor.gates
        self._groups = {name: held.groups[name] for name in groups}
        seeds, self._mode = int(options["seed"]), _mode(options["newborn_state"], held.optimizer)
        self._draws = torch.Generator().manual_seed(seeds)
        self._compensates = method.compensates if options["compensate"] is None else bool(options["compensate"])
        self._resetters = {}
        for place, (name, group) in enumerate(self._groups.items()):
            positions = sum(column.each for column in group.of_role("column"))
            device = held.tensor(group.of_role("row")[0].parameter).device
            self._resetters[name] = Resetter(
                method.name, (group.units,), positions=positions, seeds=(seeds + place) % 2**31, device=device,
                settings=options["settings"],
            )  # fmt: skip
        self._check(held)
        self.resets = dict.fromkeys(self._groups, 0)
        self._born = {name: held.born[name].clone() for name in self._groups}
        self._seen: Sight | None = None

    def _check(self, held: Gates) -> None:
        if self.method.sees_outputs or self.method.needs:
            blind = [name for name, group in self._groups.items() if not watchable(held.model, group)]
            if blind:
                raise UserError(
                    f"{self.method.name} reads activations, which cannot be seen in {blind[0]}; choose other groups"
                )
            spread = torch.distributed.is_available() and torch.distributed.is_initialized()
            if spread and torch.distributed.get_world_size() > 1:
                raise UserError(
                    f"{self.method.name} would reset other units in each of several processes, as each sees data of its own; "
                    "take random-reset or a method that acts on weights"
                )
        if self._compensates:
            if not self.method.compensates:
                raise UserError(f"{self.method.name} does not know what units give on average; leave compensate out")
            nobody = torch.zeros(0, dtype=torch.int64)
            for name, group in self._groups.items():
                found = weights_of(held, group)
                none = Evidence(weights_out=found["weights_out"], mean=torch.zeros_like(found["weights_out"][:, 0]))
                try:
                    compensated(held, {name: (group, nobody, none)})
                except UserError as error:
                    raise UserError(f"{error}; give compensate=False, or other groups") from error

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Inside, what the method needs of forward and backward passes is noted, without a pass of its own.

        Run the forward and backward passes of one optimizer step inside, and no others. Modules under ``torch.compile`` do
        not see hooks that come and go; give batches to ``step`` for them.
        """
        if not self._looks:
            yield
            return
        if self._seen is None:
            self._seen = self._sight()
        with self._seen.open():
            yield

    @property
    def _looks(self) -> bool:
        return any(resetter.looks for resetter in self._resetters.values())

    def _sight(self) -> Sight:
        gradients = "pre_grad" in self.method.needs
        outputs = self.method.sees_outputs or "mean_abs" in self.method.needs
        model = self._structure.editor.gates.model
        return Sight(model, list(self._groups.values()), outputs=outputs, gradients=gradients)

    def step(self, batch: Any = None, loss_fn: Loss | None = None) -> dict[str, Tensor]:
        """Takes in one optimizer step, and resets the units that are due; to be called after each step.

        Args:
            batch, loss_fn: a batch to look at, with the loss as in ``Structure.score``, which costs a forward pass more (and for
                ``grama`` a backward pass); the model is left as it was. None where ``watch`` has seen the step.

        Returns:
            Numbers of the units that were reset, by group; empty where there was none.

        Raises:
            UserError: the method needs to see something and has not, or the structure has been compacted.
        """
        held = self._structure.editor.gates
        changed = [name for name in self._groups if held.groups.get(name) is not self._groups[name]]
        if changed:
            raise UserError(f"{changed[0]} is no longer what it was, since a compaction; make a new keeper")
        evidence = self._evidence(batch, loss_fn)
        due = {}
        for name, resetter in self._resetters.items():
            own, outputs = evidence[name]
            resetter.renew((held.born[name] != self._born[name]).to(resetter.due.device))
            resetter.observe(own, outputs)
            units = resetter.due.cpu().nonzero()[:, 0]
            if len(units):
                due[name] = units
        if due:
            means = {name: self._lost(held, name) for name in due} if self._compensates else {}
            edit = self._structure.editor.reset(due, self._mode, self._draws, means)
            self._structure.editor.settle(edit)
        for name, units in due.items():
            self._resetters[name].renew()
            self.resets[name] += len(units)
        self._born = {name: held.born[name].clone() for name in self._groups}
        return due

    def _evidence(self, batch: Any, loss_fn: Loss | None) -> dict[str, tuple[Evidence, tuple[Tensor, ...]]]:
        """What the method reads of each group, and outputs."""
        held = self._structure.editor.gates
        seen, self._seen = self._seen, None
        slopes: dict[str, Evidence] = {}
        if batch is not None and self._looks:
            seen = self._sight()
            if loss_fn is None:
                raise UserError("give loss_fn beside the batch: loss_fn(model, batch) is the mean loss of the batch")
            if "pre_grad" in self.method.needs:
                request = Request(needs=frozenset(("pre_grad",)), names=tuple(self._groups), example=None,
                                  why=self.method.name, draws=torch.Generator())  # fmt: skip
                slopes = gather(held, request, [batch], loss_fn)
            else:
                looked_at(held.model, batch, loss_fn, seen)
        return {name: self._of_group(group, seen, slopes.get(name)) for name, group in self._groups.items()}

    def _of_group(
        self, group: Group, seen: Sight | None, slopes: Evidence | None
    ) -> tuple[Evidence, tuple[Tensor, ...]]:
        held, needs = self._structure.editor.gates, self.method.needs
        resetter = self._resetters[group.name]
        fields = {"alive": held.active[group.name].to(resetter.due.device)}
        if not resetter.looks:
            return made(fields), ()
        outputs = () if seen is None else seen.outputs(group)
        slope = None if seen is None else seen.gradient(group)
        if slopes is not None:
            slope = slopes.read("pre_grad")
        if ("pre_grad" in needs and slope is None) or ("pre_grad" not in needs and not outputs):
            raise UserError(
                f"{self.method.name} has seen nothing of {group.name} since the last step; run the passes inside "
                "`with keeper.watch():`, or give step a batch and loss_fn"
            )
        if "pre_grad" in needs and slope is not None:
            fields["pre_grad"] = slope
        if "mean_abs" in needs:
            fields["mean_abs"] = mean_abs(outputs)
        if "weights_in" in needs:
            fields |= {key: value for key, value in weights_of(held, group).items() if key in needs}
        return made(fields), outputs

    def _lost(self, held: Gates, name: str) -> Evidence:
        means = self._resetters[name].means
        assert means is not None
        return passed_on(held, self._groups[name], means)

    def close(self) -> None:
        """Ends the maintenance; there is nothing on the model to be taken away."""
        self._seen = None

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers. Save it beside those of the model, the optimizer and the structure."""
        return {
            "method": self.method.name,
            "resetters": {name: resetter.state_dict() for name, resetter in self._resetters.items()},
            "born": {name: steps.clone() for name, steps in self._born.items()},
            "resets": dict(self.resets),
            "draws": self._draws.get_state(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a saved state, after the model, the optimizer and the structure have loaded theirs.

        Raises:
            MismatchError: it is of another method or of other groups.
        """
        given = (saved["method"], *saved.get("resetters", ()))
        if given != (self.method.name, *self._resetters):
            raise MismatchError(
                f"the state is of {', '.join(given)}; this keeper does {', '.join((self.method.name, *self._groups))}"
            )
        for name, resetter in self._resetters.items():
            resetter.load_state_dict(saved["resetters"][name])
        self._born = {name: steps.clone() for name, steps in saved["born"].items()}
        self.resets = dict(saved["resets"])
        self._draws.set_state(saved["draws"])


def _mode(name: str | None, optimizer: torch.optim.Optimizer) -> NewbornState:
    """The state of that name; for None, ``fresh-step`` where the optimizer is known to correct by steps, else ``zero``."""
    if name is None:
        name = "fresh-step" if isinstance(optimizer, torch.optim.Adam) else "zero"
    mode = resolve_newborn_state(name)
    check_newborn_state(mode, optimizer)
    return mode
