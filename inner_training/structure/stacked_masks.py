"""Masks of single weights in a population, for dynamic sparse training: made, and paid for, when somebody sets one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import MismatchError, unknown
from trimtab.inner_training.stepping import Learner
from trimtab.inner_training.structure.bit_masks import cleared
from trimtab.inner_training.structure.draft import Changed
from trimtab.inner_training.structure.stacked_choice import check_runs
from trimtab.inner_training.structure.stacked_edit import StackedEdit
from trimtab.inner_training.structure.stacked_speed import StackedSpeed


class StackedMasks(StackedSpeed):
    """Weights that live and weights that are held at zero (see ``Stacked``)."""

    def mask(self, live: Mapping[str, Tensor], *, runs: np.ndarray | None = None) -> StackedEdit:
        """Sets which weights live. The others are held at zero, with gradients and optimizer state of zero.

        Weights that come to life begin at zero, with optimizer state of zero (Evci et al., *RigL*, arXiv 1911.11134). The
        first mask of a population rebuilds its step, which multiplies gradients and weights by the masks from then on.

        Args:
            live: bool (N, *shape) by name of a parameter; they replace its earlier masks.
            runs: mask (N,) bool of the runs that they are for; None for all.

        Raises:
            UserError: an unknown parameter, or a mask that does not fit.
        """
        wanted_runs = torch.as_tensor(check_runs(runs, self._num_runs), device=self.population.device)
        shapes, layout = self.population.layout.shapes, self.population.layout
        for name, given in live.items():
            if name not in shapes:
                raise unknown("parameter", name, shapes)
            wanted = (self._num_runs, *shapes[name])
            if given.dtype != torch.bool or tuple(given.shape) != wanted:
                raise MismatchError(
                    f"the mask of {name} is {given.dtype} of shape {tuple(given.shape)}; give bool of {wanted}"
                )
        self._allow_masks()
        masked = self._units.masked.clone()
        views = layout.views(masked)
        for name, given in live.items():
            chosen = wanted_runs.view(-1, *[1] * (given.ndim - 1))
            views[name].copy_(torch.where(chosen, ~given, views[name]))
        return self._changed("mask", lambda number: self._with_masks(masked, number))

    def _with_masks(self, masked: Tensor, number: int) -> Changed:
        units, learner = self._units, self.population._learner
        entries = masked ^ units.masked
        runs = entries.any(1)
        parameters, first, second = cleared(entries, *learner[:3])
        after = units._replace(masked=masked, edits=units.edits + runs, last=torch.where(runs, number, units.last))
        nothing = torch.zeros_like(units.active)
        return Changed(Learner(parameters, first, second, learner.updates), after, entries, nothing)

    @property
    def masks(self) -> dict[str, Tensor]:
        """(N, *shape) bool by parameter, which weights live; all of them where no mask was ever set."""
        masked, layout = self._units.masked, self.population.layout
        if not masked.shape[1]:
            masked = torch.zeros(self._num_runs, layout.width, dtype=torch.bool, device=self.population.device)
        return {name: ~view for name, view in layout.views(masked).items()}

    def _allow_masks(self) -> None:
        if self._masks:
            return
        runs = self.population
        self._masks = True
        nothing = torch.zeros(self._num_runs, runs.layout.width, dtype=torch.bool, device=runs.device)
        self._units = self._units._replace(masked=nothing)
        self._ring.change(lambda moment: moment._replace(masked=nothing))
        runs._feed.live = (~nothing).float()
        runs._programs = runs._built(runs._options._replace(masked=True), runs.block)

    def steered(self) -> None:
        """Makes room for what changes gradients (``Feed.factor`` and ``Feed.term``); it rebuilds the step, once."""
        runs = self.population
        if runs._feed.factor is None:
            runs._feed.factor = torch.ones(self._num_runs, runs.layout.width, device=runs.device)
            runs._feed.term = torch.zeros_like(runs._feed.factor)
            runs._programs = runs._built(runs._options._replace(steered=True), runs.block)
