"""The command line on files of every kind: no hang, no traceback, and nothing that steers the terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.policies.audits import SHORT, decision, outcome, write
from tests.policies.made_up import learned
from trimtab import cli
from trimtab.envs import config
from trimtab.policies import audit_chain
from trimtab.policies.bundle import save_bundle
from trimtab.policies.manifest import MANIFEST, seal
from trimtab.printing import printable

EVIL = "\x1b[2J\nINJECTED \u202egnp.exe\x9b1m\r\u2028"
SHOWN = "\\x1b[2J\\nINJECTED \\u202egnp.exe\\x9b1m\\r\\u2028"


def run(*argv: str | bytes, env: dict[str, str] | None = None, shell: str = "") -> subprocess.CompletedProcess[bytes]:
    """The command line as its own process, which may take 30 s."""
    command: list[str | bytes] = [sys.executable, "-m", "trimtab", *argv]
    if shell:
        command = ["bash", "-c", f'exec "$@" {shell}', "bash", *command]
    return subprocess.run(command, capture_output=True, env={**os.environ, **(env or {})}, timeout=30, check=False)


def altered(folder: Path, **changes: Any) -> Path:
    """A bundle with other fields in its manifest, and the right hash."""
    bundle = save_bundle(learned(), folder)
    content = json.loads((bundle / MANIFEST).read_bytes())
    (bundle / MANIFEST).write_bytes(seal({**content, **changes}))
    return bundle


# --- words --------------------------------------------------------------------------------------------------------


def test_every_character_can_be_seen() -> None:
    assert printable(EVIL) == SHOWN and printable("caf\u00e9 \U0001f600 \\") == "caf\u00e9 \U0001f600 \\"
    for code in [*range(0x32), 0x7F, *range(0x80, 0xA0), 0x61C, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]:
        assert printable(f"a{chr(code)}b").isprintable()
    assert printable("\ud800").encode() == rb"\ud800"


def test_the_words_of_a_bundle_are_shown_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"scenario": EVIL, "families": [EVIL], "command": EVIL, "versions": {EVIL: EVIL}, "settings": {EVIL: EVIL}}
    bundle = altered(tmp_path / "b", name=EVIL, provenance=words, results={EVIL: EVIL})
    assert cli.main(["inspect", str(bundle)]) == 0
    told = capsys.readouterr().out
    assert told.count(SHOWN) == 10 and all(line.isprintable() for line in told.split("\n"))
    assert not any(line.startswith("INJECTED") for line in told.splitlines())


@pytest.mark.parametrize("command", ["inspect", "check"])
def test_names_of_files_and_errors_are_shown_escaped(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = save_bundle(learned(), tmp_path / "\x1b]0;title\x07\udcfc")
    assert cli.main([command, str(bundle)]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))
    (bundle / MANIFEST).unlink()
    assert cli.main([command, str(bundle)]) == 2
    told = capsys.readouterr().err
    assert told[:-1].isprintable() and "\\x1b]0;title\\x07" in told


def test_the_words_of_audits_are_shown_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    falls, rises = ([outcome(10 * n, sign * (0.1 + n / 100), cause=EVIL, changed={EVIL: [1.0, 0.5]}) for n in range(2, 14)]
                    for sign in (-1, 1))  # fmt: skip
    a = write(tmp_path / "a\x1b.jsonl", falls, policy=EVIL, data=EVIL)
    b = write(tmp_path / "b.jsonl", rises, policy=EVIL, data=EVIL)
    out = tmp_path / "r.html"
    assert cli.main(["report", str(a), "--against", str(b), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert all(line.isprintable() for line in told.split("\n"))
    assert f"{SHOWN} down, large, by {SHOWN}: helped in a, hurt in b" in told


HALF = [
    ({"results": {"note": "\ud800"}}, "results.note"),
    ({"provenance": {"scenario": "\udfff"}}, "provenance.scenario"),
    ({"provenance": {"families": ["a", "\ud800"]}}, "provenance.families.1"),
    ({"provenance": {"settings": {"k": "\ud800"}}}, "provenance.settings.k"),
    ({"name": "\ud800"}, "name"),
]


@pytest.mark.parametrize(("changes", "field"), HALF, ids=[field for _, field in HALF])
@pytest.mark.parametrize("command", ["inspect", "check"])
def test_half_a_character_in_a_manifest_is_refused_by_field(
    tmp_path: Path, command: str, changes: dict[str, Any], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, str(altered(tmp_path / "b", **changes))]) == 2
    told = capsys.readouterr().err
    assert f"{MANIFEST}: {field}: " in told and told.count("\n") == 1


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
                         ids=["ascii", "C"])  # fmt: skip
def test_a_terminal_of_ascii_can_be_written_to(tmp_path: Path, env: dict[str, str]) -> None:
    bundle = altered(tmp_path / "b", name="caf\u00e9")
    done = run("inspect", str(bundle), env=env)
    assert (done.returncode, done.stderr) == (0, b"") and rb"caf\xe9" in done.stdout


def test_an_audit_with_half_characters_in_names_and_words_can_be_drawn(tmp_path: Path) -> None:
    lines = [decision(10, -0.5, reason="\ud800", guard="\ud800"), outcome(20, -0.1, cause="\ud800")]
    audit = write(tmp_path / os.fsdecode(b"x\xfc.jsonl"), lines, policy="\udcfc", data="\ud800")
    out = tmp_path / "r.html"
    done = run("report", os.fsencode(audit), "--against", os.fsencode(audit), "--out", str(out))
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"x\udcfc.jsonl: the chain holds" in done.stdout
    page = out.read_text(encoding="utf-8")
    assert r"<h1>x\udcfc.jsonl</h1>" in page and r"Policy \udcfc" in page


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        ("check X.yaml", "pipe"),
        ("check X.yaml", "endless"),
        ("report X.yaml --out o", "pipe"),
        ("report a.jsonl --against X.yaml --out o", "endless"),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str, argv: str) -> None:
    write(tmp_path / "a.jsonl", SHORT)
    odd = tmp_path / "X.yaml"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to("/dev/zero")
    words = [str(tmp_path / word) if word in ("X.yaml", "a.jsonl", "o") else word for word in argv.split()]
    done = run(*words, shell="< /dev/null")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"not a regular file" in done.stderr and not (tmp_path / "o").exists()


@pytest.mark.parametrize(("module", "argv", "cap"), [(config, ["check"], "1,048,576"), (audit_chain, ["report"], "64")])
def test_files_above_their_caps_are_refused_and_the_cap_is_named(
    tmp_path: Path, module: Any, argv: list[str], cap: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (1 << 20))
    if argv == ["check"]:
        assert cli.main(["check", str(large)]) == 2
        assert "is empty" in capsys.readouterr().err
    else:
        monkeypatch.setattr(module, "MOST_BYTES", 64)
        argv = [*argv, "--out", str(tmp_path / "r.html")]
    large.write_bytes(b"#" * ((1 << 20) + 1))
    assert cli.main([*argv, str(large)]) == 2
    assert f"it is larger than the {cap} bytes that are allowed" in capsys.readouterr().err


def test_a_report_is_not_written_into_a_pipe_and_not_in_place_of_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = str(write(tmp_path / "a.jsonl", SHORT))
    os.mkfifo(tmp_path / "pipe")
    assert run("report", audit, "--out", str(tmp_path / "pipe")).stderr.endswith(
        b"is not a regular file; give a new file\n"
    )
    link, page = tmp_path / "link.html", tmp_path / "page.html"
    link.symlink_to(page)
    assert cli.main(["report", audit, "--out", str(link)]) == 2
    assert "is a link that leads to no file" in capsys.readouterr().err
    assert link.is_symlink() and not page.exists()
    assert cli.main(["report", audit, "--out", str(page)]) == 0
    page.write_bytes(page.read_bytes() + b"older")
    assert cli.main(["report", audit, "--out", str(link)]) == 0
    assert link.is_symlink() and not page.read_bytes().endswith(b"older"), (
        "an earlier report is replaced behind the link"
    )


@pytest.mark.parametrize(
    ("argv", "shell"),
    [
        (["list", "rules"], ">&-"),
        (["report", "a.jsonl", "--out", "r.html"], ">&-"),
        (["report", "a.jsonl", "--out", "r.html"], ">&- 2>&-"),
        (["report", "a.jsonl", "--out", "r.html"], "> /dev/full"),
    ],
)
def test_without_output_there_is_no_traceback(tmp_path: Path, argv: list[str], shell: str) -> None:
    write(tmp_path / "a.jsonl", SHORT)
    done = run(*(str(tmp_path / word) if "." in word else word for word in argv), shell=shell)
    full = b"trimtab: No space left on device\n"
    assert (done.returncode, done.stderr) == ((2, full) if "full" in shell else (0, b""))
