"""What the environments report beside observation and reward, as arrays over N runs and as one run's dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trimtab.envs.episode import Episodes, StepResult
from trimtab.inner_training.guard import Reason, in_words

Values = Mapping[str, Any]  # arrays with a leading axis of runs, or mappings of such


def start_values(episodes: Episodes) -> dict[str, Any]:
    """What is known when an episode starts: its seed, family and instance, and the validation loss before training."""
    keys = [instance.key if instance else "" for instance in episodes.populations.instances]
    return {
        "seed": episodes.seeds,
        "family": np.array(episodes.populations.family_names, dtype=object),
        "instance": np.array(keys, dtype=object),
        "log_val_loss": episodes.log_val_loss,
        "step": np.zeros(episodes.num_envs, dtype=np.int64),
        **({"events": _events(episodes)} if episodes.disturbed_steps else {}),
    }


def _events(episodes: Episodes) -> np.ndarray:
    """The disturbances that await each run, as (N,) tuples of ``Event``."""
    awaiting = np.empty(episodes.num_envs, dtype=object)
    for run, events in enumerate(episodes.populations.events):
        awaiting[run] = events
    return awaiting


def step_values(episodes: Episodes, result: StepResult) -> dict[str, Any]:
    """What one decision led to."""
    levers = enumerate(episodes.multiplier_levers)
    return {
        "reward_terms": result.terms,
        "log_val_loss": result.log_val_loss,
        "step": result.step,
        "multipliers": {name: result.multipliers[:, column] for column, name in levers},
        "rolled_back": result.rolled_back,
        **_structural(episodes, result.active_share, result.active_work, result.edits),
        **_timed(episodes, result.clock, result.disturbed),
    }


def run_values(episodes: Episodes, result: StepResult) -> dict[str, Any]:
    """The summary of an episode that has ended; `terms` are sums over the episode."""
    return {
        "return": episodes.returns,
        "decisions": episodes.decisions,
        "diverged": result.diverged,
        "log_val_loss": result.log_val_loss,
        "rollbacks": episodes.steering.guard.rollbacks,
        "terms": episodes.term_sums,
        **_structural(episodes, *episodes.mean_activity, result.edits),
        **_timed(episodes, result.clock, episodes.disturbed_steps),
    }


def _structural(episodes: Episodes, share: np.ndarray, work: np.ndarray, edits: np.ndarray) -> dict[str, Any]:
    """How wide runs are and what was edited, where something can be."""
    if episodes.scenario.structure is None:
        return {}
    return {"active_share": share, "active_work": work, "edits": edits}


def _timed(episodes: Episodes, clock: np.ndarray, disturbed: dict[str, np.ndarray]) -> dict[str, Any]:
    """The clock where it may differ from the count of steps or matters, and the steps with each disturbance."""
    found: dict[str, Any] = {"disturbed": disturbed} if disturbed else {}
    return {"clock": clock, **found} if disturbed or episodes.scenario.deadline is not None else found


def of_run(values: Values, run: int) -> dict[str, Any]:
    """One run's entries as plain Python values.

    >>> of_run({"step": np.array([3, 4]), "terms": {"progress": np.array([0.5, 1.5])}}, 1)
    {'step': 4, 'terms': {'progress': 1.5}}
    """
    picked: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            picked[name] = of_run(value, run)
        else:
            entry = value[run]
            picked[name] = entry.item() if isinstance(entry, np.generic) else entry
    return picked


def batched(values: Values, mask: np.ndarray) -> dict[str, Any]:
    """The entries of the runs in ``mask`` as a Gymnasium vector info: a mask beside each key, zeros elsewhere.

    >>> batched({"step": np.array([3, 4])}, np.array([False, True]))
    {'step': array([0, 4]), '_step': array([False,  True])}
    """
    info: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            info[name] = batched(value, mask)
        else:
            blank = np.full(value.shape, None, dtype=object) if value.dtype == object else np.zeros_like(value)
            blank[mask] = value[mask]
            info[name] = blank
        info["_" + name] = mask.copy()
    return info


def reasons_in_words(episodes: Episodes, result: StepResult, run: int) -> dict[str, str]:
    """Why the guard changed what was proposed, for each lever where it did; ``run`` is what befell the run itself."""
    codes = dict(zip(episodes.action_levers, result.reasons[run].tolist(), strict=True))
    befell = int(episodes.steering.guard.befell[run]) if result.rolled_back[run] else 0
    codes["run"] = befell | Reason.LOST * bool(result.diverged[run])
    return {name: in_words(code) for name, code in codes.items() if code}
