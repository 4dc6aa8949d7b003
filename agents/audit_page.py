"""An audit on one page: the chain's verdict, what changed and what came of it, and every decision that did something."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trimtab.agents.audit_changes import (
    Effect,
    Found,
    by_kind,
    changes_of,
    effect_of,
    mean_interval,
    number,
    with_any_cause,
)
from trimtab.agents.audit_compare import Comparison
from trimtab.agents.audit_plot import draw_losses
from trimtab.agents.statistics import Interval
from trimtab.policies.audit_chain import Trace

MARK = "<!-- trimtab report -->"  # of a page that may be replaced by a newer one
MOST_ROWS = 500  # of the table of decisions

EFFECTS: Mapping[str, str] = {
    "change": "lever, direction, size (slight below 10 %, moderate below 65 %, large above, of the multiplier) and who made it",
    "times": "how often it was made; in brackets how many of these were undone, by a rollback or by the guard",
    "loss after": "mean change of the training loss over the interval after it, with its 95 % interval; below 0 is better",
    "against usual": "the same minus the mean change over up to ten intervals before; below 0, the loss fell faster than before",
    "validation after": "mean change of the validation loss, over every stretch between two validations that holds such a change",
    "verdict": "helped or hurt where the interval against what was usual excludes 0, or at least half were undone; too few "
    "below 8 outcomes",
}
CAVEAT = (
    "That a loss fell after a change is an association, not a proof. Outcomes of one run depend on each other, so the "
    "intervals are rather too narrow, and of twenty kinds of change one is judged by chance."
)

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c2530; }
table { border-collapse: collapse; margin: 0.5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid #e3e7ec; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child, td.words, th.words { text-align: left; }
td.words { white-space: normal; min-width: 14rem; }
.wide { overflow-x: auto; }
.good { color: #00694f; } .bad { color: #b3261e; font-weight: 600; }
tr.quiet td, .quiet { color: #5a6675; }
code { background: #f2f4f7; padding: 0.1rem 0.3rem; overflow-wrap: anywhere; }
dt { font-weight: 600; } dd { margin: 0 0 0.3rem 1.5rem; }
svg { max-width: 100%; height: auto; }
"""


def to_page(trace: Trace, comparison: Comparison | None = None) -> str:
    """A page that needs nothing but itself.

    Args:
        trace: the audit.
        comparison: with another one, ``a`` being this; None for none.
    """
    found = changes_of(trace.acted if "act" in trace.modes else trace.trusted)
    parts = [
        f"<h1>{_text(trace.name)}</h1>",
        f'<p class="{"good" if trace.verdict.holds else "bad"}">{_text(_sentence(trace.verdict.text()))}</p>',
        f"<p>{_text(' '.join(overview(trace, found)))}</p>",
        draw_losses(trace.lines),
        _effects(found),
        _guard(trace.lines),
        "" if comparison is None else _comparison(comparison),
        _decisions(trace),
        _facts(trace.header),
        _legend(EFFECTS),
    ]
    return (
        f'<!doctype html>\n{MARK}\n<html lang="en">\n<head><meta charset="utf-8"><title>trimtab report: '
        f"{_text(trace.name)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def overview(trace: Trace, found: Found) -> list[str]:
    """The run in a few sentences."""
    header, lines = trace.header, trace.lines
    decisions = [line for line in lines if line["kind"] == "decision"]
    acted = sum(bool(line["changed"] or line["fired"]) for line in decisions)
    rolled = sum(line["rolled_back"] for line in decisions)
    last = decisions[-1]["step"] if decisions else 0
    losses = [number(line["ln_loss"]) for line in decisions]
    known = [loss for loss in losses if math.isfinite(loss)]
    policy, modes = header.get("policy"), list(dict.fromkeys(trace.modes))
    counts = f"{_many(len(decisions), 'decision')} over {_many(last, 'step')}"
    verbs = {"act": "changed something", "advise": "would have changed something"}
    verb = " or ".join(verbs.get(mode, verbs["advise"]) for mode in modes)
    told = [
        f"Policy {policy}, mode {', then '.join(trace.modes)}: {counts}, {acted} of which {verb}; rollbacks: {rolled}."
    ]
    if known:
        told.append(f"The training loss went from {_loss(known[0])} to {_loss(known[-1])}.")
    if found.held:
        told.append(f"Over {_many(len(found.held), 'interval')} for which nothing changed, ln loss changed by "
                    f"{_interval(mean_interval(found.held))} on average.")  # fmt: skip
    if not trace.verdict.holds:
        told.append("Decisions are listed as they are found; what comes from the break on counts for no outcome.")
    resumed = [str(line["step"]) for line in lines if line["kind"] == "resumed"]
    lost = sum(line["lines"] for line in lines if line["kind"] == "lost")
    told += [f"Resumed at step {', '.join(resumed)}."] if resumed else []
    told += [f"{_many(lost, 'line')} could not be written at the time."] if lost else []
    odd = len(trace.entries) - 1 - len(lines) + trace.verdict.lines - len(trace.entries)
    told += [f"{_many(odd, 'line')} cannot be read and {'is' if odd == 1 else 'are'} left out."] if odd else []
    return told


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _loss(log: float) -> str:
    return f"{math.exp(min(log, 700)):.4g}"


def _text(words: object) -> str:
    return html.escape(str(words))


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _interval(value: Interval) -> str:
    if not math.isfinite(value.estimate):
        return ""
    if not math.isfinite(value.low):
        return f"{value.estimate:+.3f}"
    return f"{value.estimate:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], words: Sequence[str] = ()) -> str:
    """Rows are a class and the cells; columns named in ``words`` hold sentences."""
    mark = [' class="words"' if name in words else "" for name in head]
    top = "".join(f"<th{style}>{_text(name)}</th>" for style, name in zip(mark, head, strict=True))
    body = "".join(
        f"<tr{f' class={kind}' if kind else ''}>"
        + "".join(f"<td{style}>{_text(cell)}</td>" for style, cell in zip(mark, cells, strict=True))
        + "</tr>\n"
        for kind, cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _legend(entries: Mapping[str, str]) -> str:
    told = "".join(f"<dt>{_text(name)}</dt><dd>{_text(words)}</dd>" for name, words in entries.items())
    return f"<h2>Columns</h2>\n<dl>{told}</dl>"


# --- what came of it --------------------------------------------------------------------------------------------


def _cells(effect: Effect) -> list[str]:
    times = f"{effect.count}" + (f" ({effect.undone} undone)" if effect.undone else "")
    means = [_interval(one) for one in (effect.loss, effect.against_usual, effect.validation)]
    return [times, *means, effect.verdict]


def _effects(found: Found) -> str:
    if not found.made:
        return "<h2>What came of the changes</h2>\n<p>Nothing was changed, or no interval has ended since.</p>"
    kinds = by_kind(found.made)
    effects = {kind: effect_of(made) for kind, made in with_any_cause(kinds, kinds).items()}
    rows = [(_colour(effect), [kind.text(), *_cells(effect)]) for kind, effect in effects.items()]
    return f'<h2>What came of the changes</h2>\n{_table(list(EFFECTS), rows)}\n<p class="quiet">{_text(CAVEAT)}</p>'


def _colour(effect: Effect) -> str:
    return {"helped": "good", "hurt": "bad", "too few": "quiet"}.get(effect.verdict, "")


def _guard(lines: Sequence[Mapping[str, Any]]) -> str:
    told = [line["guard"] for line in lines if line["kind"] == "decision"]
    counts = Counter(reason for words in told for reason in filter(None, words.split("; ")))
    if not counts:
        return "<h2>The guard</h2>\n<p>It let everything through.</p>"
    rows = [("", [reason, str(count)]) for reason, count in counts.most_common()]
    return f"<h2>The guard</h2>\n{_table(['what it did', 'decisions'], rows)}"


def _comparison(comparison: Comparison) -> str:
    notes = "<br>\n".join(_text(note) for note in comparison.notes)
    style = "bad" if comparison.regressions else ""
    check = "<br>\n".join(_text(_sentence(line)) for line in comparison.text().split("\n"))
    columns = ("times", "against usual", "verdict")
    head = ["change", *(f"{side}: {name}" for side in "ab" for name in columns)]
    rows = [
        ("bad" if row.opposite else "", [row.kind.text(), *(cell for one in (row.a, row.b) for cell in _short(one))])
        for row in comparison.rows
    ]
    both = [row for row, of in zip(rows, comparison.rows, strict=True) if of.a is not None and of.b is not None]
    groups = [
        (
            _colour(one.effect),
            [one.kind.text(), one.side, one.size or "unknown", one.data or "not said", *_cells(one.effect)],
        )
        for one in comparison.groups
    ]
    shared = _table(head, both) if both else "<p>No kind of change was made in both.</p>"
    all_groups = _table(["change", "project", "parameters", "data", *list(EFFECTS)[1:]], groups)
    return (
        f'<h2>Against another project</h2>\n<p class="quiet">{notes}</p>\n<p class="{style}">{check}</p>\n'
        f"<h3>Changes that were made in both</h3>\n{shared}\n"
        f"<details><summary>All kinds of change, also those of one project alone</summary>\n{_table(head, rows)}</details>\n"
        f"<details><summary>By model size and data</summary>\n{all_groups}</details>"
    )


def _short(effect: Effect | None) -> list[str]:
    if effect is None:
        return ["", "", ""]
    times, _, against, _, verdict = _cells(effect)
    return [times, against, verdict]


# --- what was decided -------------------------------------------------------------------------------------------


def _decisions(trace: Trace) -> str:
    lines = trace.lines
    outcomes = _outcomes(lines)
    rows: list[tuple[str, Sequence[str]]] = []
    held = 0
    for index, line in enumerate(lines):
        if line["kind"] == "decision" and not _did(line):
            held += 1
            continue
        row = _row(line, outcomes.get(index))
        if row is not None:
            rows += [*_held(held), row]
            held = 0
    rows += _held(held)
    left = max(0, len(rows) - MOST_ROWS)
    said = (
        f'<p class="quiet">The first {_many(left, "row")} of this table {"is" if left == 1 else "are"} left out.</p>\n'
        if left
        else ""
    )
    head = ["step", "ln loss", "what changed", "why", "loudest signals", "ln loss then"]
    table = _table(head, rows[left:], words=("what changed", "why", "loudest signals"))
    return f"<h2>Decisions</h2>\n{said}{table}"


def _did(line: Mapping[str, Any]) -> bool:
    return bool(line["changed"] or line["fired"] or line["guard"] or line["rolled_back"] or line["undone"])


def _held(count: int) -> list[tuple[str, Sequence[str]]]:
    words = f"{_many(count, 'decision')} that changed nothing"
    return [("quiet", ["", "", words, "", "", ""])] if count else []


def _outcomes(lines: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The outcome of each decision, by its place: the next line that tells of that step, which a resumed run may repeat."""
    found: dict[int, Mapping[str, Any]] = {}
    waiting: dict[int, Mapping[str, Any]] = {}
    for index in reversed(range(len(lines))):
        line = lines[index]
        if line["kind"] == "outcome":
            waiting[line["decided_at"]] = line
        elif line["kind"] == "decision" and line["step"] in waiting:
            found[index] = waiting.pop(line["step"])
    return found


def _row(line: Mapping[str, Any], outcome: Mapping[str, Any] | None) -> tuple[str, Sequence[str]] | None:
    kind = line["kind"]
    if kind == "validation":
        words = f"validation loss {_loss(number(line['ln_val_loss']))}"
        return "quiet", [str(line["step"]), "", words, "", "", ""]
    if kind == "mode":
        return "quiet", [str(line["step"]), "", f"from here on in mode {line['mode']}", "", "", ""]
    if kind in ("resumed", "detached"):
        return "quiet", [str(line["step"]), "", f"{kind}, {line['time']}", "", "", ""]
    if kind != "decision":
        return None
    changed = [_changed(name, number(old), number(new)) for name, (old, new) in line["changed"].items()]
    seen = [f"{name} {number(line['signals'].get(name)):+.2f}" for name in line["loudest"]]
    loss = number(line["ln_loss"])
    shown = f"{loss:.4f}" if math.isfinite(loss) else ""
    cells = [str(line["step"]), shown, ", ".join([*changed, *line["fired"]]), line["reason"], ", ".join(seen)]
    return ("bad" if line["rolled_back"] else ""), [*cells, _then(outcome)]


def _changed(lever: str, old: float, new: float) -> str:
    if lever == "width":
        return f"width {100 * old:.4g} % to {100 * new:.4g} % of the units"
    return f"{lever} x{old:.4g} to x{new:.4g}"


def _then(outcome: Mapping[str, Any] | None) -> str:
    if outcome is None:
        return ""
    change = number(outcome["ln_loss_change"])
    shown = f"{change:+.4f}" if math.isfinite(change) else ""
    return f"{shown} undone".strip() if outcome["undone"] else shown


def _facts(header: Mapping[str, Any]) -> str:
    hidden = ("kind", "format", "sha256")
    rows = [("", [key.replace("_", " "), _fact(value)]) for key, value in header.items() if key not in hidden]
    return f"<h2>The run</h2>\n{_table(['of the header', 'value'], rows, words=('value',))}"


def _fact(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_fact(one)}" for key, one in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
