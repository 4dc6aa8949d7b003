"""Which of several trained policies is to be shipped? They play the same selection instances, of which held-out ones are none.

    python experiments/choose_policy.py BUNDLE [BUNDLE ...] [--scenario mlp-mix] [--instances 512]

Prints the mean final ln validation loss of each, and the paired difference to the first with its standard error.
"""

from __future__ import annotations

import argparse

import numpy as np

from trimtab.agents.selection import Selection
from trimtab.envs.scenario import load_scenario
from trimtab.policies.registry import load_policy


def main() -> None:
    """One line per policy."""
    parser = argparse.ArgumentParser(description="Compares trained policies on selection instances.")
    parser.add_argument("policies", nargs="+", metavar="BUNDLE")
    parser.add_argument("--scenario", default="mlp-mix")
    parser.add_argument("--instances", type=int, default=512)
    settings = parser.parse_args()
    selection = Selection(load_scenario(settings.scenario), settings.instances // 2)
    reference: np.ndarray | None = None
    for name in settings.policies:
        played = selection.play(load_policy(name))
        final, diverged = played.final_loss, played.diverged
        reference = final if reference is None else reference
        difference = (final - reference).ravel()
        error = difference.std(ddof=1) / np.sqrt(difference.size)
        print(
            f"{name}: {final.mean():.4f}, diverged {diverged.mean():.1%}, "
            f"minus the first {difference.mean():+.4f} ({error:.4f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
