"""The loss of a run over its steps, with a mark where something was changed: a drawing without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.agents.audit_changes import number

WIDTH, HEIGHT, LEFT, BELOW, ABOVE = 900, 240, 60, 34, 12
MOST_POINTS = 1500
# Colour-blind safe (Okabe & Ito).
LOSS, CHANGE, ROLLBACK = "#4C6A92", "#E69F00", "#D55E00"


def draw_losses(lines: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of the ln mean loss at each decision; empty below two known losses."""
    decisions = [line for line in lines if line["kind"] == "decision"]
    points = [(line["step"], number(line["ln_loss"]), line) for line in decisions]
    known = [(step, loss) for step, loss, _ in points if math.isfinite(loss)]
    if len(known) < 2 or known[0][0] >= max(step for step, _ in known):
        return ""
    first, last = min(step for step, _ in known), max(step for step, _ in known)
    low, high = min(loss for _, loss in known), max(loss for _, loss in known)
    high = high if high > low else low + 1

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * (step - first) / (last - first)

    def y(loss: float) -> float:
        return ABOVE + (HEIGHT - BELOW - ABOVE) * (high - loss) / (high - low)

    thin = max(1, len(known) // MOST_POINTS)
    curve = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in known[::thin])
    marks = "".join(_mark(x(line["step"]), line) for line in _marked(decisions, first, last))
    return (
        f'<p><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="ln loss over steps">\n{marks}'
        f'<polyline points="{curve}" fill="none" stroke="{LOSS}" stroke-width="1.6"/>\n'
        f"{_labels((first, last), (low, high))}</svg></p>"
    )


def _marked(decisions: Sequence[Mapping[str, Any]], first: int, last: int) -> list[Mapping[str, Any]]:
    found = [one for one in decisions if (one["changed"] or one["rolled_back"]) and first <= one["step"] <= last]
    return found[:: max(1, len(found) // MOST_POINTS)]


def _mark(at: float, line: Mapping[str, Any]) -> str:
    colour, wide = (ROLLBACK, 2) if line["rolled_back"] else (CHANGE, 1)
    return (
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{ABOVE}" y2="{HEIGHT - BELOW}" stroke="{colour}" '
        f'stroke-width="{wide}" opacity="0.6"/>\n'
    )


def _labels(steps: tuple[int, int], losses: tuple[float, float]) -> str:
    bottom = HEIGHT - BELOW
    texts = [
        (LEFT - 6, ABOVE + 8, "end", f"{losses[1]:.3g}"),
        (LEFT - 6, bottom, "end", f"{losses[0]:.3g}"),
        (LEFT, bottom + 16, "start", f"step {steps[0]:,}"),
        (WIDTH - 10, bottom + 16, "end", f"step {steps[1]:,}"),
        (
            (LEFT + WIDTH) // 2,
            bottom + 16,
            "middle",
            "ln training loss; orange: something was changed, red: rolled back",
        ),
    ]
    return "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="12" fill="#5a6675">{words}</text>\n'
        for x, y, anchor, words in texts
    )
