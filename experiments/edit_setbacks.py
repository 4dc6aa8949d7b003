"""What a hard prune is to the guard, told of it and not told: ``python -m experiments.edit_setbacks --runs 64``.

Each run loses units once, at a third of its budget (the rule ``prune-once``); the same runs with and without the window in
which a rise of the loss is expected. Writes docs/results/edit_setbacks.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.envs.episode import Episodes
from trimtab.envs.scenario import Scenario
from trimtab.inner_training.edit_limits import EditLimits
from trimtab.inner_training.edits import UnitCounts
from trimtab.policies.registry import load_policy

OUT = Path(__file__).parents[1] / "docs" / "results" / "edit_setbacks.json"
SHARES = (0.5, 0.3, 0.1)


class Untold(EditLimits):
    """Limits under which an edit tells the guard nothing."""

    def permit(
        self, name: str, action: np.ndarray, aimed: bool, units: UnitCounts, refused: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        permitted = super().permit(name, action, aimed, units, refused)
        self.settling[:] = 0
        return permitted


def pruned(final: float, runs: int, *, told: bool) -> dict[str, Any]:
    """Rollbacks, share and loss of so many runs of digits-mlp that are cut to an active share."""
    policy = load_policy("prune-once", final=final)
    scenario = Scenario.of(
        {
            "id": "pruned-once",
            "families": ["digits-mlp"],
            "levers": ["width"],
            "structure": {"least": 0.05},
            "missing": {"progress": 0, "measurements": 0},
            "signals": list(policy.signals),
        }
    )
    episodes = Episodes(scenario, runs, mode="eager")
    limits = episodes.steering.guard.edits
    assert limits is not None
    if not told:
        episodes.steering.guard.edits = Untold(limits.config, runs)
    observations, state = episodes.reset(np.ones(runs, dtype=bool), np.arange(runs)), policy.init(runs)
    rollbacks = np.zeros(runs)
    while not episodes.ended.all():
        actions, state = policy.act(observations, state)
        under_way = ~episodes.ended
        result = episodes.step(actions, policy.levers)
        observations, rollbacks = result.observations, rollbacks + (result.rolled_back & under_way)
    loss = episodes.log_val_loss
    return {
        "final": final,
        "told": told,
        "runs": runs,
        "runs_put_back": int((rollbacks > 0).sum()),
        "rollbacks": int(rollbacks.sum()),
        "active_share": round(float(result.active_share.mean()), 4),
        "ln_val_loss": round(float(loss.mean()), 4),
        "standard_error": round(float(loss.std(ddof=1) / np.sqrt(runs)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=64)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    rows = [pruned(final, runs, told=told) for final in SHARES for told in (False, True)]
    for row in rows:
        print(row)
    command = f"python -m experiments.edit_setbacks --runs {runs}"
    OUT.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
