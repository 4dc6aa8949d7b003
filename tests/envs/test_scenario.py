"""Scenarios: what they accept, what they refuse and how they say it, and YAML there and back."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from trimtab.envs.catalogue import SCENARIOS
from trimtab.envs.names import gymnasium_id, scenarios
from trimtab.envs.parts import GuardSettings
from trimtab.envs.rewards import TERMS
from trimtab.envs.scenario import Scenario, default_signals, load_scenario
from trimtab.errors import ConfigError, UnknownNameError
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.signals import all_signals

WHOLE = {"id": "mine", "families": ["digits-mlp"]}


def test_light_names_are_those_of_the_catalogue() -> None:
    assert scenarios() == tuple(SCENARIOS)
    assert [gymnasium_id(name) for name in ("digits-mlp-deep", "mlp-mix")] == [
        "trimtab/DigitsMlpDeep-v0",
        "trimtab/MlpMix-v0",
    ]


@pytest.mark.parametrize("name", scenarios())
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(SCENARIOS[name].to_yaml())
    assert load_scenario(path) == SCENARIOS[name]
    assert load_scenario(str(path)) == SCENARIOS[name]


def test_yaml_round_trip_of_changed_values(tmp_path: Path) -> None:
    changed = SCENARIOS["mlp-mix"].replace(
        doc="a doc: with 'marks' and ümlauts",
        levers=["lr", "grad_clip"],
        signals=["progress", "lr_position"],
        interval=25,
        missing={"progress": 1e-4},
        guard={"rollback": False, "explosion": 3},
        reward={"terminal": 2, "progress": 0},
        action="multi-discrete",
    )
    path = tmp_path / "scenario.yml"
    path.write_text(changed.to_yaml(), encoding="utf-8")
    assert load_scenario(path) == changed
    assert changed.reward == {"progress": 0, "trajectory": 0.1, "instability": 0.1, "cost": 0, "terminal": 2}


def test_yaml_reads_numbers_without_a_point(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text("id: mine\nfamilies: [digits-mlp]\nmissing: {progress: 1e-1}\n")
    assert load_scenario(path).missing.progress == 0.1


def test_defaults() -> None:
    scenario = Scenario.of(WHOLE)
    observed = [name for name, one in all_signals().items() if one.group != "scale" and one.default]
    assert scenario.signals == tuple(observed)
    assert {"log_parameters", "log_batch"}.isdisjoint(scenario.signals)
    assert scenario.families[0].share == 1
    assert Scenario.of({**WHOLE, "levers": ["lr"]}).signals == default_signals(["lr"])
    assert "momentum_position" not in default_signals(["lr"])
    with pytest.raises(ValidationError):
        scenario.interval = 5


def test_guard_settings_are_those_of_the_guard() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(GuardConfig)}
    assert GuardSettings().model_dump() == fields
    assert GuardSettings(backoff=0.5).config() == GuardConfig(backoff=0.5)


def test_bounds_of_levers_are_read_written_and_refused() -> None:
    given = {"bounds": {"lr": [0.1, 3], "momentum": [0.5, 1.0]}}
    scenario = Scenario.of({**WHOLE, "guard": given})
    assert scenario.guard.config() == GuardConfig(bounds={"lr": (0.1, 3.0), "momentum": (0.5, 1.0)})
    assert yaml.safe_load(scenario.to_yaml())["guard"]["bounds"] == given["bounds"]
    assert Scenario.of(yaml.safe_load(scenario.to_yaml())) == scenario == scenario.replace(interval=scenario.interval)
    assert scenario.replace(guard=dataclasses.asdict(scenario.guard.config())) == scenario
    with pytest.raises(ConfigError, match=r"guard.bounds: bounds of the lever 'lr' are \[2, 3\], which leaves out 1"):
        Scenario.of({**WHOLE, "guard": {"bounds": {"lr": [2, 3]}}})
    with pytest.raises(ConfigError, match="guard.bounds: unknown lever 'rate'"):
        Scenario.of({**WHOLE, "guard": {"bounds": {"rate": [0.5, 3]}}})


def test_extends() -> None:
    scenario = Scenario.of({"extends": "mlp-mix", "id": "mine", "levers": ["lr"], "missing": {"validation": 1}})
    assert scenario.families == SCENARIOS["mlp-mix"].families
    assert scenario.signals == default_signals(["lr"])
    assert (scenario.missing.progress, scenario.missing.validation) == (0.2, 1)
    with pytest.raises(ConfigError, match="id is missing"):
        Scenario.of({"extends": "mlp-mix"})


def test_a_scenario_is_its_own_source() -> None:
    assert load_scenario(SCENARIOS["digits-mlp"]) is SCENARIOS["digits-mlp"]


# What is wrong -> words that the message must hold: the key, the value, what is allowed or the nearest match.
MALFORMED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"id": "Mine"}, ("id", "'Mine'", "[a-z]")),
    ({"id": "my_id"}, ("id", "'my_id'", "[a-z]")),
    ({"id": ""}, ("id", "''", "[a-z]")),
    ({"id": "a" * 65}, ("id", "aaa", "at most 64 characters")),
    ({"id": 7}, ("id", "7", "text")),
    ({"doc": ["x"]}, ("doc", "['x']", "text")),
    ({"families": []}, ("families", "[]", "at least 1")),
    ({"families": "digits-mlp"}, ("families", "'digits-mlp'", "a list")),
    ({"families": ["digits-mpl"]}, ("families[0].name", "'digits-mpl'", "did you mean 'digits-mlp'")),
    ({"families": ["digits-mlp", "digits-mlp"]}, ("families", "'digits-mlp'", "once")),
    ({"families": [{"name": "digits-mlp", "share": 0}]}, ("families[0].share", "0", "above 0")),
    ({"families": [{"name": "digits-mlp", "share": -1}]}, ("families[0].share", "-1", "above 0")),
    ({"families": [{"name": "digits-mlp", "shares": 1}]}, ("families[0].shares", "1", "did you mean 'families[0].share'")),
    ({"families": [{"share": 1}]}, ("families[0].name", "missing", "text")),
    ({"families": [3]}, ("families[0]", "3", "name, share")),
    ({"levers": []}, ("levers", "[]", "at least 1")),
    ({"levers": "lr"}, ("levers", "'lr'", "a list")),
    ({"levers": ["lr", "momentun"]}, ("levers", "'momentun'", "did you mean 'momentum'")),
    ({"levers": ["lr", "lr"]}, ("levers", "'lr'", "once")),
    ({"levers": [1]}, ("levers[0]", "1", "text")),
    ({"levers": [["lr"]]}, ("levers[0]", "['lr']", "text")),
    ({"signals": []}, ("signals", "[]", "at least 1")),
    ({"signals": ["loss_slop"]}, ("signals", "'loss_slop'", "did you mean 'loss_slope'")),
    ({"signals": ["spike", "spike"]}, ("signals", "'spike'", "once")),
    ({"levers": ["lr"], "signals": ["momentum_moved"]}, ("signals", "'momentum_moved'", "allowed: progress")),
    ({"interval": 0}, ("interval", "0", "at least 1 and at most 1000")),
    ({"interval": 1001}, ("interval", "1001", "at least 1 and at most 1000")),
    ({"interval": 2.5}, ("interval", "2.5", "a whole number")),
    ({"interval": "10"}, ("interval", "'10'", "a whole number")),
    ({"interval": True}, ("interval", "True", "a whole number")),
    ({"intervall": 10}, ("'intervall'", "10", "did you mean 'interval'")),
    ({"val_examples": 63}, ("val_examples", "63", "at least 64")),
    ({"val_examples": None}, ("val_examples", "None", "a whole number")),
    ({"families": ["npz:a/x.npz", "npz:b/X.npz"]}, ("'npz:a/x.npz'", "'npz:b/X.npz'", "'npz-x'", "rename")),
    ({"missing": 0.2}, ("missing", "0.2", "progress, validation, validation_every_max, measurements")),
    ({"missing": {"progress": 1.01}}, ("missing.progress", "1.01", "at most 1")),
    ({"missing": {"validation": -0.1}}, ("missing.validation", "-0.1", "at least 0")),
    ({"missing": {"validation_every": 3}}, ("missing.validation_every", "3", "did you mean 'missing.validation_every_max'")),
    ({"missing": {"validation_every_max": 0}}, ("missing.validation_every_max", "0", "at least 1")),
    ({"guard": {"backoff": 0}}, ("guard.backoff", "0", "above 0")),
    ({"guard": {"explosion": 1}}, ("guard.explosion", "1", "above 1")),
    ({"guard": {"explosion": float("nan")}}, ("guard.explosion", "nan", "a number")),
    ({"guard": {"rollback": "no"}}, ("guard.rollback", "'no'", "true or false")),
    ({"guard": {"rollback_budget": -1}}, ("guard.rollback_budget", "-1", "at least 0")),
    ({"guard": {"rate_scale": 11}}, ("guard.rate_scale", "11", "at most 10")),
    ({"guard": {"rolback": True}}, ("guard.rolback", "True", "did you mean 'guard.rollback'")),
    ({"structure": {"start": 2}}, ("structure.start", "2", "a number, above 0 and at most 1 or null")),
    ({"structure": {"rest": -1}}, ("structure.rest", "-1", "a whole number, at least 0")),
    ({"structure": {"budgte": 1}}, ("structure.budgte", "1", "did you mean 'structure.budget'")),
    ({"structure": 3}, ("structure", "3", "criterion, reset_criterion, growth", "or null")),
    ({"reward": {"progres": 1}}, ("reward", "'progres'", "did you mean 'progress'")),
    ({"reward": {"divergence": 1}}, ("reward", "'divergence'", "allowed: progress")),
    ({"reward": {"progress": -1}}, ("reward.progress", "-1", "at least 0")),
    ({"reward": {"progress": float("inf")}}, ("reward.progress", "inf", "at most 1000")),
    ({"reward": dict.fromkeys(sorted(TERMS.keys() - {"divergence"}), 0)}, ("reward", "0", "positive weight")),
    ({"reward": [1]}, ("reward", "[1]", "a mapping")),
    ({"action": "discrete"}, ("action", "'discrete'", "one of box, multi-discrete")),
    ({"extends": "mlp-mixx"}, ("'mlp-mixx'", "did you mean 'mlp-mix'")),
    ({3: 1}, ("key 3", "text")),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "words"), MALFORMED, ids=lambda value: str(value)[:60])
def test_malformed_values_are_named(wrong: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        Scenario.of({**WHOLE, **wrong}, "mine.yaml")
    message = str(caught.value)
    assert message.startswith("mine.yaml: ")
    assert "\n" not in message
    for word in words:
        assert word in message


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("- digits-mlp", "holds a list"),
        ("id: [", "not valid YAML: line 1"),
        ("id: mine\nid: yours", "line 2: key 'id' is given twice"),
        (f"id: mine\ninterval: 0x{'f' * 900}", "line 2: a whole number of 3600 bits is too long"),
        (f"id: mine\ninterval: 0x{'f' * 5000}", "line 2: a number of 5002 characters is too long"),
        ("id: mine\ninterval: " + "1:" * 400_000 + "1", "line 2: a number of 800001 characters is too long"),
        ("id: mine\ninterval: " + "1:" * 400_000 + "1.5", "line 2: a number of 800003 characters is too long"),
        ("id: mine\ninterval: " + "1:" * 400 + "1.5", "not valid YAML"),
        (f"{'k' * 500}: 1\n{'k' * 500}: 2", "is given twice"),
        ("id: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("id: " + "[" * 5000, "line 1: lists and mappings are nested more than 32 deep"),
        ("id: " + "{a: " * 200_000, "line 1: lists and mappings are nested more than 32 deep"),
        ("- " * 5000 + "a", "line 1: lists and mappings are nested more than 32 deep"),
        ("\tid: mine", "not valid YAML"),
        ("id: mine\nfamilies: &a [*a]", "line 2: an alias stands inside of what it repeats"),
        ("id: mine\nguard: &a {b: {c: *a}}", "line 2: an alias stands inside of what it repeats"),
        (LAUGHS, "more than 10,000 keys and values, with those that aliases repeat"),
        (MERGES, "more than 10,000 keys and values, with those that aliases repeat"),
        ("families: [" + "a," * 100_000 + "]", "more than 10,000 keys and values"),
    ],
    ids=lambda text: text[:20],
)
def test_malformed_files(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_scenario(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aliases_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "id: mine\nfamilies: &f [digits-mlp]\nlevers: [&l lr]\nsignals: [started]\ndoc: *l\n"
    )
    loaded = load_scenario(tmp_path / "mine.yaml")
    assert loaded.levers == ("lr",) and loaded.doc == "lr"


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(ConfigError, match="it is not a regular file"):
            load_scenario(tmp_path / f"{name}.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than the 1,048,576 bytes"):
        load_scenario(tmp_path / "large.yaml")
    (tmp_path / "gone.yaml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="No such file"):
        load_scenario(tmp_path / "gone.yaml")


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*nothing.yaml.*: No such file"):
        load_scenario(tmp_path / "nothing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_scenario(tmp_path / "bytes.yaml")


def test_unknown_id() -> None:
    with pytest.raises(UnknownNameError, match="unknown scenario 'digits-mpl'; did you mean 'digits-mlp'"):
        load_scenario("digits-mpl")
    with pytest.raises(ConfigError, match="by its id or the path of a YAML file, not as NoneType"):
        load_scenario(None)  # type: ignore[arg-type]
