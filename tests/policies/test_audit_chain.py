"""The chain of an audit: what it finds, what it says, and that it holds after a crash."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policies.audits import HEADER, SHORT, write

from trimtab.errors import UserError
from trimtab.policies.audit import Audit, read_audit, verify_audit
from trimtab.policies.audit_chain import load_trace
from trimtab.policies.audit_format import LINES, OPTIONAL, TYPES, fits

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "audit.jsonl"
LAST = "da6addca709adc96166486f56b5c144b29f04b202e7d07bcaac1f9d0ce604ffb"


def reference(content: bytes) -> str | None:
    """Hash of the last line by the words of docs/audit.md; None where the chain breaks."""
    *lines, rest = content.decode("ascii").split("\n")
    previous = ""
    for line in lines:
        found = re.fullmatch(r'(.*), "sha256": "([0-9a-f]{64})"\}', line)
        if found is None:
            return None
        if hashlib.sha256((previous + found[1] + "}").encode()).hexdigest() != found[2]:
            return None
        assert json.loads(line)["sha256"] == found[2]
        previous = found[2]
    return None if rest else previous


def test_the_golden_chain(tmp_path: Path) -> None:
    content = GOLDEN.read_bytes()
    assert write(tmp_path / "again.jsonl", SHORT).read_bytes() == content
    assert reference(content) == LAST
    verdict = verify_audit(GOLDEN)
    assert verdict.holds and verdict.closed and verdict.last == LAST and verdict.lines == 11 and verdict.torn == 0
    assert verdict.text() == "the chain holds over all 11 lines, from the header to the detached controller"
    entries = read_audit(GOLDEN)
    assert [{key: value for key, value in entry.items() if key != "sha256"} for entry in entries] == [HEADER, *SHORT]
    assert all(fits(entry) for entry in entries)


WHOLE = GOLDEN.read_bytes()


def found(path: Path, content: bytes) -> int | None:
    """The line at which a changed audit is found out; None where it is not."""
    path.write_bytes(content)
    try:
        verdict = verify_audit(path)
    except UserError:
        return 1  # not even a header
    return verdict.lines + 1 if verdict.torn else verdict.broken_at


@settings(max_examples=400)
@given(at=st.integers(0, len(WHOLE) - 1), other=st.integers(1, 255))
def test_any_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, at: int, other: int) -> None:
    changed = bytearray(WHOLE)
    changed[at] ^= other
    line = WHOLE[:at].count(b"\n") + 1
    path = tmp_path_factory.getbasetemp() / "changed.jsonl"
    assert found(path, bytes(changed)) == line
    assert not changed.isascii() or reference(bytes(changed)) is None


@given(first=st.integers(0, 9), second=st.integers(0, 9), data=st.data())
def test_lines_that_were_removed_moved_or_put_there_are_found(
    tmp_path_factory: pytest.TempPathFactory, first: int, second: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "moved.jsonl"
    lines = WHOLE.splitlines(keepends=True)
    removed = [*lines[: first + 1], *lines[first + 2 :]] if first < 9 else None
    if removed is not None:
        assert found(path, b"".join(removed)) == first + 2
    doubled = [*lines[: first + 1], lines[first], *lines[first + 1 :]]
    assert found(path, b"".join(doubled)) == first + 2
    if first != second:
        swapped = list(lines)
        swapped[first], swapped[second] = lines[second], lines[first]
        assert found(path, b"".join(swapped)) == min(first, second) + 1
    if data.draw(st.booleans()):
        assert found(path, b"".join([*lines[: first + 1], b"\n", *lines[first + 1 :]])) == first + 2


def test_whole_lines_cut_off_the_end_are_only_found_by_the_missing_last_one(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_bytes(b"".join(WHOLE.splitlines(keepends=True)[:-1]))
    verdict = verify_audit(path)
    assert verdict.holds and not verdict.closed
    assert (
        verdict.text()
        == "the chain holds over all 10 lines; the last one is not 'detached', so the run goes on or was cut off"
    )


@given(cut=st.integers(1, len(WHOLE) - 1))
def test_a_torn_last_line_is_left_out_and_said(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "torn.jsonl"
    path.write_bytes(WHOLE[: len(WHOLE) - cut])
    rest = WHOLE[: len(WHOLE) - cut].rsplit(b"\n", 1)[-1]
    lines = WHOLE[: len(WHOLE) - cut].count(b"\n")
    whole = rest + b"\n" in WHOLE.splitlines(keepends=True)  # only its line feed is missing
    if lines + whole == 0:
        with pytest.raises(UserError, match="is not an audit: it does not begin with a whole header line"):
            verify_audit(path)
        return
    verdict = verify_audit(path)
    assert verdict.holds and verdict.lines == lines + whole and verdict.torn == (0 if whole else len(rest))
    assert ("a torn last line of" in verdict.text()) == bool(verdict.torn)
    assert read_audit(path) == read_audit(GOLDEN)[: verdict.lines]


def test_a_broken_chain_names_the_first_line_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(WHOLE.replace(b"-0.6,", b"-0.7,", 1))
    trace = load_trace(path)
    assert trace.verdict.broken_at == 6
    assert "the chain breaks at line 6 of 11: that line was changed, or a line before" in trace.verdict.text()
    assert len(trace.lines) == 10 and len(trace.trusted) == 4


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"mine\n", "is not an audit"),
    "json": (b'{"results": []}\n', "is not an audit"),
    "results over lines": (b'{\n "kind": "header"\n}\n', "is not an audit"),
    "torn header": (WHOLE[:100], "is not an audit"),
    "bytes": (bytes(range(256)), "is not an audit"),
    "deep": (b"[" * 100_000 + b"\n", "is not an audit"),
    "future": (WHOLE.replace(b'"format": 1', b'"format": 7', 1), "is of format 7, and this version of trimtab reads"),
    "without a chain": (b'{"kind": "header", "trimtab": "0.0.1"}\n', "is of format None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_audit_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        verify_audit(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        verify_audit(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is not a regular file"):
        verify_audit(tmp_path)


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = WHOLE.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b'{"kind": \n', *lines[3:]]))
    with pytest.raises(UserError, match="line 4 is damaged"):
        read_audit(path)


# --- the format ---------------------------------------------------------------------------------------------------


def test_the_page_lists_every_field() -> None:
    page = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"### `(\w+)`\n(.*?)(?=\n##)", page, re.DOTALL))
    told = {
        kind: re.findall(r"^\| `(\w+)` \| (\S+) \| (.*) \|$", section, re.MULTILINE)
        for kind, section in sections.items()
    }
    assert told == {kind: [(name, *field) for name, field in fields.items()] for kind, fields in LINES.items()}
    assert list(told) == list(LINES)


WRONG: dict[str, list[Any]] = {
    "text": [3, None],
    "bool": [1, "true"],
    "whole": [1.5, True, 2**70],
    "number": ["much", True, [1], 10**400],
    "names": ["lr", [1]],
    "numbers": [[1.0], {"lr": "much"}],
    "pairs": [{"lr": [1.0]}, {"lr": 1.0}, {"lr": [1.0, {}]}],
    "object": [[], "x"],
}


def test_lines_with_a_field_missing_or_of_another_type_do_not_fit() -> None:
    assert set(WRONG) == set(TYPES)
    for line in (HEADER, *SHORT):
        kind = line["kind"]
        assert fits(line), line
        for name, field in LINES[kind].items():
            if name not in line:
                continue
            without = {key: value for key, value in line.items() if key != name}
            assert fits(without) == ((kind, name) in OPTIONAL)
            assert all(not fits({**line, name: wrong}) for wrong in WRONG[field.type.rstrip("?")] if wrong is not None)
            assert fits({**line, name: None}) == field.type.endswith("?")
    assert not fits({"kind": "other"}) and not fits({"kind": ["header"]}) and not fits({})


# --- a crash ------------------------------------------------------------------------------------------------------

ENDLESS = """
import itertools, sys
from trimtab.policies.audit import Audit

audit = Audit(sys.argv[1], {"policy": "cosine"})
for step in itertools.count():
    audit.append([{"kind": "outcome", "step": step}, {"kind": "decision", "step": step, "reason": "x" * (step % 5000)}])
"""


@pytest.mark.parametrize("lines", [20, 200, 1500])
def test_what_a_killed_process_wrote_holds_and_goes_on(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "run.jsonl"
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(path)])
    try:
        until = time.monotonic() + 60
        while (path.read_bytes().count(b"\n") if path.exists() else 0) < lines and time.monotonic() < until:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    verdict = verify_audit(path)
    assert verdict.holds and verdict.lines >= lines and not verdict.closed
    steps = [entry["step"] for entry in read_audit(path)[1:]]
    assert steps == [number // 2 for number in range(len(steps))]
    audit = Audit(path, {"policy": "cosine"})
    audit.write("resumed", step=7)
    audit.write("decision", step=8)
    again = verify_audit(path)
    assert again.holds and again.lines == verdict.lines + 2


@pytest.mark.parametrize("cut", [0, 1, 2, 50])
def test_an_audit_goes_on_after_a_torn_line(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "run.jsonl"
    audit = Audit(path, {"policy": "cosine"})
    for step in range(3):
        audit.write("decision", step=step)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    torn = len(content.splitlines(keepends=True)[-1]) - cut if cut > 1 else 0
    assert verify_audit(path).torn == torn
    audit = Audit(path, {"policy": "cosine", "torch": "9"})
    assert path.read_bytes() == content[: len(content) - cut], "nothing is written before there is something to say"
    audit.write("resumed", step=1, time="now")
    audit.write("decision", step=2)
    assert verify_audit(path).holds
    entries = read_audit(path)
    assert [entry.get("step") for entry in entries] == [None, 0, 1, *([2] if cut < 2 else []), 1, 2]
    resumed = next(entry for entry in entries if entry["kind"] == "resumed")
    assert resumed["torn"] == torn and resumed["differs"] == {"torch": "9"}
