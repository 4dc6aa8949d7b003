"""Pictures: accuracy against multiplications, and AGF's dynamic range along the training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from experiments.criteria.measure import interval

SHOWN = {"random": "#555555", "magnitude": "#c98a1b", "taylor": "#3f8f4f", "agf": "#2e6db0", "ria": "#8a4fb0"}
FRESH, LONG = "#b03a2e", "#d98880"


def draw(found: Mapping[str, Any], folder: Path) -> None:
    """Draws ``criteria.png`` and ``agf_range.png`` into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = found["tasks"]
    figure, axes = pyplot.subplots(2, len(tasks), figsize=(4.4 * len(tasks), 7.4), squeeze=False, layout="constrained")
    for column, (task, one) in enumerate(tasks.items()):
        for row, field in enumerate(("accuracy before", "accuracy")):
            _task(axes[row][column], found, one, field)
        axes[0][column].set_title(task, fontsize=11)
        axes[1][column].set_xlabel("multiplications left, % of dense")
    for row, name in enumerate(("before fine-tuning", "after fine-tuning")):
        axes[row][0].set_ylabel(f"test accuracy {name}")
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "criteria.png", dpi=110)
    pyplot.close(figure)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    _ranges(left, right, tasks)
    figure.savefig(folder / "agf_range.png", dpi=110)
    pyplot.close(figure)


def _task(axis: Any, found: Mapping[str, Any], one: Mapping[str, Any], field: str) -> None:
    """One panel: criteria by shares of each layer as lines, global selections as points."""
    shares = [f"{share:g}" for share in found["plan"]["sparsities"]]
    work = np.array([100 * one["layer"][share]["work"] for share in shares])

    def line(spans: list[list[float]], place: int, **style: Any) -> None:
        middle, low, high = np.array(spans).T
        shifted = work * (work.max() / work.min()) ** (0.006 * (place - 3))  # so that intervals can be told apart
        axis.errorbar(shifted, middle, [middle - low, high - middle], capsize=2, lw=1.4, markersize=4, **style)

    for place, (name, colour) in enumerate(SHOWN.items()):
        rows = [one["layer"][share][field][name] for share in shares]
        line([row if name == "random" else row["value"] for row in rows], place, color=colour, label=name, marker="o")
    if field == "accuracy":
        for place, (name, colour) in enumerate({"fresh": FRESH, "fresh, long": LONG}.items()):
            spans = [one["scratch"][share][name]["value"] for share in shares]
            line(spans, 5 + place, color=colour, label=name, marker="s", ls="--")
    for name, marker in (("agf none", "x"), ("agf mean", "+"), ("agf fisher", "1")):
        points = [
            (100 * one["global"][share][name]["work"][0], one["global"][share][name][field][0]) for share in shares
        ]
        axis.plot(*zip(*points, strict=True), marker, color=SHOWN["agf"], label=f"{name}, global", markersize=7)
    axis.axhline(one["dense"][field][0], color="#999999", lw=0.8, ls=":", label="dense")
    axis.set_xscale("log")
    axis.set_xticks(work, [f"{one:.2g}" for one in work])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)


def _ranges(left: Any, right: Any, tasks: Mapping[str, Any]) -> None:
    for (task, one), colour in zip(tasks.items(), ("#2e6db0", "#3f8f4f", "#8a4fb0", "#c98a1b"), strict=False):
        steps = 100 * np.array(one["history"]["share"])
        for axis, name, logged in ((left, "layer range", True), (right, "correlation", False)):
            values = np.array(one["history"][name])
            values = np.log(values) if logged else values
            spans = np.array([interval(row) for row in values]).T
            middle, low, high = np.exp(spans) if logged else spans
            axis.plot(steps, middle, color=colour, label=task, lw=1.6)
            axis.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
    left.set_yscale("log")
    left.set_ylabel("AGF's 95th over 5th percentile in a layer")
    right.set_ylabel("rank correlation of AGF and magnitude")
    right.axhline(0, color="#bbbbbb", lw=0.8, zorder=0)
    left.legend(frameon=False)
    for axis in (left, right):
        axis.set_xlabel("% of the dense training")
        axis.spines[["top", "right"]].set_visible(False)
