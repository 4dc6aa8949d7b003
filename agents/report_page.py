"""A benchmark on one page: a table for each scenario, and its picture."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.agents.contestants import POINTS
from trimtab.agents.diagnostics import FIGURES, STRUCTURE
from trimtab.agents.phases import MEASURES
from trimtab.agents.results import ScenarioResult, Summary
from trimtab.agents.statistics import Interval

COLUMNS: Mapping[str, str] = {
    "policy": "who steered; @tuned: best learning rate of a grid on training instances; @oracle: best per instance",
    "final loss": "interquartile mean of the ln test loss at the end of the budget, with its 95 % interval",
    "minus reference": "mean difference of the final loss to the reference on the same instances; above 0 is worse",
    "better": "probability that it ends better than the reference on an instance",
    "better, 95 %": "interval of that probability",
    "p": "of the difference, sign-flip test, Holm-corrected over the table",
    "best": "interquartile mean of the ln test loss at the best validation checkpoint",
    "average": "interquartile mean of the ln validation loss averaged over the budget",
    "diverged": "runs that diverged (+ runs lost in the first interval, before anyone could act on a measurement)",
    "steps to target": "median steps until the run's target validation loss; in brackets the share that reaches it",
    "seconds": "wall time of all runs, validation and policy included, test losses not",
}

# Colour-blind safe (Okabe & Ito); learned policies stand out, the rest stays quiet.
LEARNED, RULE, BEST = "#D55E00", "#4C6A92", "#9AA5B1"
MARKERS = {"untuned": "o", "tuned": "s", "oracle": "D"}

LEGEND: Mapping[str, str] = {
    **MEASURES,
    **dict(FIGURES.values()),
    **STRUCTURE,
    "joules": "energy drawn by the machine while the runs were played, shared out by their steps",
}

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c2530; }
table { border-collapse: collapse; margin: 0.5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #e3e7ec; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.learned td { color: #b34700; font-weight: 600; }
img { max-width: 100%; } code { background: #f2f4f7; padding: 0.1rem 0.3rem; overflow-wrap: anywhere; }
dt { font-weight: 600; } dd { margin: 0 0 0.3rem 1.5rem; } .quiet { color: #5a6675; }
"""


def cells(row: Summary, reference: str, digits: int = 3) -> dict[str, str]:
    """One row of the table as text, by column.

    Args:
        row: of the table.
        reference: label of the row that the others are compared with.
        digits: after the decimal point of losses.
    """

    def span(value: Interval, form: str) -> str:
        return f"{value.estimate:{form}} [{value.low:{form}}, {value.high:{form}}]"

    own = row.label == reference
    steps = "never" if row.steps_to_target is None else f"{row.steps_to_target:.0f}"
    return {
        "policy": row.label,
        "final loss": span(row.final, f".{digits}f"),
        "minus reference": "reference" if own else span(row.difference, f"+.{digits}f"),
        "better": "" if own else f"{row.better.estimate:.2f}",
        "better, 95 %": "" if own else f"[{row.better.low:.2f}, {row.better.high:.2f}]",
        "p": "" if own else "<0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}",
        "best": f"{row.best:.{digits}f}",
        "average": f"{row.trajectory:.{digits}f}",
        "diverged": f"{row.diverged} (+{row.lost_early})",
        "steps to target": f"{steps} ({row.reached:.0%})",
        "seconds": f"{row.wall_seconds:.1f}",
    }


def measure(row: Summary, name: str) -> str:
    """A further figure of a row as text."""
    value = row.measures[name]
    return "" if value is None else f"{value:.3f}"


def notes(result: ScenarioResult) -> list[str]:
    """What a reader must know to read the table of one scenario, one sentence each."""
    evaluation = result.entries[0].evaluation
    runs = len(evaluation.final_loss)
    found = [
        f"{runs} held-out instances, the same for every policy, under the same guard.",
        f"Losses are natural logs; lower is better. Reference: {result.reference}.",
        f"Target of a run: the final validation loss of {result.target} on the same instance.",
    ]
    for entry in result.entries:
        if "chosen" in entry.tuning:
            rates = ", ".join(f"{rate:.3g} ({kind})" for kind, rate in entry.tuning["chosen"].items())
            found.append(f"{entry.label}: {rates}, chosen by {entry.tuning['tuning_runs']} runs on training instances.")
        elif entry.tuning:
            found.append(f"{entry.label}: the best of {entry.tuning['tuning_runs']} runs on the instances themselves.")
        if entry.training_steps:
            grid = float(evaluation.budgets.mean()) * (POINTS - 1)
            found.append(
                f"{entry.label}: trained on {entry.training_steps:,} inner steps, which is what a choice among {POINTS} "
                f"learning rates costs on top of {entry.training_steps / grid:,.0f} runs of this scenario."
            )
    return found


def draw_figure(results: Sequence[ScenarioResult]) -> bytes | None:
    """The final losses as a dot plot with intervals, one panel for each scenario.

    Returns:
        A PNG, or None where matplotlib is not installed, or does not work.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        return None

    heights = [0.7 + 0.27 * len(result.summaries) for result in results]
    figure = Figure(figsize=(7.5, sum(heights) + 0.7), layout="constrained", dpi=150)
    panels = figure.subplots(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, result in zip(panels, results, strict=True):
        _panel(panel, result)
    panels[-1].set_xlabel(
        "final test loss, natural log: interquartile mean, 95 % interval (left is better)", fontsize=9
    )
    shown = {row.setting for result in results for row in result.summaries}
    words = {
        "untuned": "initial learning rate as drawn",
        "tuned": "tuned on training instances",
        "oracle": "best rate per instance, in hindsight",
    }
    legend = [
        Line2D([], [], linestyle="", marker=MARKERS[setting], color=_colour(setting, False), label=words[setting])
        for setting in MARKERS
        if setting in shown
    ]
    if any(row.learned for result in results for row in result.summaries):
        legend.insert(0, Line2D([], [], linestyle="", marker="o", color=LEARNED, label="learned policy"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=7.5, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _colour(setting: str, learned: bool) -> str:
    return LEARNED if learned else BEST if setting == "oracle" else RULE


def _panel(panel: Any, result: ScenarioResult) -> None:
    for place, row in enumerate(result.summaries):
        colour = _colour(row.setting, row.learned)
        wide = 2.6 if row.learned else 1.6
        panel.plot(
            [row.final.low, row.final.high], [place, place], color=colour, linewidth=wide, solid_capstyle="round"
        )
        size = 7.5 if row.learned else 5.5
        panel.plot(row.final.estimate, place, marker=MARKERS[row.setting], color=colour, markersize=size)
    reference = next(row for row in result.summaries if row.label == result.reference)
    panel.axvline(reference.final.estimate, color=_colour("", reference.learned), linewidth=0.8, alpha=0.35, zorder=0)
    panel.set_yticks(range(len(result.summaries)), [row.label for row in result.summaries], fontsize=8.5)
    for tick, row in zip(panel.get_yticklabels(), result.summaries, strict=True):
        if row.learned:
            tick.set_color(LEARNED)
            tick.set_fontweight("bold")
    panel.set_ylim(len(result.summaries) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(axis="x", color="#e3e7ec", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    runs = len(result.entries[0].evaluation.final_loss)
    panel.set_title(f"{result.scenario}: {runs} held-out instances", loc="left", fontsize=10)


def to_html(results: Sequence[ScenarioResult], command: str, figure: bytes | None) -> str:
    """A page that needs nothing but itself.

    Args:
        results: one for each scenario.
        command: what repeats it.
        figure: a PNG, or None to leave it out.
    """
    picture = ""
    if figure is not None:
        data = base64.b64encode(figure).decode()
        picture = f'<p><img alt="final test loss of each policy" src="data:image/png;base64,{data}"></p>\n'
    sections = "".join(_section(result) for result in results)
    legend = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(words)}</dd>" for k, words in COLUMNS.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>trimtab bench</title>'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>trimtab bench</h1>\n<p><code>{html.escape(command)}</code></p>\n"
        f"{picture}{sections}<h2>Columns</h2>\n<dl>{legend}</dl>\n</body>\n</html>\n"
    )


def _section(result: ScenarioResult) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    rows = "".join(
        f"<tr{' class=learned' if row.learned else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row, result.reference).values())
        + "</tr>\n"
        for row in result.summaries
    )
    about = "<br>\n".join(html.escape(note) for note in notes(result))
    return (
        f'<h2>{html.escape(result.scenario)}</h2>\n<p class="quiet">{about}</p>\n'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>\n{_measures(result)}"
    )


def _measures(result: ScenarioResult) -> str:
    """A second table, for scenarios that measure more than losses."""
    names = tuple(result.summaries[0].measures)
    if not names:
        return ""
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in ("policy", *names))
    rows = "".join(
        f"<tr{' class=learned' if row.learned else ''}><td>{html.escape(row.label)}</td>"
        + "".join(f"<td>{measure(row, name)}</td>" for name in names)
        + "</tr>\n"
        for row in result.summaries
    )
    legend = "".join(
        f"<dt>{html.escape(name.replace('_', ' '))}</dt><dd>{html.escape(LEGEND.get(name, ''))}</dd>" for name in names
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>\n<dl>{legend}</dl>\n"
