"""Two changes of how the runs of a population train: newborns that are fast for a while, and weights that are rewound."""

from __future__ import annotations

import numpy as np
import torch

from trimtab.errors import MismatchError, check_whole, out_of_range
from trimtab.inner_training.stepping import Learner
from trimtab.inner_training.structure.bit_masks import cleared
from trimtab.inner_training.structure.draft import Changed
from trimtab.inner_training.structure.newborn_state import FASTER, WINDOW
from trimtab.inner_training.structure.stacked_choice import check_runs
from trimtab.inner_training.structure.stacked_edit import StackedEdit
from trimtab.inner_training.structure.stacked_moments import StackedMoments


class StackedSpeed(StackedMoments):
    """Two-Speed, and rewinding to initial values (see ``Stacked``)."""

    _window = 0

    def two_speed(self, factor: float | np.ndarray = FASTER, window: int = WINDOW) -> None:
        """Makes the steps of newborns longer for a while: Two-Speed (Lillo & Cheney, arXiv 2605.15435).

        Rows, biases and columns of every unit that was born or renewed go ``factor`` times as far in each of their first
        ``window`` steps as the optimizer would have them; see ``newborn_state.two_speed``. It holds from now on, for newborns
        that are young already too, and for runs that start later; runs of factor 1 stay as they are, bit for bit. The
        first call rebuilds the population's step; populations without it have nothing of it in theirs.

        Args:
            factor: one for all runs or one for each, > 0; 1 is none.
            window: steps after birth, >= 1.

        Raises:
            UserError: a factor or window out of range, or factors of another number of runs.
        """
        check_whole("window", window, 1)
        given = np.asarray(factor, dtype=np.float64)
        if given.shape not in ((), (self._num_runs,)):
            raise MismatchError(
                f"factors have the shape {given.shape}; give one number, or one for each of {self._num_runs} runs"
            )
        if not ((given > 0) & np.isfinite(given)).all():
            wrong = given[~((given > 0) & np.isfinite(given))].flat[0]
            raise out_of_range("factor of newborns' steps", float(wrong), low=0, remedy="above 0; 1 is no difference")
        runs, feed = self.population, self.population._feed
        values = torch.from_numpy(np.broadcast_to(given, (self._num_runs,)).astype(np.float32)).to(runs.device)
        self._window = window
        if feed.speed is None:
            feed.speed = values
            feed.fast_until = torch.zeros(self._num_runs, runs.layout.width, dtype=torch.int64, device=runs.device)
            runs._programs = runs._built(runs._options._replace(hastened=True), runs.block)
        else:
            feed.speed.copy_(values)
        self._hasten()

    def _hasten(self) -> None:
        """Marks the weights of newborns as fast until the end of their window."""
        feed = self.population._feed
        if feed.fast_until is not None:
            units = self._units
            young = self._window - (units.updates[:, None] - units.born)
            left = torch.where(units.active & (units.born >= 0), young.clamp(min=0), 0)
            until = self._flat.largest(left)
            feed.fast_until.copy_(torch.where(until > 0, feed.step[:, None] + until, 0))

    def _open_gates(self) -> None:
        super()._open_gates()
        self._hasten()

    def rewind(self, *, runs: np.ndarray | None = None) -> StackedEdit:
        """Puts weights back to those of the run's beginning, with optimizer state of zero (Frankle & Carbin, arXiv 1803.03635).

        Which units are active stays. All parameters go back, those outside of groups too, but not those of units that the
        instance did not begin with, as these have no initial values.

        Args:
            runs: mask (N,) bool; None for all.
        """
        chosen = check_runs(runs, self._num_runs)
        return self._changed("rewind", lambda number: self._rewound(chosen, number))

    def _rewound(self, chosen: np.ndarray, number: int) -> Changed:
        population, units, learner = self.population, self._units, self.population._learner
        begun = {run: one.parameters for run, one in enumerate(population.instances) if one is not None and chosen[run]}
        first = np.zeros((self._num_runs, population.layout.width), dtype=np.float32)
        first[list(begun)] = population.layout.rows(list(begun.values()))
        which = torch.as_tensor(chosen, device=population.device)
        entries = which[:, None].expand(-1, population.layout.width)
        lacking = ~units.active | ~self._first_active()
        fixed = self._flat.entries(lacking)
        if units.masked.shape[1]:
            fixed = fixed | units.masked
        values = torch.from_numpy(first).to(population.device)
        parameters = torch.where(entries & ~fixed, values, learner.parameters)
        moments = cleared(entries, *learner[1:3])
        after = units._replace(edits=units.edits + which, last=torch.where(which, number, units.last))
        nothing = torch.zeros_like(units.active)
        return Changed(Learner(parameters, moments[0], moments[1], learner.updates), after, entries, nothing)
