"""Sparse training of a user's own model, beside its training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import MismatchError, UserError, check_whole
from trimtab.inner_training.module_parts import check_loss
from trimtab.inner_training.structure import state
from trimtab.inner_training.structure.coupling import all_trainable
from trimtab.inner_training.structure.densities import resolve_distribution
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.running import without_trace
from trimtab.inner_training.structure.second_order import Loss
from trimtab.inner_training.structure.sparse_methods import (
    Layers,
    Masks,
    Plan,
    Timetable,
    first_masks,
    sparse_layers,
    updated_masks,
)
from trimtab.inner_training.structure.structure import Structure


class SparseKeeper:
    """Keeps a model sparse: its first masks are set when it is made, and ``step`` changes them when it is time.

    Masked weights are held at zero under every optimizer, as weights of inactive units are (see ``Structure``); the keeper's
    masks count as training and are not undone.

    Attributes:
        layers: names of the parameters.
        steps: optimizer steps that it has taken in.

    Args:
        structure: of the model, from ``trimtab.gates``. Weights of inactive units do not count.
        method: name from the table of sparse training.
        total_steps: of the training, for its schedule.
        distribution: name from the table of distributions: how the density is shared out among layers.
        layers: names of parameters; None for the weights of linear layers and convolutions that the optimizer trains.
        masks: bool of the parameter's shape by layer, which weights live first; None draws them.
        seed: of random masks, in [0, 2**31).
        settings: of the method, by name, instead of their defaults.

    Raises:
        UserError: a name is unknown, a setting or mask does not fit, or the method cannot be had in several processes.

    >>> from torch import nn
    >>> from trimtab.inner_training.structure.entry import gates
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> structure = gates(model, optimizer, torch.zeros(1, 4))
    >>> keeper = SparseKeeper(structure, "rigl", total_steps=40, density=0.5, every=10)
    >>> for _ in range(40):
    ...     model(torch.randn(16, 4)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     changed = keeper.step()
    >>> {name: int(live.sum()) for name, live in structure.masks.items()}
    {'0.weight': 13, '2.weight': 11}
    """

    def __init__(
        self,
        structure: Structure,
        method: str = "rigl",
        *,
        total_steps: int,
        distribution: str = "erk",
        layers: Iterable[str] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if not isinstance(structure, Structure):
            raise UserError(
                f"sparse training needs a Structure and was given a {type(structure).__name__}; make it by trimtab.gates"
            )
        check_whole("total_steps", total_steps, 1)
        check_whole("seed", seed, 0, most=2**31 - 1)
        self._table = Timetable([method], settings)
        resolve_distribution(distribution)
        held = structure.editor.gates
        own = dict(held.model.named_parameters())
        trained = {id(one) for one in state.owned(held.optimizer)}
        self.layers = sparse_layers(held.model, [name for name in own if id(own[name]) in trained], layers)
        self._check_processes(method)
        self._structure, self._distribution, self._total = structure, distribution, total_steps
        self._shapes = {name: own[name].shape for name in self.layers}
        self._draws = torch.Generator().manual_seed(seed)
        self.steps = 0
        self._set(self._first() if masks is None else self._fitting(masks))
        self._look_ahead()

    def _check_processes(self, method: str) -> None:
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self._table.methods[0].grows == "gradient" and spread and torch.distributed.get_world_size() > 1:
            raise UserError(
                f"{method} would choose other weights in each of several processes, as each sees data of its own; take set, "
                "static or prune-magnitude"
            )

    def _fitting(self, masks: Mapping[str, Tensor]) -> Masks:
        if set(masks) != set(self.layers):
            raise MismatchError(f"the masks are of {', '.join(sorted(masks))}; give those of {', '.join(self.layers)}")
        return dict(masks)

    def _first(self) -> Masks:
        layers, density = self._state()[0], torch.from_numpy(self._table.begin_density.astype(np.float32))
        first = next(iter(layers.weights.values()))
        drawn = first_masks(layers.exists, density.to(first.device), self._distribution, self._drawing(first))
        dense = bool(self._table.begin_density[0] >= 1)
        return {name: (one | ~layers.exists[name] if dense else one)[0] for name, one in drawn.items()}

    def _drawing(self, like: Tensor) -> Draws:
        return Draws(self._draws, (1,), like.device)

    def _state(self) -> tuple[Layers, Masks]:
        """What there is, as a population of one run, and the masks as they are set."""
        held, live, exists, weights, masks = self._structure.editor.gates, {}, {}, {}, {}
        for name in self.layers:
            tensor = held.tensor(name).detach()
            if tensor.shape != self._shapes[name]:
                raise UserError(f"{name} has another shape than it had, since a compaction; make a new keeper")
            exists[name], weights[name] = ~held.by_units(name)[None], tensor[None]
            masks[name] = held.live[name].to(tensor.device) if name in held.live else torch.ones_like(exists[name][0])
            live[name] = masks[name][None] & exists[name]
        return Layers(live, exists, weights), masks

    def _set(self, masks: Masks) -> None:
        editor = self._structure.editor
        editor.settle(editor.mask(masks))

    def _plan(self, step: int) -> Plan | None:
        return self._table.plan(np.array([step - 1]), np.array([step]), np.array([self._total]))

    def _look_ahead(self) -> None:
        """Has the gradients of the next step noted if it needs them."""
        plan = self._plan(self.steps + 1)
        self._structure.editor.gates.noted = {} if plan is not None and plan.share[plan.gradient].any() else None

    @torch.no_grad()
    def step(self, batch: Any = None, loss_fn: Loss | None = None) -> bool:
        """Takes in one optimizer step, and changes which weights live if it is time; to be called after each step.

        Gradients of all weights, masked or not, are those that the step's own backward passes had, or those on a batch.

        Args:
            batch: to take the gradients from, in evaluation mode; None for those of the step.
            loss_fn: with a batch: ``loss_fn(model, batch)`` gives its mean loss, a scalar.

        Returns:
            Whether it was time.

        Raises:
            UserError: no gradient was seen, or the structure has been compacted.
        """
        self.steps += 1
        plan = self._plan(self.steps)
        if plan is not None:
            layers, masks = self._state()
            first = next(iter(layers.weights.values()))
            slopes = self._slopes(layers, batch, loss_fn) if plan.share[plan.gradient].any() else None
            found = updated_masks(layers, plan, slopes, self._distribution, self._drawing(first), self._outputs())
            self._set({name: torch.where(layers.exists[name], one, masks[name])[0] for name, one in found.items()})
        self._look_ahead()
        return plan is not None

    def _slopes(self, layers: Layers, batch: Any, loss_fn: Loss | None) -> Masks:
        noted = self._structure.editor.gates.noted or {}
        if batch is not None and loss_fn is not None:
            noted = self._measured(batch, loss_fn)
        found = {}
        for name, weights in layers.weights.items():
            if name not in noted and not bool(layers.live[name].all()):
                raise UserError(
                    f"no gradient of {name} was seen in this step; call step after each backward pass and optimizer step, or "
                    "give it a batch and loss_fn"
                )
            found[name] = noted[name][None].to(weights) if name in noted else torch.zeros_like(weights)
        return found

    def _measured(self, batch: Any, loss_fn: Loss) -> Masks:
        held = self._structure.editor.gates
        with without_trace(held.model), held.opened(()), all_trainable(held.model), torch.enable_grad():
            loss = check_loss(loss_fn(held.model, batch), type(held.model).__name__)
            wanted: list[Tensor] = [held.tensor(name) for name in self.layers]
            slopes = torch.autograd.grad(loss, wanted, allow_unused=True)
        return {name: slope for name, slope in zip(self.layers, slopes, strict=True) if slope is not None}

    def _outputs(self) -> frozenset[str]:
        groups = self._structure.editor.gates.groups.values()
        rows = (member for group in groups for member in group.of_role("row") if member.axis == 0)
        return frozenset(member.parameter for member in rows) & frozenset(self.layers)

    def close(self) -> None:
        """Ends the changes; masks stay as they are."""
        self._structure.editor.gates.noted = None

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers. Save it beside those of the model, the optimizer and the structure."""
        return {"method": self._table.methods[0].name, "steps": self.steps, "draws": self._draws.get_state()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a saved state, after the structure has loaded its own, which holds the masks.

        Raises:
            MismatchError: it is of another method.
        """
        own = self._table.methods[0].name
        if saved["method"] != own:
            raise MismatchError(f"the state is of {saved['method']}; this keeper does {own}")
        self.steps = int(saved["steps"])
        self._draws.set_state(saved["draws"])
        self._look_ahead()
