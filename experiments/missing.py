"""What the shipped policy loses when a user has no validation set or no budget.

python experiments/missing.py [--runs 160] [--policy default]
"""

from __future__ import annotations

import argparse
from typing import get_args

import numpy as np

from trimtab.agents.conditions import Conditions, Missing
from trimtab.agents.evaluate import Evaluator
from trimtab.agents.statistics import iqm
from trimtab.envs.scenario import load_scenario
from trimtab.policies.registry import load_policy


def main() -> None:
    """Prints one row per scenario and condition."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=160)
    parser.add_argument("--policy", default="default")
    options = parser.parse_args()
    policy = load_policy(options.policy)
    print(
        "| scenario | missing | final loss (IQM) | minus nothing missing (mean) | diverged |",
        "|---|---|---|---|---|",
        sep="\n",
    )
    for name in ("digits-mlp", "tabular-mlp", "digits-mlp-tanh"):
        evaluator = Evaluator(load_scenario(name), runs=options.runs, seed=0)
        whole: np.ndarray | None = None
        for missing in get_args(Missing):
            result = evaluator.play(policy, Conditions(missing=missing))
            whole = result.final_loss if whole is None else whole
            lost = float((result.final_loss - whole).mean())
            middle = float(iqm(result.final_loss))
            print(f"| {name} | {missing} | {middle:.2f} | {lost:+.2f} | {int(result.diverged.sum())} |", flush=True)


if __name__ == "__main__":
    main()
