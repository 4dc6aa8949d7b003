"""Levers that fire: things done once to a run, rather than moved. One table, and what they do to a population."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import unknown
from trimtab.inner_training.stepping import Learner

FIRES_FROM = 0.5  # of an action
REST = 10  # decisions between two firings of one event in one run
PULL, HALF_LIFE = 0.05, 20.0  # share of the way to the anchor per interval at first, and intervals until it is half


@dataclass(frozen=True, kw_only=True)
class Event:
    """One lever of the kind ``events``.

    Attributes:
        name: lower-case words with underscores.
        doc: one line for tables.
        source: where the idea comes from; empty for ours.
    """

    name: str
    doc: str
    source: str = ""


EVENTS: dict[str, Event] = {
    one.name: one
    for one in (
        Event(
            name="rollback",
            doc="the last stable moment is restored; the data go on, so what was seen since is skipped",
            source="restart and skip, PaLM, arXiv 2204.02311, section 5.1",
        ),
        Event(
            name="reset_moments",
            doc="the optimizer forgets its moments, and counts its updates afresh",
            source="momentum reset, SPAM, arXiv 2501.06842",
        ),
        Event(
            name="anchor",
            doc=f"the last stable weights pull from now on: by {PULL:.0%} of the way after each interval at first, half of "
            f"that after {HALF_LIFE:g} of them",
            source="L2-SP, arXiv 1802.01483, with the elastic step of arXiv 1412.6651",
        ),
    )
}


def check_event(name: str) -> None:
    """Raises ``UnknownNameError`` unless the table has it."""
    if name not in EVENTS:
        raise unknown("event", name, EVENTS)


def pull_of(age: np.ndarray) -> np.ndarray:
    """Share (N,) of the way to an anchor that is this many intervals old; 0 where there is none (infinite age).

    >>> pull_of(np.array([0.0, 20.0, np.inf])).tolist()
    [0.05, 0.025, 0.0]
    """
    share: np.ndarray = PULL * 0.5 ** (age / HALF_LIFE)
    return share


class Anchors:
    """The anchors of N runs; nothing is allocated, and nothing is done, before the first one is dropped."""

    def __init__(self, num_runs: int) -> None:
        self._age, self._weights = np.full(num_runs, np.inf), torch.empty(0)

    def drop(self, weights: Tensor, mask: np.ndarray) -> None:
        """Makes ``weights`` (N, P) the anchors of the runs in ``mask`` (bool, (N,), host)."""
        chosen = torch.as_tensor(mask, device=weights.device)[:, None]
        self._weights = weights.clone() if self._weights.numel() == 0 else torch.where(chosen, weights, self._weights)
        self._age[mask] = 0.0

    def weigh(self, mask: np.ndarray) -> None:
        """Takes the anchors of the runs in ``mask`` away."""
        self._age[mask] = np.inf

    def release(self, where: Tensor) -> None:
        """Takes the anchors of marked entries (N, P) bool away."""
        if self._weights.numel():
            self._weights = torch.where(where, torch.nan, self._weights)

    def pull(self, learner: Learner) -> Learner:
        """The learner after an interval, pulled towards the anchors that there are."""
        if not np.isfinite(self._age).any():
            return learner
        share = torch.from_numpy(pull_of(self._age).astype(np.float32)).to(learner.parameters.device)[:, None]
        # A run without an anchor keeps its weights bit for bit, whatever stands in its row; so do units born since.
        held = (share > 0) & ~self._weights.isnan()
        pulled = torch.where(held, torch.lerp(learner.parameters, self._weights, share), learner.parameters)
        self._age += 1
        return learner._replace(parameters=pulled)


def without_moments(learner: Learner, mask: np.ndarray) -> Learner:
    """The learner whose runs in ``mask`` (bool, (N,), host) have forgotten their moments."""
    runs = torch.from_numpy(np.flatnonzero(mask)).to(learner.updates.device)
    return learner.overwritten(runs, learner.parameters[runs])
