"""A picture of accuracy on the way, and of parity against its average."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

CURVES = {
    "dense": ("#555555", "-"),
    "grow, 20 %": ("#2e6db0", "-"),
    "grow, 50 %": ("#2e6db0", "--"),
    "prune, 20 %": ("#b03a2e", "-"),
    "prune, 50 %": ("#b03a2e", "--"),
    "prune, no rewind, 20 %": ("#c98a1b", "-"),
    "prune, no rewind, 50 %": ("#c98a1b", "--"),
}
PLAIN = {"grow, 20 %": "#9ec3ea", "grow, 30 %": "#6ba3db", "grow, 40 %": "#3f80c4", "grow, 50 %": "#1d4f8a"}


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draws the study of the head, and what there is of the perceptron."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = [place for place in ("head", "perceptron") if place in found]
    figure, axes = pyplot.subplots(
        len(places), 2, figsize=(10.5, 4.2 * len(places)), layout="constrained", squeeze=False
    )
    for row, place in zip(axes, places, strict=True):
        _curves(row[0], found[place], found["steps"])
        _scatter(row[1], found[place])
        row[0].set_title(f"{place}: test accuracy", fontsize=10)
        row[1].set_title(f"{place}: runs of grown networks", fontsize=10)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curves(axis: Any, place: Mapping[str, Any], steps: int) -> None:
    for name, (colour, style) in CURVES.items():
        if name in place["cells"]:
            curve = place["cells"][name]["curve"]
            at = steps / len(curve) * np.arange(1, len(curve) + 1)
            axis.plot(at, [100 * value for value in curve], style, color=colour, label=name, lw=1.5)
    axis.set_xlabel("step")
    axis.set_ylabel("%")
    axis.legend(frameon=False, fontsize=8)


def _scatter(axis: Any, place: Mapping[str, Any]) -> None:
    others = dict.fromkeys(name for name, *_ in place["points"] if name not in PLAIN)
    palette = dict(zip(others, _colours(len(others)), strict=True))
    shapes = dict(zip(others, itertools.cycle("^sDvP"), strict=False))
    for name in dict.fromkeys(name for name, *_ in place["points"]):
        own = np.array([point[1:] for point in place["points"] if point[0] == name])
        marker, colour = ("o", PLAIN[name]) if name in PLAIN else (shapes[name], palette[name])
        axis.scatter(own[:, 0], 100 * own[:, 1], marker=marker, color=colour, s=22, label=name)
    axis.axvline(0, color="#bbbbbb", lw=0.8, zorder=0)
    axis.set_xlabel("ln gradient parity of newborns at birth, mean over edits")
    axis.set_ylabel("trajectory average, %")
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _colours(count: int) -> list[Any]:
    import matplotlib

    return [matplotlib.colormaps["tab20"]((2 * place + place // 10) % 20) for place in range(count)]
