"""A picture of what becomes of runs after a fault."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from experiments.faults.play import INTERVAL, NONE
from experiments.faults.studies import GUARD, PERFECT, TRANSIENT, Faults

SHOWN = {NONE: "#b03a2e", GUARD: "#2e6db0", "full": "#3f8f4f", "default": "#c98a1b", PERFECT: "#555555"}
NAMES = {GUARD: "the guard alone"}
REACH = 25  # decisions after the fault


def draw(found: Mapping[str, Faults], path: Path) -> None:
    """Draws the mean ln validation loss above the undisturbed run, over families, against steps since the fault's end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = -(-len(TRANSIENT) // 2)
    figure, axes = pyplot.subplots(2, columns, figsize=(3.4 * columns, 5.6), sharex=True, layout="constrained")
    for axis, kind in zip(axes.flat, TRANSIENT, strict=False):
        for policy, colour in SHOWN.items():
            if policy in next(iter(found.values())).above:
                height = np.mean([one.above[policy][kind][:REACH] for one in found.values()], 0)
                axis.plot(
                    np.arange(len(height)) * INTERVAL, height, color=colour, label=NAMES.get(policy, policy), lw=1.6
                )
        axis.set_title(kind, fontsize=10)
        axis.set_ylim(-0.1, 1.2)
        axis.axhline(0, color="#bbbbbb", lw=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(TRANSIENT) :]:
        axis.axis("off")
    for below in axes[-1]:
        below.set_xlabel("steps since the end of the fault")
    figure.supylabel("ln validation loss above the same run undisturbed", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
