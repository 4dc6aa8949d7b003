"""The benchmark: who competes, what is summarised, what is written, and what is refused before anything is computed."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.agents.tiny import TINY, TWO
from tests.policies.made_up import learned
from trimtab import cli
from trimtab.agents import benchmark, files
from trimtab.agents.benchmark import print_table, run_bench
from trimtab.agents.conditions import Conditions
from trimtab.agents.contestants import (
    GRID,
    POINTS,
    Competition,
    Contestant,
    _picked,
    count_evaluations,
    make_contestants,
)
from trimtab.agents.evaluate import Evaluator
from trimtab.agents.evaluation import Evaluation
from trimtab.agents.files import write_atomically
from trimtab.agents.report_page import COLUMNS, draw_figure, to_html
from trimtab.agents.results import Entry, ScenarioResult, summarise, to_csv, to_json
from trimtab.agents.statistics import holm, iqm, sign_flip_test
from trimtab.envs.scenario import load_scenario
from trimtab.errors import BundleError, ConfigError, MismatchError, OutputExistsError, UnknownNameError, UserError
from trimtab.policies.bundle import save_bundle
from trimtab.policies.names import rules
from trimtab.policies.registry import load_policy

RUNS = 6


# --- a whole benchmark, once ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("bench")
    save_bundle(learned(), folder / "bundle")
    (folder / "tiny.yaml").write_text(TINY.to_yaml())
    (folder / "two.yaml").write_text(TWO.to_yaml())
    policies = ["constant", str(folder / "bundle"), "greedy", "cosine@tuned", "cosine@oracle"]
    scenarios = [str(folder / "tiny.yaml"), str(folder / "two.yaml")]
    options: dict[str, Any] = {"runs": RUNS, "seed": 2, "mode": "eager"}
    found = run_bench(policies, scenarios, **options, out=folder / "out")
    document = json.loads((folder / "out" / "results.json").read_text())
    with (folder / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return SimpleNamespace(
        folder=folder, out=folder / "out", found=found, document=document, rows=rows, policies=policies, options=options
    )


def test_json_holds_every_run_and_every_aggregate(bench: SimpleNamespace) -> None:
    assert bench.document["schema"] == 1 and bench.document["seed"] == 2 and bench.document["runs"] == RUNS
    assert set(bench.document["versions"]) == {"python", "trimtab", "torch", "gymnasium", "stable-baselines3", "numpy"}
    assert list(bench.document["scenarios"]) == ["tiny", "tiny-two"]
    for result in bench.found:
        held = bench.document["scenarios"][result.scenario]
        assert held["reference"] == "made-up" and held["target"]["policy"] in held["policies"]
        assert list(held["policies"]) == ["constant", "made-up", "greedy", "cosine@tuned", "cosine@oracle"]
        for entry in result.entries:
            stored = held["policies"][entry.label]
            evaluation = entry.evaluation
            for name, values in {**evaluation.columns(), "curve": evaluation.curve}.items():
                given = np.array(stored["runs"][name], dtype=np.float64)  # null becomes NaN
                np.testing.assert_allclose(given, values, rtol=1e-8, err_msg=name)
            assert stored["summary"]["final"][0] == iqm(evaluation.final_loss)
            assert stored["profile"][-1] == 1.0 and len(stored["profile"]) == len(held["profile_thresholds"])
            assert held["instances"]["keys"] == list(evaluation.keys)


def test_the_command_in_the_file_parses_to_the_same_run(bench: SimpleNamespace, monkeypatch: Any) -> None:
    words = shlex.split(bench.document["command"])
    calls: list[Any] = []
    monkeypatch.setattr(benchmark, "run_bench", lambda *args, **options: calls.append((args, options)))
    assert words[0] == "trimtab" and cli.main(words[1:]) == 0
    (args, options) = calls[0]
    assert args[0] == bench.policies and len(args[1]) == 2
    assert options == {**bench.options, "device": "cpu", "out": bench.out, "tuned": False}


def test_csv_has_one_row_for_each_policy_scenario_and_run(bench: SimpleNamespace) -> None:
    found = {(row["scenario"], row["policy"], int(row["run"])): row for row in bench.rows}
    assert len(found) == len(bench.rows) == 2 * 5 * RUNS
    for result in bench.found:
        for entry in result.entries:
            for run in range(RUNS):
                row = found[result.scenario, entry.label, run]
                assert float(row["final_loss"]) == pytest.approx(entry.evaluation.final_loss[run], rel=1e-8)
                assert row["instance"] == entry.evaluation.keys[run] and row["setting"] == entry.setting


def test_the_page_is_whole_by_itself(bench: SimpleNamespace) -> None:
    page = (bench.out / "report.html").read_text()
    assert page.count("<table>") == 4 and page.count("<tr") == 4 * (1 + 5)  # losses and further measures, twice
    assert 'src="data:image/png;base64,' in page and not re.search(r'(src|href)="(?!data:)', page)
    assert (bench.out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in bench.out.iterdir()) == [
        "figure.png",
        "report.html",
        "results.csv",
        "results.json",
    ]
    assert "trained on 400,000 inner steps" in page


def test_the_same_arguments_give_the_same_numbers(bench: SimpleNamespace, tmp_path: Path) -> None:
    policies = ["cosine@tuned", bench.policies[1], "constant"]
    again = run_bench(policies, [bench.folder / "tiny.yaml"], **bench.options, out=tmp_path / "again")
    # Neither the company nor the order of policies changes what is found about one of them.
    for label in ("cosine@tuned", "made-up", "constant"):
        one, two = (next(e for e in found.entries if e.label == label) for found in (bench.found[0], again[0]))
        assert (one.evaluation.final_loss == two.evaluation.final_loss).all()
        one, two = (next(row for row in found.summaries if row.label == label) for found in (bench.found[0], again[0]))
        assert (one.final, one.difference, one.better) == (two.final, two.difference, two.better)


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_the_terminal(bench: SimpleNamespace, width: int) -> None:
    file = io.StringIO()
    print_table(bench.found[0], Console(width=width, file=file))
    text = file.getvalue()
    lines = text.splitlines()
    assert "…" not in text and lines[0].strip() == "tiny"
    names = list(COLUMNS) if width == 200 else ["policy", "final loss", "minus reference", "better", "diverged"]
    assert re.split(r"\s{2,}", lines[1].strip()) == names
    order = [line.split()[0] for line in lines[2:7]]
    assert order == [row.label for row in bench.found[0].summaries]


# --- contestants ------------------------------------------------------------------------------------------------


def test_tuned_takes_the_best_of_the_grid_on_training_instances() -> None:
    evaluator = Evaluator(TINY, runs=8, seed=1, mode="eager")
    tuned, oracle = make_contestants(["constant@tuned", "constant@oracle"], TINY)
    ticks: list[int] = []
    evaluator.tick = ticks.append
    competition = Competition(evaluator)
    entry, best = competition.play(tuned), competition.play(oracle)
    assert sum(ticks) == 8 * count_evaluations([tuned, oracle]) == 8 * 2 * POINTS

    def played(held_out: bool, point: int) -> Evaluation:
        rates = {kind: float(values[point]) for kind, values in GRID.items()}
        conditions = Conditions(held_out=held_out, learning_rates=rates, base_schedule="constant")
        return evaluator.play(load_policy("constant"), conditions)

    training = [played(False, point).final_validation_loss for point in range(POINTS)]
    adaptive = evaluator.adaptive(held_out=False)
    points = {
        "sgd": int(np.argmin([np.mean(one[~adaptive]) for one in training])),
        "adaptive": int(np.argmin([np.mean(one[adaptive]) for one in training])),
    }
    assert entry.tuning["chosen"] == {kind: GRID[kind][point] for kind, point in points.items()}
    assert entry.tuning["tuning_runs"] == best.tuning["tuning_runs"] == 8 * POINTS
    grid = [played(True, point) for point in range(POINTS)]
    for run, is_adaptive in enumerate(evaluator.adaptive()):
        kind = "adaptive" if is_adaptive else "sgd"
        assert entry.evaluation.learning_rates[run] == GRID[kind][points[kind]]
        assert entry.evaluation.final_loss[run] == grid[points[kind]].final_loss[run]
        choice = int(np.argmin([one.final_validation_loss[run] for one in grid]))
        assert best.evaluation.final_loss[run] == grid[choice].final_loss[run]
        assert best.evaluation.learning_rates[run] == GRID[kind][choice]
    assert (best.evaluation.final_validation_loss <= entry.evaluation.final_validation_loss).all()


def test_the_flag_adds_the_tuned_rules_once() -> None:
    labels = [one.label for one in make_contestants(["cosine@tuned", "wsd", "wsd"], TINY, tuned=True)]
    assert labels == ["cosine@tuned", "wsd", "constant@tuned", "constant@oracle", "cosine@oracle"]


def test_policies_of_one_name_are_called_by_their_places(tmp_path: Path) -> None:
    places = [str(tmp_path / name) for name in ("a", "b")]
    for place in places:
        save_bundle(learned(), Path(place))
    contestants = make_contestants([*places, "constant"], TINY)
    assert [one.label for one in contestants] == [*places, "constant"]
    assert [one.learned for one in contestants] == [True, True, False]


def test_the_policy_that_comes_along_is_called_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_bundle(learned(), tmp_path / "shipped")
    monkeypatch.setattr("trimtab.policies.registry.DEFAULT_BUNDLE", tmp_path / "shipped")
    (contestant,) = make_contestants(["default"], TINY)
    assert (contestant.label, contestant.policy.name) == ("default", "made-up")


@pytest.mark.parametrize("fits", [True, False])
def test_the_policy_that_comes_along_competes_unasked_only_where_it_fits(
    fits: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_bundle(learned(), tmp_path / "shipped")
    for module in ("trimtab.policies.registry", "trimtab.agents.benchmark"):
        monkeypatch.setattr(f"{module}.DEFAULT_BUNDLE", tmp_path / "shipped")
    narrow = TINY.replace(levers=["momentum"], signals=["started"])
    names = benchmark._default_policies([load_scenario("digits-mlp") if fits else narrow])
    said = capsys.readouterr().err
    assert ("default" in names) is fits
    assert ("without default: policy 'made-up' " in said) is not fits
    assert {"random", "full"} <= set(names)
    assert ("constant" in names) is fits
    assert all(name in names or f"without {name}: " in said for name in rules())


def test_every_rule_competes_when_none_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def compete(fields: Sequence[Sequence[Any]], evaluators: object) -> tuple[()]:
        seen.extend([one.label for one in field] for field in fields)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "_compete", compete)
    monkeypatch.setattr(benchmark, "DEFAULT_BUNDLE", tmp_path / "none")
    assert cli.main(["bench", "--scenarios", "digits-mlp", "--out", str(tmp_path / "out")]) == 130
    assert set(seen[0]) <= set(benchmark.rules())
    assert {"constant", "cosine", "greedy", "random", "steady", "full"} <= set(seen[0])


# --- summaries --------------------------------------------------------------------------------------------------


def evaluation(final: Sequence[float], curve: Sequence[Sequence[float]] | None = None, **changes: Any) -> Evaluation:
    runs = len(final)
    points = np.array(curve if curve is not None else [[value] for value in final])
    nothing = np.zeros(runs, dtype=bool)
    made = Evaluation(
        policy="made",
        scenario="made",
        seed=0,
        interval=10,
        keys=tuple(f"made/held-out/{run}" for run in range(runs)),
        families=("made",) * runs,
        learning_rates=np.ones(runs),
        budgets=np.full(runs, 10 * points.shape[1]),
        final_loss=np.array(final),
        best_loss=np.array(final) - 0.5,
        diverged=nothing,
        lost_early=nothing,
        late=nothing,
        curve=points,
        inner_steps=np.full(runs, 10 * points.shape[1]),
        rollbacks=np.arange(runs),
        wall_seconds=1.5,
    )
    return replace(made, **changes)


def entry(label: str, final: Sequence[float], setting: str = "untuned", is_learned: bool = False, **more: Any) -> Entry:
    return Entry(label=label, setting=setting, learned=is_learned, evaluation=evaluation(final, **more))


def test_an_oracle_has_the_figures_of_what_it_chose() -> None:
    plays = [
        evaluation(
            [value] * 4,
            measures={"margin": np.full(4, value), "joules": np.full(4, value)},
            disturbed={"x": np.full(4, 3)},
        )
        for value in (1.0, 2.0)
    ]
    found = _picked(plays, np.array([0, 1, 1, 0]), 5.0)
    assert found.final_loss.tolist() == found.measures["margin"].tolist() == [1, 2, 2, 1]
    assert found.measures["joules"].tolist() == [3] * 4 and found.disturbed["x"].tolist() == [3] * 4


def test_rows_compare_with_the_first_learned_policy() -> None:
    ours = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    worse, same = [value + 0.5 for value in ours], ours
    found = summarise([entry("worse", worse), entry("net", ours, is_learned=True), entry("same", same)], "s", {}, 0)
    rows = {row.label: row for row in found.summaries}
    assert found.reference == "net"
    assert rows["worse"].difference == (0.5, 0.5, 0.5) and rows["worse"].better == (0.0, 0.0, 0.0)
    assert rows["same"].difference == (0.0, 0.0, 0.0) and rows["same"].better == (0.5, 0.5, 0.5)
    assert rows["net"].p_value == rows["same"].p_value == 1.0 and rows["worse"].p_value < 0.05
    assert [row.label for row in found.summaries] == ["net", "same", "worse"]
    assert rows["net"].final.estimate == iqm(np.array(ours)) == 3.5
    assert rows["net"].best == 3.0 and rows["net"].rollbacks == 3.5


def test_p_values_are_corrected_over_the_table_without_the_reference() -> None:
    rng = np.random.default_rng(0)
    finals = {name: rng.normal(shift, 1, 20).tolist() for name, shift in (("a", 0.0), ("b", 0.7), ("c", 1.0))}
    found = summarise([entry(name, final) for name, final in finals.items()], "s", {}, 5)
    rows = {row.label: row.p_value for row in found.summaries}
    raw = [
        sign_flip_test(np.array(finals[name]) - np.array(finals["a"]), np.random.default_rng([5, 0x7A]))
        for name in "bc"
    ]
    assert found.reference == "a"
    assert [rows["b"], rows["c"]] == pytest.approx(holm(np.array(raw)).tolist()) and rows["a"] == 1.0


def test_divergence_before_the_first_measurement_is_counted_apart() -> None:
    diverged, early = np.array([True, True, True, False]), np.array([True, False, False, False])
    found = summarise([entry("a", [1.0] * 4), entry("b", [1.0] * 4)], "s", {}, 0)
    assert (found.summaries[0].diverged, found.summaries[0].lost_early) == (0, 0)
    lost = Entry(
        label="a",
        setting="untuned",
        learned=False,
        evaluation=evaluation([1.0] * 4, diverged=diverged, lost_early=early),
    )
    row = summarise([lost], "s", {}, 0).summaries[0]
    assert (row.diverged, row.lost_early) == (2, 1)


TARGETS = {
    "constant@tuned where it competes": (["a", "constant@tuned", "net"], "constant@tuned"),
    "else the best untuned rule": (["a", "b", "cosine@oracle", "net"], "b"),
    "else the best of all": (["cosine@oracle", "net"], "net"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_the_target_is_a_rule_that_a_user_would_have(case: str) -> None:
    labels, expected = TARGETS[case]
    made = {
        "a": entry("a", [2.0]),
        "b": entry("b", [1.0]),
        "constant@tuned": entry("constant@tuned", [3.0], "tuned"),
        "cosine@oracle": entry("cosine@oracle", [0.5], "oracle"),
        "net": entry("net", [0.0], is_learned=True),
    }
    assert summarise([made[label] for label in labels], "s", {}, 0).target == expected


def test_steps_to_target_take_the_target_of_each_run() -> None:
    rule = entry("rule", [0.0] * 3, curve=[[3.0, 2.0], [0.0, -1.0], [5.0, 5.0]])
    net = entry("net", [0.0] * 3, curve=[[2.0, 9.0], [0.0, 0.0], [5.0, 4.0]], is_learned=True)
    rows = {row.label: row for row in summarise([rule, net], "s", {}, 0).summaries}
    assert rows["net"].reached == pytest.approx(2 / 3) and rows["net"].steps_to_target == 10
    assert rows["rule"].reached == 1.0 and rows["rule"].steps_to_target == 20
    never = entry("never", [1.0] * 3, curve=[[9.0, 9.0]] * 3)
    rows = {row.label: row for row in summarise([rule, never], "s", {}, 0).summaries}
    assert rows["never"].steps_to_target is None and rows["never"].reached == 0


# --- files ------------------------------------------------------------------------------------------------------


def awkward() -> ScenarioResult:
    """A name that would break a page, and a target that is never reached."""
    never = entry("<b>&", [1.0, 2.0], curve=[[9.0], [9.0]])
    return summarise([entry("rule", [0.0, 1.0]), never], "s", {"id": "s"}, 0)


def test_infinity_never_reaches_a_file() -> None:
    document = json.loads(to_json([awkward()], {}), parse_constant=lambda name: pytest.fail(name))
    held = document["scenarios"]["s"]["policies"]["<b>&"]
    assert held["runs"]["steps_to_target"] == [None, None] and held["summary"]["steps_to_target"] is None
    rows = list(csv.DictReader(to_csv([awkward()]).splitlines()))
    assert [row["steps_to_target"] for row in rows if row["policy"] == "<b>&"] == ["", ""]
    assert all(math.isfinite(float(row["final_loss"])) for row in rows)


def test_names_are_escaped_in_the_page() -> None:
    page = to_html([awkward()], "trimtab bench --policies '<b>&'", None)
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page and "<img" not in page


def test_without_matplotlib_there_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw_figure([awkward()]) is not None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_figure([awkward()]) is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new and longer")
    assert path.read_text() == "old"


def test_an_interruption_keeps_the_scenarios_that_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play = Competition.play

    def interrupted(self: Competition, contestant: Contestant) -> Entry:
        if self.evaluator.scenario.id == "tiny-two":
            raise KeyboardInterrupt
        return play(self, contestant)

    monkeypatch.setattr(Competition, "play", interrupted)
    out, places = tmp_path / "out", [tmp_path / "tiny.yaml", tmp_path / "two.yaml"]
    for place, scenario in zip(places, (TINY, TWO), strict=True):
        place.write_text(scenario.to_yaml())
    with pytest.raises(KeyboardInterrupt):
        run_bench(["constant"], places, runs=2, mode="eager", out=out)
    assert list(json.loads((out / "results.json").read_text())["scenarios"]) == ["tiny"]
    assert (out / "results.csv").read_text().count("constant") == 2
    assert not (out / "report.html").exists()


# --- refused before anything is computed ------------------------------------------------------------------------

REFUSED = {
    "policy": ({"policies": ["cosin"]}, UnknownNameError, "did you mean 'cosine'"),
    "setting": ({"policies": ["cosine@tunned"]}, UnknownNameError, "cosine@tunned"),
    "bundle": ({"policies": ["./no-such-bundle"]}, BundleError, "no-such-bundle"),
    "object": ({"policies": ["no_such_module:policy"]}, UserError, "no_such_module"),
    "scenario": ({"scenarios": ["digits-mpl"]}, UnknownNameError, "did you mean 'digits-mlp'"),
    "no scenario": ({"scenarios": []}, UserError, "no scenario"),
    "twice": ({"scenarios": ["digits-mlp", "digits-mlp"]}, ConfigError, "'digits-mlp' is given twice"),
    "runs": ({"runs": 0}, UserError, "runs is 0"),
    "later policy": ({"policies": ["constant", "greedy", "nope"]}, UnknownNameError, "'nope'"),
}


@pytest.fixture
def no_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluator, "play", lambda *_, **__: pytest.fail("computed"))


@pytest.mark.usefixtures("no_computing")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_leaves_no_folder(case: str, tmp_path: Path) -> None:
    changes, error, words = REFUSED[case]
    options: dict[str, Any] = {"policies": ["constant"], "scenarios": ["digits-mlp"], "runs": 4, **changes}
    with pytest.raises(error, match=words):
        run_bench(**options, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_computing")
def test_a_policy_must_fit_every_scenario(tmp_path: Path) -> None:
    path, bundle = tmp_path / "lr.yaml", tmp_path / "bundle"
    path.write_text(TINY.replace(id="lr-only", levers=["lr"], signals=["started"]).to_yaml())
    save_bundle(learned(), bundle)
    with pytest.raises(MismatchError, match=r"'made-up' moves momentum.*'lr-only'"):
        run_bench([str(bundle)], ["digits-mlp", path], runs=4, out=tmp_path / "out")


@pytest.mark.usefixtures("no_computing")
@pytest.mark.parametrize("held", ["results.json", "config.yaml"])
def test_a_folder_that_holds_something_is_left_alone(held: str, tmp_path: Path) -> None:
    (tmp_path / held).write_text("precious")
    with pytest.raises(OutputExistsError, match="already holds.*--out a new folder"):
        run_bench(["constant"], ["digits-mlp"], runs=4, out=tmp_path)
    with pytest.raises(OutputExistsError, match="is a file"):
        run_bench(["constant"], ["digits-mlp"], runs=4, out=tmp_path / held)
    assert [path.name for path in tmp_path.iterdir()] == [held] and (tmp_path / held).read_text() == "precious"


@pytest.mark.usefixtures("no_computing")
def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make folder"):
        run_bench(["constant"], ["digits-mlp"], runs=4, out=tmp_path / "file" / "out")
