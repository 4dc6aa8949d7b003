"""Keepers that hold the weights of a user's own model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.structure import state
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.maintenance import Method, checked_settings
from trimtab.inner_training.structure.structure import Structure
from trimtab.inner_training.structure.weight_rules import WeightRule, initial_bounds


class WeightKeeper:
    """Changes gradients just before each step of the optimizer, and weights after it.

    It sees to the weights and biases of layers that the optimizer trains; norms, embeddings and whatever is held at zero are
    left alone.

    Attributes:
        method: its entry in the table.
        steps: how many steps it has taken in.
    """

    def __init__(self, structure: Structure, method: Method, seed: int, settings: Mapping[str, Any]) -> None:
        """Use ``keeping.maintain``."""
        self.method, self.steps, self._structure = method, 0, structure
        assert isinstance(method.rule, WeightRule)
        self._rule = method.rule
        exact = checked_settings(method, settings)
        for name, value in exact.items():
            if value.ndim:
                raise UserError(f"{name} of {method.name} has the shape {tuple(value.shape)}; give one number")
        self._settings = {name: float(value) for name, value in exact.items()}
        self._draws = torch.Generator().manual_seed(seed)
        held = structure.editor.gates
        trained = {id(one) for one in state.owned(held.optimizer)}
        own = dict(held.model.named_parameters())
        self._bounds = {name: bound for name, bound in initial_bounds(held.model).items() if id(own[name]) in trained}
        if not self._bounds:
            raise UserError(
                "the optimizer trains no weight of a linear layer or a convolution; there is none to maintain"
            )
        self._shapes = {name: own[name].shape for name in self._bounds}
        self._memory = self._rule.begin(self._tensors())
        self._hook = held.optimizer.register_step_pre_hook(self._steer) if self._rule.steers else None

    def _tensors(self) -> dict[str, Tensor]:
        held = self._structure.editor.gates
        found = {name: held.tensor(name).detach() for name in self._bounds}
        for name, one in found.items():
            if one.shape != self._shapes[name]:
                raise UserError(f"{name} has another shape than it had, since a compaction; make a new keeper")
        return found

    def _drawing(self) -> Draws:
        return Draws(self._draws, (), next(iter(self._tensors().values())).device)

    @torch.no_grad()
    def _steer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held, values = self._structure.editor.gates, self._tensors()
        slopes = {name: held.tensor(name).grad for name in values}
        # A fused optimizer divides gradients by the scale of a loss scaler itself.
        scale = getattr(optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else scale
        given = {name: slope / scale for name, slope in slopes.items() if slope is not None}
        if not given:
            return
        values = {name: values[name] for name in given}
        kept = {name: self._memory[name].to(values[name]) for name in given if name in self._memory}
        found, memory = self._rule.steered(given, values, kept, self._settings, self._drawing())
        self._memory = {**self._memory, **memory}
        for name, slope in found.items():
            target = slopes[name]
            assert target is not None
            target.copy_((slope * scale).masked_fill(held.held(name), 0))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Nothing: methods that act on weights do not look at activations. It is there so that loops can be the same."""
        yield

    @torch.no_grad()
    def step(self, batch: Any = None, loss_fn: Any = None) -> dict[str, Tensor]:
        """Takes in one optimizer step, and changes the weights if it is time; to be called after each step.

        Args:
            batch, loss_fn: not looked at.

        Returns:
            An empty dict: no unit is reset.

        Raises:
            UserError: the structure has been compacted.
        """
        del batch, loss_fn
        self.steps += 1
        if not self._rule.moves or self.steps % int(self._settings["every"]):
            return {}
        held, values = self._structure.editor.gates, self._tensors()
        moved = self._rule.moved(values, self._bounds, self._memory, self._settings, self._drawing())
        for name, value in moved.items():
            held.tensor(name).copy_(value.masked_fill(held.held(name), 0))
        return {}

    def close(self) -> None:
        """Ends the maintenance: gradients are left alone from now on."""
        if self._hook is not None:
            self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers. Save it beside those of the model, the optimizer and the structure."""
        memory = {name: value.clone() for name, value in self._memory.items()}
        return {
            "method": self.method.name,
            "steps": self.steps,
            "memory": memory,
            "draws": self._draws.get_state(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            MismatchError: it is of another method, or of tensors of other shapes.
        """
        own = {name: tuple(value.shape) for name, value in self._memory.items()}
        given = {name: tuple(value.shape) for name, value in saved["memory"].items()}
        if saved["method"] != self.method.name or own != given:
            raise MismatchError(
                f"the state is of {saved['method']} with the tensors {given}; this keeper does {self.method.name} with {own}"
            )
        self.steps = int(saved["steps"])
        self._memory = {name: value.to(self._memory[name], copy=True) for name, value in saved["memory"].items()}
        self._draws.set_state(saved["draws"])
