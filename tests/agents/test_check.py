"""`trimtab check` says what it verified, and finds every defect."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.policies.made_up import learned
from trimtab.agents.check import run_check
from trimtab.errors import BundleError, ConfigError, MismatchError, UserError
from trimtab.policies.bundle import save_bundle
from trimtab.policies.manifest import MANIFEST, ONNX, WEIGHTS, seal


def test_a_whole_bundle(tmp_path: Path) -> None:
    folder = save_bundle(learned(lstm=(6,)), tmp_path / "b", onnx=b"graph")
    said = run_check(folder)
    assert said == run_check(folder / MANIFEST)
    first, *lines = said.splitlines()
    assert first == f"{folder}: the bundle is whole"
    for part in (f"{MANIFEST}, {ONNX}, {WEIGHTS}: regular files", "format version 2", "7 and 2, as this version knows",
                 "9 tensors", f"{learned(lstm=(6,)).parameters:,} finite", "8 decisions replayed, off by at most 1e-05",
                 "the graph was not run"):  # fmt: skip
        assert sum(part in line for line in lines) == 1, part
    assert "the graph" not in run_check(save_bundle(learned(), tmp_path / "plain"))


def test_every_defect_of_a_bundle(tmp_path: Path) -> None:
    folder = save_bundle(learned(), tmp_path / "b")
    content = json.loads((folder / MANIFEST).read_bytes())
    content["golden"]["actions"][0] = [0.5, -0.5]
    (folder / MANIFEST).write_bytes(json.dumps(content).encode())  # neither canonical, nor with the right hash
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4] + bytes(4))
    (folder / "notes.txt").touch()
    (folder / ONNX).touch()
    with pytest.raises(BundleError, match="has 6 defects: ") as caught:
        run_check(folder)
    said = str(caught.value)
    assert said.count(str(folder)) == 1
    for number, words in enumerate(("it holds 'notes.txt'", "policy.json: sha256 does not agree", "not in canonical form",
                                    "weights.safetensors: its SHA-256 is not", "policy.onnx: it is not among files",
                                    "policy.json: golden: the replayed actions are off"), start=1):  # fmt: skip
        assert words in said[said.index(f"({number})") :]


def test_every_field_and_tensor_that_is_wrong(tmp_path: Path) -> None:
    folder = save_bundle(learned(), tmp_path / "b")
    good = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(seal({**good, "decide_every": 0, "action_kind": "x", "extra": 1}))
    with pytest.raises(BundleError, match="3 defects: .*decide_every: .*action_kind: .*extra: "):
        run_check(folder)
    names = {**good, "signals": ["progres", "startd", *good["signals"][2:]]}
    (folder / MANIFEST).write_bytes(seal(names))
    with pytest.raises(BundleError, match="2 defects: .*unknown signal 'progres'.*unknown signal 'startd'"):
        run_check(folder)
    other = save_bundle(learned(hidden=(17, 17)), tmp_path / "other")
    weights = (other / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights)
    (folder / MANIFEST).write_bytes(seal({**good, "files": {WEIGHTS: hashlib.sha256(weights).hexdigest()}}))
    with pytest.raises(
        BundleError, match="5 defects: .*layers.0.bias.*layers.0.weight.*layers.1.bias.*layers.2.weight"
    ):
        run_check(folder)


def test_one_defect_is_the_error_of_loading(tmp_path: Path) -> None:
    folder = save_bundle(learned(), tmp_path / "b")
    content = json.loads((folder / MANIFEST).read_bytes())
    content["levers"][0]["rate"] = 9.0
    (folder / MANIFEST).write_bytes(seal(content))
    with pytest.raises(MismatchError, match="policy.json: levers: the rate of 'lr' was 9 in training"):
        run_check(folder)


def test_a_valid_scenario(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("id: own\nfamilies: [tabular-mlp, regression]\nlevers: [lr]\n")
    first, *lines = run_check(tmp_path / "own.yaml").splitlines()
    assert first == f"{tmp_path / 'own.yaml'}: the scenario is valid, and its runs can be made"
    assert any("signals, 1 levers" in line for line in lines)
    assert any("tabular-mlp, regression: a run of each was made" in line for line in lines)


def test_every_defect_of_a_scenario(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("id: own\nfamilies: [tabular-mlp]\ninterval: 0\nval_examples: many\nlever: [lr]\n")
    with pytest.raises(ConfigError, match="own.yaml has 3 defects: ") as caught:
        run_check(path)
    assert all(part in str(caught.value) for part in ("interval is 0", "val_examples is 'many'", "unknown key 'lever'"))
    path.write_text("id: own\nfamilies: ['nowhere:make', 'tests.agents.test_check:broken', tabular-mlp]\n")
    with pytest.raises(ConfigError, match="2 defects: .*nowhere.*broken"):
        run_check(path)
    path.write_text("id: own\nfamilies: ['nowhere:make']\n")
    with pytest.raises(UserError, match="^(?!.*defects).*nowhere"):
        run_check(path)


def broken() -> None:
    raise KeyError("inside")
