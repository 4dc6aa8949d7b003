"""The levers that fire, in a live run (see ``events``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.inner_training.events import pull_of
from trimtab.inner_training.live_snapshot import LiveSnapshots
from trimtab.inner_training.own_step import own_step

Safely = Callable[[str, Callable[[], None]], None]


MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer")
CORRECTED = {"exp_avg_sq", "exp_inf"}  # moments whose first values are corrected by the count of updates


def has_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer keeps moments that it can do without.

    Others keep what is no moment under whatever name: a second sequence of weights, where the weights began, sums of squares
    without which the next step would be far too large.
    """
    if own_step(optimizer) is not None:
        return False
    return any(isinstance(state, dict) and not state.keys().isdisjoint(MOMENTS) for state in optimizer.state.values())


@torch.no_grad()
def forget_moments(optimizer: torch.optim.Optimizer) -> None:
    """Puts the moments in an optimizer's state to zero, in place, and the count of updates where that corrects them.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.Adam([weight])
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> forget_moments(optimizer)
    >>> {name: float(held.sum()) for name, held in optimizer.state[weight].items()}
    {'step': 0.0, 'exp_avg': 0.0, 'exp_avg_sq': 0.0}
    """
    for state in optimizer.state.values():
        if not isinstance(state, dict):
            continue
        for name in state.keys() & set(MOMENTS):
            if isinstance(state[name], Tensor):
                state[name].zero_()
        if state.keys() & CORRECTED:
            _fill(state, "step", 0)
            _fill(state, "mu_product", 1)  # of NAdam, over the updates so far


def _fill(state: dict[str, Any], name: str, value: int) -> None:
    held = state.get(name)
    if isinstance(held, Tensor):
        held.fill_(value)
    elif held is not None:
        state[name] = type(held)(value)


class LiveAnchor:
    """The anchor of one live run; nothing is held before the first one is dropped.

    Attributes:
        spared: gives what must not be pulled on, bool of a parameter's shape or None for nothing; None spares nothing.
    """

    def __init__(self) -> None:
        self.spared: Callable[[Tensor], Tensor | None] | None = None
        self._age, self._pairs = math.inf, list[tuple[Tensor, Tensor]]()

    @torch.no_grad()
    def drop(self, snapshots: LiveSnapshots) -> None:
        """Makes the last stable moment the anchor."""
        self._pairs, self._age = [(live, held.clone()) for live, held in snapshots.confirmed_weights()], 0.0

    def weigh(self) -> None:
        """Takes the anchor away."""
        self._age, self._pairs = math.inf, []

    @torch.no_grad()
    def pull(self) -> None:
        """Pulls the weights, after an interval."""
        if not math.isfinite(self._age):
            return
        share = float(pull_of(np.array([self._age]))[0])
        for live, held in self._pairs:
            spared = None if self.spared is None else self.spared(live)
            live.lerp_(held if spared is None else torch.where(spared, live, held), share)
        self._age += 1


class LiveEvents:
    """What fires in a run under a controller; trouble in it is logged, and the training goes on.

    Args:
        optimizer: of the run.
        snapshots: None where none are kept: then there is no rollback, and nothing to anchor to.
        act: False for an adviser, who does nothing.
        safely: does something that may fail without harm (see ``StepHooks.safely``).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, snapshots: LiveSnapshots | None, act: bool, safely: Safely
    ) -> None:
        self._optimizer, self._snapshots, self._act, self._safely = optimizer, snapshots, act, safely
        self.anchor = LiveAnchor()

    def happen(self, fired: Iterable[str]) -> tuple[str, ...]:
        """Does the events named; gives those that can be done here."""
        snapshots = self._snapshots
        doings: dict[str, Callable[[], object]] = {}
        if has_moments(self._optimizer):
            doings["reset_moments"] = lambda: forget_moments(self._optimizer)
        if snapshots is not None and not snapshots.empty:
            doings |= {"anchor": lambda: self.anchor.drop(snapshots), "rollback": snapshots.restore}
        done = tuple(name for name in fired if self._act and name in doings)
        for name in done:
            self._safely(f"the event {name}", lambda doing=doings[name]: doing())  # type: ignore[misc]
        return done
