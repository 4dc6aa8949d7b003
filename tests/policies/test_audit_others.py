"""An audit beside other writers, other folders and odd paths: nothing that somebody else wrote is lost."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.policies.live import Loop, Scripted, sgd

from trimtab.errors import UserError
from trimtab.policies import audit as writing
from trimtab.policies.attach import attach
from trimtab.policies.audit import Audit, AuditFile, read_audit, verify_audit


def audited(path: Any, policy: Scripted | None = None) -> Loop:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=policy or Scripted([[0.5]]), audit=path)
    return loop


TORN = b'{"kind": "dec'


def test_of_two_runs_that_resume_a_torn_audit_the_second_deletes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.jsonl"
    audited(path).run(10)
    with path.open("ab") as file:
        file.write(TORN)
    first, second = audited(path), audited(path)
    first.run(20)
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        second.run(20)
    assert path.read_bytes() == before and TORN + b"{" not in before
    assert "was changed by someone else, and is left alone" in caplog.text
    verdict = verify_audit(path)
    assert verdict.holds and verdict.torn == 0
    assert [line["torn"] for line in read_audit(path) if line["kind"] == "resumed"] == [len(TORN)]


@pytest.mark.parametrize("behind", [TORN[:-1] + b"x", TORN + b"x", b"somebody's whole line\n"])
def test_what_is_not_the_torn_line_is_not_cut_off(tmp_path: Path, behind: bytes) -> None:
    path = tmp_path / "run.jsonl"
    Audit(path, {"policy": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + TORN)
    audit = Audit(path, {"policy": "a"})
    path.write_bytes(whole + behind)
    for _ in range(2):
        with pytest.raises(UserError, match="was changed by someone else"):
            audit.write("resumed", step=1, time="")
    assert path.read_bytes() == whole + behind
    path.write_bytes(whole)  # and who cuts it off himself is welcome
    audit.write("detached", step=2, time="")
    assert [line["kind"] for line in read_audit(path)] == ["header", "lost", "detached"]


@pytest.mark.parametrize("others", [b"", b"mine\n"])
def test_after_a_full_disk_only_the_own_half_line_is_cut_off(
    tmp_path: Path, others: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "run.jsonl", os.write
    audit = Audit(path, {"policy": "a"})
    whole = path.read_bytes()

    def full(file: int, content: bytes) -> int:
        if len(content) <= 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, content[:20])

    with monkeypatch.context() as patched:
        patched.setattr(writing.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            audit.write("resumed", step=1, time="")
    half = path.read_bytes()
    assert len(whole) < len(half) and half.startswith(whole)
    with path.open("ab") as file:
        file.write(others)
    if others:
        with pytest.raises(UserError, match="was changed by someone else"):
            audit.write("detached", step=2, time="")
        assert path.read_bytes() == half + others
    else:
        audit.write("detached", step=2, time="")
        assert verify_audit(path).closed
        assert [line["kind"] for line in read_audit(path)] == ["header", "lost", "detached"]


def test_an_audit_stays_where_it_is_when_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loop = audited("run.jsonl").run(10)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loop.run(10)
    assert loop.controller is not None
    loop.controller.detach()
    assert verify_audit(tmp_path / "run.jsonl").closed and list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("path", [b"x", None, 3, "\0", Path("a\0b"), ["x"]], ids=repr)
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(UserError, match="the path of an audit is .*; it must be a text without null characters"):
        AuditFile(path)


@pytest.mark.parametrize("path", ["a\0b", "\ud800.jsonl"], ids=ascii)
def test_a_path_that_no_file_can_have_leaves_the_optimizer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    loop = Loop(sgd)
    with pytest.raises(UserError):
        attach(loop.optimizer, policy=Scripted([[0.5]]), audit=path)
    assert not loop.optimizer._optimizer_step_pre_hooks and list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot be read"):
        verify_audit(path)


def test_a_header_that_cannot_be_written_leaves_no_empty_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Audit(tmp_path / "run.jsonl", {"policy": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["data", "project"])
def test_labels_that_no_encoding_can_write_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} of an audit is 'a\\udcfc', which holds half a character") as caught:
        AuditFile("run.jsonl", **{name: "a\udcfc"})  # type: ignore[arg-type]
    assert str(caught.value).isascii()
    assert getattr(AuditFile("run.jsonl", **{name: "a\U0001f600"}), name) == "a\U0001f600"  # type: ignore[arg-type]


class Spoiling(Scripted):
    """Writes over what it was shown."""

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        answer = super().act(observations, state)
        observations[:] = 7.0
        return answer


def test_a_policy_that_writes_over_its_observation_changes_the_audit_in_nothing(tmp_path: Path) -> None:
    table, signals = [[1.0], [0.5], [0.25]], ("time", "started", "loss_slope")
    for name, kind in (("plain", Scripted), ("spoiling", Spoiling)):
        audited(tmp_path / name, kind(table, signals=signals, name="scripted")).run(20)
    plain, spoiled = (
        [line["signals"] for line in read_audit(tmp_path / name) if line["kind"] == "decision"]
        for name in ("plain", "spoiling")
    )
    assert plain == spoiled and len(plain) == 5 and plain[-1]["started"] == 1.0
