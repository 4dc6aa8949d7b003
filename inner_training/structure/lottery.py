"""Lottery tickets in populations: rounds of training, pruning and rewinding, with the controls of each ticket beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import MismatchError, RangeError, UserError, out_of_range, unknown
from trimtab.inner_training.streams import draw_words
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.sparse_methods import sparse_layers
from trimtab.inner_training.structure.sparse_rules import highest, thinned
from trimtab.inner_training.structure.stacked import Stacked

SHARE = 0.2  # Frankle & Carbin, arXiv 1803.03635: of the remaining weights, in each round
WORD = 0x7FFFFFFF

ARMS = {
    "ticket": "what is left of its weights by magnitude begins again at the values that it had",
    "fresh": "the mask of its ticket, with other initial values: those of its own instance",
    "shuffled": "as many weights in each layer as its ticket, at random places",
    "random": "as many weights in all as its ticket, at random places in all layers alike",
}


class Lottery:
    """Iterative magnitude pruning with rewinding (Frankle & Carbin, arXiv 1803.03635; to an early step: arXiv 1903.01611).

    A round is ``begin``, the training up to the budget by ``population.advance``, and ``prune``::

        for _ in range(rounds):
            lottery.begin()
            population.advance(steps - lottery.latest)
            lottery.prune()

    ``begin`` starts every run anew: values, optimizer state, buffers, schedule and the order of its batches. A run that rewinds
    to step k makes its first k steps dense again, which gives the same values bit for bit, and then loses its masked weights and
    the optimizer's state. Controls are those of Frankle et al., arXiv 2009.08576.

    Args:
        structure: of a population whose runs have all been reset to their instances.
        arms: of each run, from ``ARMS``.
        tickets: the run that each follows; of a ticket, itself. A control begins where its ticket does (another
            instance with other initial values is for ``fresh`` alone).
        share: of the remaining weights that a round prunes, in (0, 1).
        rewind: step to which runs go back, one or (N,).
        layers: names of parameters; None for the weights of linear layers and convolutions.

    Attributes:
        live: (N, *shape) bool by layer, which weights live; all that there are before the first round.
        rounds: pruned so far.
        latest: the largest step of rewinding, where all runs are after ``begin``.

    Raises:
        UserError: arms, tickets or steps that do not fit the runs.
    """

    def __init__(
        self,
        structure: Stacked,
        arms: Sequence[str],
        tickets: Sequence[int],
        *,
        share: float = SHARE,
        rewind: int | Sequence[int] = 0,
        layers: Iterable[str] | None = None,
    ) -> None:
        self._structure, runs = structure, structure.population
        self._arms, self._tickets = tuple(arms), np.asarray(tickets, dtype=np.int64)
        self._check_arms()
        if not 0 < share < 1:
            raise RangeError(f"share is {share}; it must lie strictly between 0 and 1")
        given = np.asarray(rewind, dtype=np.int64)
        if given.shape not in ((), (runs.num_runs,)):
            raise MismatchError(
                f"rewind has the shape {given.shape}; give one step, or one for each of {runs.num_runs} runs"
            )
        self._rewind = np.broadcast_to(given, (runs.num_runs,))
        most = int(runs.total_steps.min()) - 1
        for step in self._rewind[(self._rewind < 0) | (self._rewind > most)]:
            raise out_of_range("rewind", int(step), 0, most)
        self._share, self._names = share, sparse_layers(runs.family.module, runs.layout.shapes, layers)
        self.rounds, self.latest = 0, int(self._rewind.max())
        views = runs.layout.views(~structure._flat.entries(~structure._units.active))
        self._exists = {name: views[name].clone() for name in self._names}
        self.live = dict(self._exists)
        self._check_widths()

    def _check_arms(self) -> None:
        runs = self._structure.population
        if not len(self._arms) == len(self._tickets) == runs.num_runs:
            raise MismatchError(
                f"there are {len(self._arms)} arms and {len(self._tickets)} tickets; give one of each for {runs.num_runs} runs"
            )
        for run, (arm, ticket) in enumerate(zip(self._arms, self._tickets.tolist(), strict=True)):
            if arm not in ARMS:
                raise unknown("arm of a lottery", arm, ARMS)
            if not 0 <= ticket < runs.num_runs or self._arms[ticket] != "ticket":
                raise UserError(f"run {run} follows run {ticket}, which is no ticket; give the number of one")
            if arm == "ticket" and ticket != run:
                raise UserError(f"run {run} is a ticket and follows run {ticket}; a ticket follows itself")
            own, other = runs.instances[run], runs.instances[ticket]
            if own is None or other is None:
                raise UserError(f"run {run} has not begun; reset all runs to their instances first")
            same = all(np.array_equal(value, other.parameters[name]) for name, value in own.parameters.items())
            if same == (arm == "fresh"):
                remedy = "other initial values" if same else "the initial values of its ticket"
                raise UserError(f"run {run} is {arm!r} and its instance does not fit that; give it one with {remedy}")

    def _check_widths(self) -> None:
        rows = torch.from_numpy(self._tickets)
        for name, one in self._exists.items():
            wrong = (one != one[rows.to(one.device)]).flatten(1).any(1).nonzero()[:, 0].tolist()
            if wrong:
                raise UserError(
                    f"runs {wrong} have other units in {name} than their tickets; give them the same widths"
                )

    def begin(self) -> None:
        """Starts all runs anew, with the masks of this round."""
        runs, done = self._structure.population, 0
        instances = [one for one in runs.instances if one is not None]
        runs.reset(range(runs.num_runs), instances)
        for step in np.unique(self._rewind).tolist():
            if step > done:
                runs.advance(step - done)
                done = step
            if self.rounds:
                which = self._rewind == step
                self._structure.mask(self._masks(), runs=which)
                runs.fire("reset_moments", which)

    def _masks(self) -> dict[str, Tensor]:
        return {name: live | ~self._exists[name] for name, live in self.live.items()}

    def prune(self) -> None:
        """Ends a round: tickets lose the smallest of their remaining weights, of all layers together, and controls follow."""
        runs = self._structure.population
        weights, exists = runs.layout.views(runs._learner.parameters), self._joined(self._exists)
        live = self._joined(self.live)
        most = live.sum(1) - (live.sum(1) * self._share).round().long()
        values = torch.cat([weights[name].flatten(1) for name in self._names], 1)
        won = thinned(live, values, most)[torch.from_numpy(self._tickets).to(live.device)]
        self.rounds += 1
        seeds = draw_words(runs._feed.seed, torch.full_like(runs._feed.seed, 0x2F0F + self.rounds)) & WORD
        draws = Draws(seeds, (runs.num_runs,), live.device)
        anywhere = highest(draws.uniform(live.shape[1]), exists, won.sum(1))
        parts = (self._split(one) for one in (won, anywhere))
        found, spread = parts
        for name, one in found.items():
            there = self._exists[name].flatten(1)
            shuffled = highest(draws.uniform(there.shape[1]), there, one.flatten(1).sum(1)).view(one.shape)
            chosen = torch.where(self._which("shuffled", one), shuffled, one)
            self.live[name] = torch.where(self._which("random", one), spread[name], chosen)

    def _which(self, arm: str, like: Tensor) -> Tensor:
        marked = torch.tensor([one == arm for one in self._arms], device=like.device)
        return marked.view(-1, *[1] * (like.ndim - 1))

    def _joined(self, parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([parts[name].flatten(1) for name in self._names], 1)

    def _split(self, joined: Tensor) -> dict[str, Tensor]:
        sizes = [one[0].numel() for one in self._exists.values()]
        parts: tuple[Tensor, ...] = joined.split(sizes, 1)  # type: ignore[no-untyped-call]
        return {name: part.view(self._exists[name].shape) for name, part in zip(self._names, parts, strict=True)}

    @property
    def density(self) -> Tensor:
        """(N,) float32 share of the weights that lives, of those that are not of inactive units."""
        return self._joined(self.live).sum(1) / self._joined(self._exists).sum(1)
