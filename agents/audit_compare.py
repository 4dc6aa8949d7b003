"""Two projects side by side: which kinds of change helped in each, by model size and data, and which did the opposite."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.agents.audit_changes import Effect, Kind, Made, by_kind, changes_of, effect_of, with_any_cause
from trimtab.errors import UserError
from trimtab.policies.audit_chain import Trace, load_trace
from trimtab.printing import printable

File = str | os.PathLike[str]
OPPOSITE = {"helped": "hurt", "hurt": "helped"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of change in both projects; an effect is None where there was no such change."""

    kind: Kind
    a: Effect | None
    b: Effect | None

    @property
    def opposite(self) -> bool:
        """It helped in one and hurt in the other."""
        return self.a is not None and self.b is not None and OPPOSITE.get(self.a.verdict) == self.b.verdict


@dataclass(frozen=True, kw_only=True)
class Group:
    """One kind of change in one project, for models of one size on the same data.

    Attributes:
        side: ``a`` or ``b``.
        size: of the model, such as ``1M to 10M``.
        data: what the header says of it; empty for not said.
        kind: what was changed.
        effect: what came of it.
    """

    side: str
    size: str
    data: str
    kind: Kind
    effect: Effect


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What ``compare_audits`` found.

    Attributes:
        rows: one for each kind of change in either project.
        groups: the same by model size and data, for each project.
        notes: what a reader must know, one sentence each.
    """

    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Row, ...]:
        """Kinds of change that helped in one project and hurt in the other."""
        return tuple(row for row in self.rows if row.opposite)

    def text(self) -> str:
        """The regression check in words, a line for each finding."""
        lines = []
        for row in self.regressions:
            helped, hurt = ("a", "b") if row.a is not None and row.a.verdict == "helped" else ("b", "a")
            lines.append(f"{printable(row.kind.text())}: helped in {helped}, hurt in {hurt}")
        judged = sum(_judged(row.a) and _judged(row.b) for row in self.rows)
        return "\n".join(
            lines or [f"no kind of change helped in one and hurt in the other ({judged} could be judged in both)"]
        )


def _judged(effect: Effect | None) -> bool:
    return effect is not None and effect.verdict != "too few"


def size_label(parameters: object) -> str:
    """The decade of a number of parameters; empty for none.

    >>> size_label(2_500_000), size_label(None)
    ('1M to 10M', '')
    """
    if not isinstance(parameters, int) or parameters < 1:
        return ""
    low = 10 ** (len(str(parameters)) - 1)
    return f"{_short(low)} to {_short(10 * low)}"


def _short(count: int) -> str:
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count // 1000**power}{('', 'k', 'M', 'G', 'T')[power]}"


def compare_audits(a: File | Sequence[File], b: File | Sequence[File]) -> Comparison:
    """Compares which changes helped in two projects.

    Only lines up to where a chain breaks count. That a loss fell after a change is an association, not a proof; the
    outcomes of one run depend on each other, so the intervals are rather too narrow; and of many kinds some are
    judged by chance.

    Args:
        a: the audit of one project, or several; runs of mode ``act``.
        b: the same of the other.

    Returns:
        Every kind of change (lever, direction, size, cause) with its count, mean outcome and 95 % intervals in each.

    Raises:
        UserError: a file cannot be read, is no audit, is of another format version, or of mode ``advise``.
    """
    return compare_traces(_load(a), _load(b))


def _load(paths: File | Sequence[File]) -> list[Trace]:
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not several:
        raise UserError("no audit was given to compare; give at least one for each project")
    return [load_trace(path) for path in several]


def compare_traces(a: Sequence[Trace], b: Sequence[Trace]) -> Comparison:
    """The same as ``compare_audits``, of audits that have been read."""
    sides = {"a": _by_group(a), "b": _by_group(b)}
    kinds = {side: by_kind([made for some in groups.values() for made in some]) for side, groups in sides.items()}
    causes = {*kinds["a"], *kinds["b"]}
    effects = {
        side: {kind: effect_of(made) for kind, made in with_any_cause(found, causes).items()}
        for side, found in kinds.items()
    }
    rows = tuple(
        Row(kind=kind, a=effects["a"].get(kind), b=effects["b"].get(kind))
        for kind in sorted({*effects["a"], *effects["b"]})
    )
    groups = tuple(
        Group(side=side, size=size, data=data, kind=kind, effect=effect_of(made))
        for side, found in sides.items()
        for (size, data), some in sorted(found.items())
        for kind, made in by_kind(some).items()
    )
    notes = [note for side, traces in (("a", a), ("b", b)) for trace in traces for note in _notes(side, trace)]
    return Comparison(rows=rows, groups=groups, notes=tuple(notes))


def _by_group(traces: Sequence[Trace]) -> dict[tuple[str, str], list[Made]]:
    groups: dict[tuple[str, str], list[Made]] = {}
    for trace in traces:
        header = trace.header
        if "act" not in trace.modes:
            raise UserError(
                f"audit {trace.name!r} is of mode {trace.modes[-1]!r}, in which nothing is changed; "
                "compare audits of mode 'act'"
            )
        size = size_label(header.get("model_parameters") or header.get("parameters"))
        groups.setdefault((size, str(header.get("data") or "")), []).extend(changes_of(trace.acted).made)
    return groups


def _notes(side: str, trace: Trace) -> list[str]:
    about: dict[str, Any] = trace.header
    parameters = about.get("model_parameters") or about.get("parameters")
    shown = f"{parameters:,} parameters" if isinstance(parameters, int) else "an unknown number of parameters"
    data = f"data {about['data']!r}" if about.get("data") else "data not said"
    notes = [f"{side}: {trace.name}, policy {about.get('policy')}, {shown}, {data}."]
    if not trace.verdict.holds:
        notes.append(f"{side}: {trace.name}: {trace.verdict.text()}; what comes from there on is left out.")
    return [printable(note) for note in notes]
