"""Which units of one group are due to begin anew, for any number of runs at once: the decision, apart from the act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import MismatchError
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.maintenance import MAINTENANCE, checked_settings, resolve_maintenance
from trimtab.inner_training.structure.unit_rules import Memory, UnitRule


class Resetter:
    """The memory of one rule about the units of one group.

    Call ``observe`` once for each optimizer step, reset the units that are ``due`` by whatever means, then ``renew``. What
    is due stays due until it is renewed or no longer is by the next observation.

    Attributes:
        method: its entry in the table.
        memory: plain tensors by name: ``steps`` (...), ``age``, ``alive`` and ``due`` (..., U), and the rule's own.

    >>> resetter = Resetter("redo", (3,), every=1, window=1)
    >>> resetter.observe(Evidence(mean_abs=torch.tensor([1.0, 0.02, 1.0])))
    >>> resetter.due
    tensor([False,  True, False])
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        *,
        positions: int = 1,
        seeds: int | Tensor = 0,
        device: torch.device | str = "cpu",
        settings: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Begins with units that are all new.

        Args:
            name: of a method of the table that acts on units.
            shape: (..., U): the runs, none for a plain module, and the units.
            positions: K, how many weights along the columns' axes read each unit: 1 for a layer that reads another one, more
                behind a flattening, for the halves of CReLU, or with several readers. Only ``continual-backprop`` asks.
            seeds: of ``random-reset``, in [0, 2**31): one for all, or (...) int64 for each run.
            device: where the memory lies.
            settings, more: the method's settings by name: numbers, or tensors (...) with one for each run.

        Raises:
            UserError: a name is unknown, or a setting is out of its range.
        """
        self.method = resolve_maintenance(name, "units")
        rule = self.method.rule
        assert isinstance(rule, UnitRule)
        self._rule, self._shape, self._positions = rule, tuple(shape), positions
        exact = checked_settings(self.method, {**(settings or {}), **more})
        runs = self._shape[:-1]
        for key, value in exact.items():
            if value.ndim and tuple(value.shape) != runs:
                raise MismatchError(f"{key} has the shape {tuple(value.shape)}; give one number, or the shape {runs}")
        self._settings = rule.prepare(exact, torch.device(device))
        seed = torch.as_tensor(seeds, dtype=torch.int64).to(device).expand(runs).clone()
        self.memory: Memory = {"seed": seed, **self._new()}

    def _new(self) -> Memory:
        device = next(iter(self._settings.values())).device
        whole, flags = (
            torch.zeros(self._shape, dtype=torch.int64, device=device),
            torch.zeros(self._shape, device=device),
        )
        start = {"steps": whole[..., 0].clone(), "age": whole, "alive": flags.bool(), "due": flags.bool()}
        return {**start, **self._rule.begin(self._shape, self._positions, self._settings)}

    @property
    def due(self) -> Tensor:
        """(..., U) bool: which units are to begin anew now."""
        return self.memory["due"]

    @property
    def looks(self) -> bool:
        """Whether the next ``observe`` reads more than which units are alive."""
        return self._rule.looks(self.memory["steps"], self._settings)

    @property
    def means(self) -> Tensor | None:
        """(..., U, K) what each unit has given on average, to be made up for in the biases; None where it is not known."""
        return self._rule.means(self.memory, self._settings)

    def observe(self, evidence: Evidence, outputs: Sequence[Tensor] = ()) -> None:
        """Takes in one step.

        Args:
            evidence: of the units at this step, with ``alive`` (None for all) and the fields that the method ``needs``. Units
                that were not alive before are new.
            outputs: where the method sees outputs: what is read of the units, (..., P, U, k) for each reader. P are examples
                and places that the same weights read; the k of all readers add up to K.

        Raises:
            MismatchError: something that is needed is missing, or has another shape.
        """
        if tuple(evidence.shape) != self._shape:
            raise MismatchError(f"the evidence is of units {tuple(evidence.shape)}; these are {self._shape}")
        if self._rule.sees_outputs:
            self._check_outputs(outputs)
        live = evidence.live
        self.memory = self._renewed(live & ~self.memory["alive"])
        age = torch.where(live, self.memory["age"] + 1, 0)
        now = {**self.memory, "alive": live.clone(), "age": age, "steps": self.memory["steps"] + 1}
        with torch.no_grad():
            self.memory = {**now, **self._rule.judge(now, evidence, outputs, self._settings)}

    def _check_outputs(self, outputs: Sequence[Tensor]) -> None:
        shapes = [tuple(one.shape) for one in outputs]
        fit = all((*shape[:-3], shape[-2]) == self._shape if len(shape) > 2 else False for shape in shapes)
        if not shapes or not fit:
            raise MismatchError(
                f"{self.method.name} reads outputs (..., P, U, k) of units {self._shape}, and was given {shapes}"
            )
        if "mean" in self.memory and sum(shape[-1] for shape in shapes) != self._positions:
            raise MismatchError(
                f"the outputs have {sum(shape[-1] for shape in shapes)} positions of each unit; there are {self._positions}"
            )

    def renew(self, units: Tensor | None = None) -> None:
        """Units begin anew: those that are due, or (..., U) bool, whoever reset them."""
        self.memory = self._renewed(self.due if units is None else units.to(self.due.device))

    def _renewed(self, units: Tensor) -> Memory:
        changed = self._rule.forget(self.memory, units, self._settings)
        kept = {"age": torch.where(units, 0, self.memory["age"]), "due": self.due & ~units}
        return {**self.memory, **changed, **kept}

    def restart(self, runs: Tensor) -> None:
        """Runs (...) bool begin anew, all their units too; their seeds stay."""
        for name, fresh in self._new().items():
            old = self.memory[name]
            where = runs.to(old.device).view(*runs.shape, *[1] * (old.ndim - runs.ndim))
            self.memory[name] = torch.where(where, fresh, old)

    def state_dict(self) -> dict[str, Tensor]:
        """The memory, copied."""
        return {name: value.clone() for name, value in self.memory.items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Goes on from a saved memory.

        Raises:
            MismatchError: it is of another rule or of other units.
        """
        given = {name: tuple(value.shape) for name, value in saved.items()}
        own = {name: tuple(value.shape) for name, value in self.memory.items()}
        if given != own:
            raise MismatchError(f"the state is of a memory with {given}; {self.method.name} has {own} here")
        self.memory = {name: value.to(self.memory[name], copy=True) for name, value in saved.items()}


def unit_methods() -> list[str]:
    """Names of the methods that act on units."""
    return [name for name, method in MAINTENANCE.items() if method.acts_on == "units"]
