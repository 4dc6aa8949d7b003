"""What structural levers do to the runs of a population, and what is measured of their units."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.inner_training.edits import EditConfig
from trimtab.inner_training.feeding import first_examples
from trimtab.inner_training.measurements import PROBE_EVERY
from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.criteria import resolve_criterion
from trimtab.inner_training.structure.growth import resolve_growth
from trimtab.inner_training.structure.normalisations import resolve_normalisation
from trimtab.inner_training.structure.running import without_trace
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.structure.stacked_choice import lowest
from trimtab.inner_training.structure.stacked_diagnostics import DIAGNOSTICS, NEEDS
from trimtab.inner_training.structure.stacked_fields import Gathering

EXAMPLES = 32  # of a batch, for what is measured


class PopulationEdits:
    """Edits of a population's units, of all runs at once, as an ``EditConfig`` says.

    Nothing here waits for the device, and what a run gets depends on nobody else.

    Args:
        population: of runs with units that can be edited.
        config: the settings.

    Attributes:
        structure: the units.
        sizes, minimum: (G,) int64 units of each group, and how many of them stay.

    Raises:
        UserError: no unit of the population can be edited, or a criterion or the growth method cannot be had of it.
    """

    def __init__(self, population: Population, config: EditConfig) -> None:
        self.population, self.config = population, config
        self.structure = Stacked(population)
        self._groups = tuple(self.structure._flat)
        self.sizes = np.array([one.units for one in self._groups], dtype=np.int64)
        self.minimum = np.array([one.group.minimum for one in self._groups], dtype=np.int64)
        self._intervals = np.zeros(population.num_runs, dtype=np.int64)
        self._check()
        if config.start is not None and np.round(config.start * self.sizes).sum() < 1:
            raise UserError(
                f"start is {config.start}, which leaves no unit of {population.family.name!r}; give a larger share"
            )

    def _check(self) -> None:
        config, groups = self.config, tuple(one.group for one in self._groups)
        criterion, scale = resolve_criterion(config.criterion), resolve_normalisation(config.normalisation)
        for why, needs in (
            (f"criterion {config.criterion!r}", criterion.needs | scale.needs),
            (f"criterion {config.reset_criterion!r}", resolve_criterion(config.reset_criterion).needs),
            (f"growth method {config.growth!r}", resolve_growth(config.growth).needs),
        ):
            Gathering(self.population.family, groups, tuple(one.name for one in groups), needs, why).check()

    # --- as runs go -------------------------------------------------------------------------------------------------

    def begin(self, runs: np.ndarray) -> None:
        """Runs (N,) bool have just been reset: they begin with the share of units that is wanted."""
        self._intervals[runs] = 0
        if self.config.start is None or not runs.any():
            return
        structure, chosen = self.structure, torch.as_tensor(runs, device=self.population.device)
        gone = {}
        for one, units, least in zip(self._groups, self.sizes, self.minimum, strict=True):
            active = structure.active[one.name]
            stay = max(int(np.round(self.config.start * units)), int(least))
            gone[one.name] = active & (active.cumsum(1) > stay) & chosen[:, None]
        structure.remove(gone)
        # A rollback to the beginning must not bring the wide network back.
        self.population.settle(runs)

    # --- edits ------------------------------------------------------------------------------------------------------

    def prune(self, shares: np.ndarray) -> None:
        """Removes a share (N,) of the active units of each run, the lowest by the criterion; 0 leaves a run as it is."""
        config, runs = self.config, shares > 0
        nobody = torch.zeros(len(runs), dtype=torch.bool, device=self.population.device)
        scores = self.structure.score(
            config.criterion, normalisation=config.normalisation, batches=config.batches, noted=nobody
        )
        self.structure.prune(shares, scores, scope=config.scope, runs=runs)

    def grow(self, shares: np.ndarray) -> None:
        """Makes a share (N,) of the units of each group of each run active; 0 leaves a run as it is."""
        config = self.config
        self.structure.grow(
            shares,
            config.growth,
            newborn_state=config.newborn_state,
            scale=config.scale,
            runs=shares > 0,
            batches=config.batches,
        )

    def reset(self, shares: np.ndarray) -> None:
        """Begins a share (N,) of the active units of each run anew, the lowest by the reset criterion."""
        config, structure = self.config, self.structure
        nobody = torch.zeros(len(shares), dtype=torch.bool, device=self.population.device)
        scores = structure.score(config.reset_criterion, batches=config.batches, noted=nobody)
        which = lowest(scores, structure._units.active, structure._flat, shares, config.scope)
        structure.reset(structure._flat.by_group(which))

    # --- looking at units -------------------------------------------------------------------------------------------

    def counts(self) -> Tensor:
        """(1 + G, N) float32: share of the network's work that active units do, and active units of each group."""
        active = self.structure._units.active
        groups = [active[:, one.span].sum(1) for one in self._groups]
        work = self._work @ (~self.structure._flat.entries(~active)).float().T
        return torch.stack([work, *(one.float() for one in groups)])

    @cached_property
    def _work(self) -> Tensor:
        """(P,) share of an example's multiplications that each parameter takes part in; of the widest network."""
        population = self.population
        uses = _uses(population.family.module, first_examples(population.family, 1)[0])
        flat = torch.zeros(1, population.layout.width, device=population.device)
        for name, view in population.layout.views(flat).items():
            view.fill_(uses.get(name.rpartition(".")[0], 1.0) if view.ndim > 2 else 0.0)
        return flat[0] / flat.sum()

    def measure(self) -> Tensor | None:
        """(R, N) by ``DIAGNOSTICS`` after an interval, NaN for runs in which nothing was due; None where it was in none."""
        due = self._intervals % PROBE_EVERY == 0
        self._intervals += 1
        if not due.any():
            return None
        structure, device = self.structure, self.population.device
        chosen = torch.as_tensor(due, device=device)
        needs = NEEDS | resolve_criterion(self.config.criterion).needs
        examples = min(EXAMPLES, self.population.family.max_batch)
        evidence = structure.evidence(needs, examples=examples, why="the structure's signals")
        structure.score(self.config.criterion, evidence=evidence, noted=chosen)
        found = structure.diagnostics(evidence)
        return torch.where(chosen, torch.stack([found[name] for name in DIAGNOSTICS]), torch.nan)


def _uses(module: nn.Module, x: Tensor) -> dict[str, float]:
    """By layer, how often it is applied to one example: at places of an image, at tokens; an embedding multiplies nothing."""
    uses: dict[str, float] = {}

    def noting(name: str, outputs: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(layer: nn.Module, given: Any, output: Tensor) -> None:
            del given
            uses[name] = 0.0 if isinstance(layer, nn.Embedding) else uses.get(name, 0.0) + output.numel() / outputs

        return note

    handles = []
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor):
            handles.append(layer.register_forward_hook(noting(name, weight.shape[0])))
    try:
        with without_trace(module), torch.no_grad():
            module(x.to(next(module.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return uses
