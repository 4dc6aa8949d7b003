"""The further measurements of a population (see ``measurements``), on the last step of an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from trimtab.errors import MismatchError, check_whole, unknown
from trimtab.inner_training.activations import EXAMPLES, SEEN, Watch
from trimtab.inner_training.curvature import TRACE_VECTORS, hessian_trace, largest_curvature
from trimtab.inner_training.faults import Faults
from trimtab.inner_training.feeding import Feed, Place, feed_of, place_of
from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.measurements import MEASUREMENTS, PROBE_EVERY, TINY_SHARE
from trimtab.inner_training.stateless import stateless
from trimtab.inner_training.stepping import renewal, run_loss_of, served, stacked_gradients
from trimtab.inner_training.streams import draw_words
from trimtab.inner_training.task import TaskFamily
from trimtab.inner_training.update_rules import Coefficients

HESSIAN: dict[str, tuple[Callable[..., Tensor], int]] = {  # by measurement: its function, and how many random vectors
    "curvature_max": (largest_curvature, 1),
    "curvature_trace": (hessian_trace, TRACE_VECTORS),
}

ALONG = frozenset(("curvature", "overshoot"))  # the measurements along a step
WORTH_ALL = 0.4  # share of due runs from which a compiled gradient of all runs is quicker than theirs alone


class LastStep(NamedTuple):
    """The last step of an interval.

    Attributes:
        before, after: parameters (N, P).
        gradient: (N, P) at ``before``.
        by: its columns (N, C).
        gradient_after: (N, P) at ``after`` on the same batch, where it is known.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor
    by: Tensor
    gradient_after: Tensor | None = None

    def of_runs(self, runs: Tensor) -> LastStep:
        """That of some runs (indices)."""
        before, after, gradient, by = (tensor[runs] for tensor in self[:4])
        return LastStep(before, after, gradient, by, None if self.gradient_after is None else self.gradient_after[runs])


class _Batch(NamedTuple):
    """What the last step was fed: x (N, B, *shape), y (N, B, ...) and weight (N, B), and each run's seed and step (N,)."""

    x: Tensor
    y: Tensor
    weight: Tensor
    seed: Tensor
    step: Tensor

    def few(self) -> _Batch:
        """The first examples only, of a weight that sums to 1."""
        x, y, weight = (tensor[:, :EXAMPLES] for tensor in self[:3])
        return self._replace(x=x, y=y, weight=weight / weight.sum(1, keepdim=True))


def sparsity(gradient: Tensor, parameters: Tensor) -> Tensor:
    """Share (N,) of the elements of gradients (N, P) that are below a tenth of their root mean square.

    Where gradient and parameter are exactly 0 there is none: padding, and weights of units that a gate switched off.

    >>> gradient = torch.tensor([[3.0, 0.1, 0.0, 0.0]])
    >>> float(sparsity(gradient, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))) == float(torch.tensor(2 / 3))
    True
    """
    present = (gradient != 0) | (parameters != 0)
    count = present.sum(1)
    root_mean_square = (gradient.square().sum(1) / count).sqrt()
    tiny = present & (gradient.abs() < TINY_SHARE * root_mean_square[:, None])
    return torch.where(root_mean_square.isfinite(), tiny.sum(1) / count, torch.nan)


def along(step: LastStep, gradient_after: Tensor) -> dict[str, Tensor]:
    """Curvature and overshoot (N,) of a step from the gradients (N, P) before and after it, on the same batch."""
    moved = step.after - step.before
    bend = torch.linalg.vecdot(gradient_after - step.gradient, moved)
    descent = -torch.linalg.vecdot(step.gradient, moved)
    return {
        "curvature": bend / torch.linalg.vecdot(moved, moved),
        "overshoot": torch.where(descent > 0, bend / 2 / descent, torch.nan),
    }


class Probes:
    """Takes the measurements that are asked for, of each run in its first interval and then in every few.

    Args:
        family, layout: of the population.
        num_runs: N.
    """

    def __init__(self, family: TaskFamily, layout: FlatLayout, num_runs: int) -> None:
        self._family, self._layout, self._renewed = family, layout, renewal(family, layout)
        self._names: frozenset[str] = frozenset()
        self._every = PROBE_EVERY
        self._intervals = np.zeros(num_runs, dtype=np.int64)

    def choose(self, names: Sequence[str], every: int) -> None:
        """Takes ``names`` from now on, every so many intervals."""
        for name in names:
            if name not in MEASUREMENTS:
                raise unknown("measurement", name, MEASUREMENTS)
        check_whole("every", every, 1)
        self._names, self._every = frozenset(names), every

    def check(self, parameters: Tensor, feed: Feed, inputs: Tensor, width: int) -> None:
        """Takes each measurement once, of the first run, so that one that its module does not allow is refused now.

        Args:
            parameters: (N, P).
            feed, inputs: of the population.
            width: columns C of a step.

        Raises:
            MismatchError: naming the first measurement that fails; none are taken then.
        """
        names, one = self._names, parameters[:1]
        step = LastStep(one, one, one, one.new_zeros(1, width))
        for name in sorted(names):
            self._names = frozenset((name,))
            try:
                self._measured(step, feed_of(feed, slice(0, 1)), inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                names, reason = frozenset(), str(error).strip().partition("\n")[0]
                raise MismatchError(
                    f"{name} cannot be measured of the module of {self._family.name!r}: {reason}; leave out the signals "
                    "that need it, and the guard's curvature_share where that does"
                ) from error
            finally:
                self._names = names

    def reset(self, runs: Sequence[int]) -> None:
        """Runs that start anew, with a first interval to come."""
        self._intervals[list(runs)] = 0

    def take(self, step: LastStep, feed: Feed, inputs: Tensor, again: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Measurements (N,) or (C, N) by name after an interval, NaN for runs in which none was due.

        Args:
            step: the interval's last.
            feed: as it is after that step.
            inputs: of the family.
            again: gives the gradients of all runs at once at ``step.after``, quicker than they are computed here.
        """
        due = self._intervals % self._every == 0
        self._intervals += 1
        if not self._names or not due.any():
            return {}
        # Parameters that start a phase at zero would be put there once more.
        if self._names & ALONG and due.mean() > WORTH_ALL and not self._family.reset_each_phase:
            step = step._replace(gradient_after=again())
        feed = replace(feed, step=feed.step - 1)
        if due.all():
            return self._measured(step, feed, inputs)
        runs = torch.from_numpy(np.flatnonzero(due)).to(step.by.device)
        found = self._measured(step.of_runs(runs), feed_of(feed, runs), inputs)
        everywhere = {
            name: torch.full((*value.shape[:-1], len(due)), torch.nan, device=value.device)
            for name, value in found.items()
        }
        return {name: whole.index_copy(-1, runs, found[name]) for name, whole in everywhere.items()}

    @torch.no_grad()
    def _measured(self, step: LastStep, feed: Feed, inputs: Tensor) -> dict[str, Tensor]:
        place = place_of(feed)
        step = step._replace(before=self._renewed(step.before, place))
        found: dict[str, Tensor] = {}
        if "grad_sparsity" in self._names:
            found["grad_sparsity"] = sparsity(step.gradient, step.before)
        if self._names & ALONG and step.gradient_after is not None:
            found |= along(step, step.gradient_after)
        unknown_yet = self._names - found.keys()
        if not unknown_yet:
            return found
        batch = self._batch(step, feed, place, inputs, whole=bool(unknown_yet & ALONG))
        if unknown_yet & ALONG:
            found |= along(step, self._gradient_after(step, feed, batch))
        found |= self._activations(step.before, feed, batch.few())
        return found | self._hessian(step.after, feed, batch.few())

    def _batch(self, step: LastStep, feed: Feed, place: Place, inputs: Tensor, *, whole: bool) -> _Batch:
        """What the step was fed, or no more of it than is looked at."""
        width = len(Coefficients._fields)
        faults = Faults(*step.by[:, width:].unbind(1)) if step.by.shape[1] > width else None
        slots = None if whole or faults is not None else min(EXAMPLES, self._family.max_batch)
        return _Batch(*served(self._family, feed, place, inputs, faults, slots), feed.seed, feed.step)

    def _gradient_after(self, step: LastStep, feed: Feed, batch: _Batch) -> Tensor:
        gradients = stacked_gradients(self._family)
        by_name, _ = gradients(self._layout.views(step.after), feed.buffers, batch.x, batch.y, batch.weight)
        return self._layout.flatten(by_name)

    def _activations(self, parameters: Tensor, feed: Feed, batch: _Batch) -> dict[str, Tensor]:
        names, call = self._names & SEEN, stateless(self._family.module)
        if not names:
            return {}

        def seen(parameters: Any, buffers: Any, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
            with Watch(names, len(x), weight) as watch:
                call(parameters, buffers, x)
            return watch.results()

        found = vmap(seen)(self._layout.views(parameters), feed.buffers, batch.x, batch.weight)
        return {name: value if value.ndim == 1 else value.mT for name, value in found.items()}

    def _hessian(self, parameters: Tensor, feed: Feed, batch: _Batch) -> dict[str, Tensor]:
        views, run_loss = self._layout.views(parameters), run_loss_of(self._family)
        found: dict[str, Tensor] = {}
        for name, (function, vectors) in HESSIAN.items():
            if name in self._names:

                def of_run(function: Any, at: Any, signs: Any, buffers: Any, *data: Tensor) -> Any:
                    return function(lambda where: run_loss(where, buffers, *data)[0], at, signs)

                signs = self._signs(batch, vectors)
                found[name] = vmap(partial(of_run, function))(
                    views, signs, feed.buffers, batch.x, batch.y, batch.weight
                )
        return found

    def _signs(self, batch: _Batch, count: int) -> dict[str, Tensor]:
        """Random signs by name (N, count, *shape), which follow from each run's seed and step."""
        runs, width = len(batch.seed), self._layout.width
        word = draw_words((batch.seed + 0x2545F491) & 0x7FFFFFFF, batch.step) & 0x7FFFFFFF
        counter = torch.arange(count * width, device=word.device)[None]
        signs = ((draw_words(word[:, None], counter) >> 16) & 1).float() * 2 - 1
        by_name = self._layout.views(signs.view(runs * count, width))
        return {name: part.reshape(runs, count, *part.shape[1:]) for name, part in by_name.items()}
