"""A picture of the online accuracy, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ALWAYS = {"none": "#b03a2e", "fresh": "#333333", "random-reset": "#999999"}
COLOURS = ("#2e6db0", "#3f8f4f", "#c98a1b", "#7b4fa3", "#2aa3a3", "#c2569b")
SMOOTH = 4  # phases of a running mean


def shown(found: Mapping[str, Any]) -> dict[str, str]:
    """Colours of the arms that are drawn: the controls, Grow and Prune, and of the others the best two of each task."""
    chosen = ["grow", "prune"]
    for task in ("random-labels", "permuted"):
        rows = found["tasks"][task]
        others = (name for name in rows if name not in (*ALWAYS, *chosen, "none-sgd"))
        chosen += sorted(others, key=lambda name: -rows[name]["online"][0])[:2]
    return {**ALWAYS, **dict(zip(chosen, COLOURS, strict=False))}


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draws the mean online accuracy of the arms at their tuned settings against the phase, one panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = found["tasks"]
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(4.4 * len(tasks), 3.8), layout="constrained")
    for axis, (task, rows) in zip(axes, tasks.items(), strict=True):
        for name, colour in shown(found).items():
            curve = np.array(rows[name]["curve"])
            width = min(SMOOTH, len(curve))
            smooth = np.convolve(curve, np.full(width, 1 / width), mode="valid")
            style = "--" if name in ("fresh", "random-reset") else "-"
            axis.plot(np.arange(len(smooth)) + width / 2, smooth, style, color=colour, label=name, lw=1.6)
        axis.set_title(task, fontsize=10)
        axis.set_xlabel(f"phase of {found['steps']} steps")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"online accuracy, running mean of {SMOOTH} phases")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
