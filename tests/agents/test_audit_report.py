"""`trimtab report`: what the page must say, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.policies.audits import SHORT, decision, outcome, validation, write
from tests.policies.live import Loop, adamw
from trimtab import cli
from trimtab.agents.audit_page import MARK, MOST_ROWS, to_page
from trimtab.policies.attach import attach
from trimtab.policies.audit import AuditFile
from trimtab.policies.audit_chain import load_trace

FALLS, RISES = [-0.2, -0.3, -0.25, -0.1] * 3, [0.2, 0.3, 0.25, 0.1] * 3


class Page(HTMLParser):
    """Texts of a page by tag, every tag closed, and nothing loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "img")
        assert not {"src", "href", "onclick"} & {name for name, _ in attrs}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)


def drawn(tmp_path: Path, *argv: str) -> tuple[int, str]:
    out = tmp_path / "report.html"
    code = cli.main(["report", *argv, "--out", str(out)])
    return code, out.read_text(encoding="utf-8") if out.exists() else ""


def test_the_page_of_a_live_run_says_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, loop = tmp_path / "run.jsonl", Loop(adamw)
    loop.controller = attach(
        loop.optimizer, model=loop.model, policy="greedy", decide_every=5, audit=AuditFile(path, data="waves")
    )
    for step in range(100):
        loop.step(spoil=float("nan") if step == 62 else None)
        loop.controller.step(loop.losses[-1], 0.5 if step == 41 else None)
    loop.controller.detach()
    code, page = drawn(tmp_path, str(path))
    assert code == 0
    told = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r".*run\.jsonl: the chain holds over all \d+ lines, from the header to the detached controller", told[0]
    )
    assert told[-1] == f"report: {tmp_path / 'report.html'}"
    texts = Page(page).texts
    assert texts["h1"] == ["run.jsonl"]
    assert texts["h2"] == ["What came of the changes", "The guard", "Decisions", "The run", "Columns"]
    assert "rollbacks: 1." in page and "Policy greedy, mode act: 21 decisions over 100 steps" in page
    cells = texts["td"]
    assert any(re.fullmatch(r"lr (up|down), moderate, by policy", cell) for cell in cells)
    assert "the run diverged, so the last stable snapshot was restored" in cells
    assert "validation loss 0.5" in cells and "waves" in cells and "49" in cells
    assert any(re.fullmatch(r"lr x1 to x[\d.]+", cell) for cell in cells)
    assert page.count("<polyline") == 1 and page.count("<h2>") == 5


def test_words_of_an_audit_are_text_and_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    lines = [
        decision(10, -0.5, changed={evil: [1.0, 0.5]}, reason=evil, why=evil, guard=evil, loudest=[evil]),
        outcome(20, 0.1, changed={evil: [1.0, 2.0]}, cause=evil, fired=[evil]),
    ]
    path = write(tmp_path / "a.jsonl", lines, data=evil, policy=evil, policy_options={evil: evil})
    code, page = drawn(tmp_path, str(path), "--against", str(path))
    assert code == 0 and evil not in page
    Page(page)


def test_a_comparison_is_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.jsonl", [outcome(10 * n, change) for n, change in enumerate(FALLS, 2)])
    b = write(tmp_path / "b.jsonl", [outcome(10 * n, change) for n, change in enumerate(RISES, 2)])
    c = write(tmp_path / "c.jsonl", [outcome(10 * n, change, 0.5, 1.0) for n, change in enumerate(RISES, 2)])
    code, page = drawn(tmp_path, str(a), "--against", str(b), str(c))
    found = "lr down, large, by plateau: helped in a, hurt in b"
    assert code == 0 and found in capsys.readouterr().out
    texts = Page(page).texts
    assert f"{found[0].upper()}{found[1:]}." in texts["p"]
    assert "By model size and data" in texts["summary"] and "1M to 10M" in texts["td"]
    assert {"helped", "hurt"} <= set(texts["td"])


def test_a_broken_chain_is_drawn_and_the_verdict_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", SHORT)
    path.write_bytes(path.read_bytes().replace(b'"ln_loss": -0.5,', b'"ln_loss": -0.7,', 1))
    code, page = drawn(tmp_path, str(path))
    told = capsys.readouterr()
    assert code == 1, "a script can tell"
    assert "the chain breaks at line 3 of 11" in told.out and "report: " in told.out
    assert told.err.startswith(f"trimtab: {path}: the chain breaks at line 3 of 11") and told.err.count("\n") == 1
    assert '<p class="bad">The chain breaks at line 3 of 11' in page
    assert "counts for no outcome" in page and "-0.7000" in Page(page).texts["td"]


def test_every_broken_chain_of_a_comparison_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (write(tmp_path / f"{name}.jsonl", SHORT) for name in "abc")
    for path in (b, c):
        path.write_bytes(path.read_bytes().replace(b"-0.5", b"-0.7", 1))
    code, page = drawn(tmp_path, str(a), "--against", str(b), str(c))
    told = capsys.readouterr()
    assert code == 1 and page and told.err.count("\n") == 1 and told.err.count("the chain breaks") == 2
    assert str(a) not in told.err and f"{b}: " in told.err and f"; {c}: " in told.err


def test_a_torn_last_line_is_no_broken_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", SHORT)
    path.write_bytes(path.read_bytes()[:-30])
    code, page = drawn(tmp_path, str(path))
    told = capsys.readouterr()
    assert code == 0 and told.err == "" and "a torn last line of" in told.out and page


def test_decisions_that_a_resumed_run_repeats_have_their_own_outcomes(tmp_path: Path) -> None:
    moved = {"changed": {"lr": [1.0, 0.5]}}
    resumed = {"kind": "resumed", "step": 5, "time": "", "torn": 0, "differs": {}}
    lines = [decision(10, -0.5, **moved), outcome(20, 0.111), resumed, decision(10, -0.4, **moved), outcome(20, 0.222)]
    cells = Page(to_page(load_trace(write(tmp_path / "a.jsonl", lines)))).texts["td"]
    assert cells.index("-0.5000") < cells.index("+0.1110") < cells.index("-0.4000") < cells.index("+0.2220")


def test_a_torn_line_and_lines_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", SHORT)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        b"".join([*whole[:4], b"junk\n", b'{"kind": "decision", "step": "x"}\n', *whole[4:-1], whole[-1][:30]])
    )
    code, page = drawn(tmp_path, str(path))
    assert code == 1, "the chain holds no further than the junk"
    assert "a torn last line of 30 bytes is left out" in page and "2 lines cannot be read and are left out." in page
    assert "Resumed at step 20." in page and "2 lines could not be written at the time." in page


def test_an_audit_of_one_line_can_be_shown(tmp_path: Path) -> None:
    code, page = drawn(tmp_path, str(write(tmp_path / "a.jsonl", [])))
    assert code == 0
    assert "0 decisions over 0 steps" in page and "Nothing was changed" in page and "<svg" not in page
    Page(page)


def test_extreme_losses_can_be_drawn(tmp_path: Path) -> None:
    lines = [
        decision(10, -800.0),
        decision(20, "nan"),
        decision(30, 900.0),
        validation(30, None, "nan"),
        decision(30, 1.0),
    ]
    code, page = drawn(tmp_path, str(write(tmp_path / "a.jsonl", [*lines, decision(20, 2.0)])))
    assert code == 0 and "nan" not in page.partition("<h2>Decisions")[0]


def test_a_long_audit_stays_a_short_page(tmp_path: Path) -> None:
    lines = [decision(10 * n, -n / 1e4, changed={"lr": [1.0, 0.9]}) for n in range(MOST_ROWS + 40)]
    quiet = [decision(10 * (MOST_ROWS + 40 + n), -1.0) for n in range(300)]
    page = to_page(load_trace(write(tmp_path / "a.jsonl", [*lines, *quiet])))
    assert "The first 41 rows of this table are left out." in page
    assert "300 decisions that changed nothing" in page and len(page) < 400_000


REFUSED = {
    "no such file": (None, "cannot be read: No such file or directory"),
    "empty": (b"", "is empty; give the file that attach(audit=...) wrote"),
    "results": (b'{"runs": 3, "results": []}\n', "is not an audit: it does not begin with a whole header line"),
    "torn": (b'{"kind": "header", "form', "is not an audit"),
    "future": (
        b'{"kind": "header", "format": 9, "trimtab": "8.0"}\n',
        "is of format 9, and this version of trimtab reads",
    ),
}


@pytest.mark.parametrize("against", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_is_one_line_and_code_2(
    tmp_path: Path, name: str, against: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = REFUSED[name]
    path = tmp_path / "odd.jsonl"
    if content is not None:
        path.write_bytes(content)
    good = write(tmp_path / "good.jsonl", SHORT)
    argv = [str(good), "--against", str(path)] if against else [str(path)]
    assert drawn(tmp_path, *argv) == (2, "")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("trimtab: ") and message in captured.err


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", SHORT)
    before = path.read_bytes()
    for out, message in ((path, "exists and is no earlier report"), (tmp_path, "is a folder; give a file")):
        assert cli.main(["report", str(path), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert path.read_bytes() == before
    assert drawn(tmp_path, str(path))[0] == drawn(tmp_path, str(path))[0] == 0
    assert MARK in (tmp_path / "report.html").read_text()


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    path, out = write(tmp_path / "a.jsonl", SHORT), tmp_path / "r.html"
    code = (
        "import sys\nfrom trimtab.cli import main\n"
        f"assert main(['report', {str(path)!r}, '--out', {str(out)!r}]) == 0\n"
        "assert not {'torch', 'gymnasium', 'stable_baselines3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert out.exists()
