"""What is measured of runs whose task changes: how they do online, on each phase in its turn, and on what came before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trimtab.envs.episode import Episodes, StepResult
from trimtab.inner_training.task import Instance

EARLY = 1 / 3  # share of the phases that count as early

# What ``PhaseRecord.measures`` gives; a score is an accuracy, or minus the ln of the bounded loss.
MEASURES: Mapping[str, str] = {
    "online_score": "training score of each step's batch before that step, averaged over the budget",
    "phase_score": "test score at the end of each phase, averaged over phases (the average over the trajectory)",
    "early_score": "the same over the first third of the phases",
    "last_score": "test score of all phases at the end of the run, averaged",
    "forgetting": "fall of a phase's test score from its own end to the run's, averaged over all but the last",
}


class PhaseRecord:
    """Scores of runs with phases; higher is better (an accuracy, or minus the ln of the bounded loss).

    Args:
        episodes: of one family.
        instances: the runs, of that family.

    Attributes:
        at_end: (runs, P) test score of each phase when it ended.
        at_last: (runs, P) test score of each phase when the run ended.
    """

    def __init__(self, episodes: Episodes, instances: Sequence[Instance]) -> None:
        runs, phases = len(instances), max(len(instance.all_phases) for instance in instances)
        self._episodes = episodes
        self._ends = np.full((runs, phases), -1, dtype=np.int64)  # -1 is a phase that the run does not have
        for run, instance in enumerate(instances):
            first = [phase.first_step for phase in instance.all_phases]
            self._ends[run, : len(first)] = [*first[1:], instance.steps]
        # An interval that runs on into the next phase trains on it before the phase before is judged.
        self._blurred = ((self._ends[:, :-1] >= 0) & (self._ends[:, :-1] % episodes.scenario.interval > 0)).any(1)
        self._hard = np.zeros((runs, phases), dtype=bool)
        for run, instance in enumerate(instances):
            self._hard[run, list(instance.traits.get("hard_phases", range(len(instance.all_phases))))] = True
        self._sum, self._count = np.zeros(runs), np.zeros(runs)
        interval = episodes.scenario.interval
        self._intervals = np.array([-(-instance.steps // interval) for instance in instances])
        self.at_end, self.at_last = np.full((runs, phases), np.nan), np.full((runs, phases), np.nan)

    def note(self, result: StepResult, run_of: np.ndarray, live: np.ndarray, ended: np.ndarray) -> None:
        """Notes an interval.

        Args:
            result: what it led to.
            run_of: (N,) the run in each slot.
            live: (N,) bool, slots whose run was under way.
            ended: (N,) bool, slots whose run has ended with it.
        """
        score = self._online(result)
        seen = live & np.isfinite(score)
        self._sum[run_of[seen]] += score[seen]
        self._count[run_of[seen]] += 1
        interval = self._episodes.scenario.interval
        due = self._ends[run_of]
        finished = live[:, None] & (due > (result.step - interval)[:, None]) & (due <= result.step[:, None])
        last = np.broadcast_to(ended[:, None], due.shape) & (due >= 0)
        for phase in np.flatnonzero((finished | last).any(0)):
            score = self._episodes.populations.phase_score(int(phase))
            now, final = finished[:, phase], last[:, phase]
            self.at_end[run_of[now], phase] = score[now]
            self.at_last[run_of[final], phase] = score[final]

    def _online(self, result: StepResult) -> np.ndarray:
        """(N,) mean score of the interval's steps; for a family without one, minus the ln of its bounded loss."""
        if np.isfinite(result.score).any():
            return result.score
        scores: np.ndarray = -np.log(self._episodes.populations.bounded(result.losses.T)).mean(1)
        return scores

    def measures(self) -> dict[str, np.ndarray]:
        """The figures of ``MEASURES``, (runs,) each.

        A phase that a run did not live to see counts with what the run scores on it when it has ended, and so do the
        steps that it did not do: for a diverged one that is no better than guessing. What is measured at the end of a
        phase is NaN where no interval ends with it. Forgetting is that of Chaudhry et al. (arXiv 1801.10112), against the
        phase's own end rather than its best. Families that name hard phases are judged on these.
        """
        exists, at_last = self._ends >= 0, self.at_last
        at_end = np.where(np.isfinite(self.at_end), self.at_end, at_last)
        number, count = np.cumsum(exists, 1) - 1, exists.sum(1, keepdims=True)
        counted = exists & self._hard
        early = counted & (number < np.ceil(EARLY * count))
        earlier = counted & (number < count - 1)
        last = _mean(at_last, counted)
        undone = np.maximum(self._intervals - self._count, 0)
        found = {
            "online_score": (self._sum + undone * last) / (self._count + undone),
            "phase_score": _mean(at_end, counted),
            "early_score": _mean(at_end, early),
            "last_score": last,
            "forgetting": _mean(at_end - at_last, earlier),
        }
        for name in ("phase_score", "early_score", "forgetting"):
            found[name] = np.where(self._blurred, np.nan, found[name])
        return found


def _mean(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    count = where.sum(1)
    return np.where(where, values, 0.0).sum(1) / np.maximum(count, 1)
