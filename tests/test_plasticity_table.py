"""The study of plasticity: its tasks, arms and edits, the page, and a tiny study from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.pages import filled
from experiments.plasticity import __main__ as script
from experiments.plasticity import page, play, study
from experiments.plasticity.arms import ARMS, Arm, Run, end_width, widths
from experiments.plasticity.play import Arena, effective_rank, hidden
from experiments.plasticity.tasks import TASKS, Continual, Network, Recipe
from torch.func import functional_call

from trimtab.inner_training.structure.maintenance import MAINTENANCE

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "plasticity.json"
STUDIED = pytest.mark.skipif(not RESULTS.exists(), reason="the study has yet to be run")


def found() -> dict[str, object]:
    result: dict[str, object] = json.loads(RESULTS.read_text())
    return result


@STUDIED
@pytest.mark.parametrize("name", page.TABLES)
def test_the_page_shows_the_figures(name: str) -> None:
    text = (DOCS / "plasticity.md").read_text()
    assert f"<!-- table: {name} -->" in text
    assert "\n".join(page.TABLES[name](found())) in text


@STUDIED
def test_the_page_is_filled_anew() -> None:
    text = (DOCS / "plasticity.md").read_text()
    assert filled(text, page.tables_of(found())) == text


def test_every_method_is_an_arm_and_all_try_as_many_settings() -> None:
    assert set(MAINTENANCE) <= {arm.method for arm in ARMS.values()}
    assert {len(arm.grid()) for arm in ARMS.values()} == {6}
    assert not set(study.Size().tuned) & set(study.Size().reported)


def test_data_change_as_the_task_says() -> None:
    family = Continual(5, 4, Network(hidden=8))
    phases = {}
    for task in TASKS:
        instance = family.instance(Recipe(task=task, seed=3, lr=0.01))
        parts = [instance.split("train", phase) for phase in range(5)]
        phases[task] = [(instance.rows[part], instance.labels[part]) for part in parts]
        assert all(len(rows) == TASKS[task].images for rows, _ in phases[task])
        again = family.instance(Recipe(task=task, seed=3, lr=0.1))
        assert (again.rows == instance.rows).all() and (again.labels == instance.labels).all()
    (rows, labels), (others, new) = phases["random-labels"][:2]
    assert (rows == others).all() and 0.6 < (labels != new).mean() < 1
    (rows, labels), (others, new) = phases["permuted"][:2]
    assert (rows != others).any() and (labels == new).all()
    a, b = (family.inputs[torch.from_numpy(one)] for one in (rows, others))
    assert not torch.equal(a, b) and torch.equal(a.sort(1).values, b.sort(1).values)
    assert all((rows == phases["steady"][0][0]).all() for rows, _ in phases["steady"])


@pytest.mark.parametrize("edits", [5, 10, 20])
@pytest.mark.parametrize("name", ["grow", "prune"])
def test_widths_lead_to_half_of_the_weights(name: str, edits: int) -> None:
    end = end_width(40, 64, 10)
    path = widths(ARMS[name], 40, end, edits)
    assert len(path) == edits + 1 and path[0] == (4 if name == "grow" else 40) and path[-1] == end
    assert path == sorted(path, reverse=name == "prune")
    weights = 64 * end + end * end + 10 * end
    assert abs(weights / (64 * 40 + 40 * 40 + 400) - 0.5) < 0.02


@pytest.fixture(scope="module")
def arena() -> Arena:
    return Arena(Network(hidden=12), 5, 4, 6, mode="eager")


def test_operators_edit_at_their_time(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of active units before each phase; Prune goes back to its first weights, the control does not."""
    monkeypatch.setattr(arena, "_edit", lambda phase, edit=arena._edit: (edit(phase), seen.append(state()))[0])

    def state() -> tuple[list[list[int]], torch.Tensor]:
        assert arena._structure is not None
        counts = torch.stack([one.sum(1) for one in arena._structure.active.values()], 1).tolist()
        return counts, arena._runs._learner.parameters.clone()

    seen: list[tuple[list[list[int]], torch.Tensor]] = []
    common = {"task": "permuted", "seed": 0, "rate": 0.01, "edits": 2}
    given = [("grow", 1.0), ("grow", 2.0), ("prune", 2.0), ("prune-stay", 2.0), ("narrow", 0.0)]
    played = arena.play([Run(arm=arm, knob=knob, **common) for arm, knob in given])  # type: ignore[arg-type]
    end = end_width(12, 64, 10)
    half = {name: widths(ARMS[name], 12, end, 2)[1] for name in ("grow", "prune")}
    counts = [[one[0][run][0] for one in seen] for run in range(5)]
    assert all(first == second for one in seen for first, second in one[0])
    assert counts[0] == [1, half["grow"], end, end, end]
    assert counts[1] == [1, half["grow"], half["grow"], end, end]
    assert counts[2] == counts[3] == [12, half["prune"], half["prune"], end, end]
    assert counts[4] == [end] * 5
    assert played.active.tolist() == pytest.approx([end / 12] * 5, abs=1e-4)
    first, after = seen[0][1], seen[1][1]
    left = after[2] != 0
    assert bool(left.any()) and torch.equal(after[2][left], first[2][left])
    assert not torch.equal(after[3], after[2]) and played.online.shape == (5, 5)


@pytest.mark.parametrize("network", [Network(hidden=8, activation="crelu"), Network(hidden=8, norm=True)])
def test_hidden_outputs_are_those_of_the_network(network: Network) -> None:
    family = Continual(2, 3, network)
    instances = [family.instance(Recipe(task="steady", seed=seed, lr=0.1, width=3)) for seed in range(2)]
    views = {
        name: torch.stack([torch.from_numpy(np.asarray(one.parameters[name])) for one in instances])
        for name in instances[0].parameters
    }
    gates = [
        torch.stack([torch.from_numpy(np.asarray(one.buffers[f"gate{index}"])) for one in instances])
        for index in (0, 1)
    ]
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    outputs = hidden(family.module, views, gates, x)
    logits = outputs[-1][0] @ views["layers.2.weight"].mT + views["layers.2.bias"][:, None]
    for run in range(2):
        own = {name: value[run] for name, value in views.items()} | {
            f"gate{i}": gate[run] for i, gate in enumerate(gates)
        }
        torch.testing.assert_close(logits[run], functional_call(family.module, own, (x[run],)))


def test_the_rank_is_that_of_the_directions_in_use() -> None:
    draws = torch.Generator().manual_seed(0)
    outputs = torch.randn(1, 100, 3, generator=draws) @ torch.randn(1, 3, 20, generator=draws)
    assert 1.5 < float(effective_rank(outputs)[0]) <= 3 + 1e-3
    assert effective_rank(torch.zeros(1, 5, 4)).tolist() == [1.0]


def test_a_fresh_start_is_one(arena: Arena) -> None:
    """Weights of the next phase are initial values, drawn anew, and the optimizer's state is empty."""
    one, phases = Run(task="steady", arm="fresh", seed=0, rate=0.01, knob=0.0), []
    fire = arena._runs.fire

    def noted(event: str, mask: np.ndarray) -> None:
        fire(event, mask)
        phases.append([tensor[0].clone() for tensor in arena._runs._learner])

    arena._runs.fire = noted  # type: ignore[method-assign]
    arena.play([one])
    arena._runs.fire = fire  # type: ignore[method-assign]
    assert len(phases) == 4
    for parameters, first, second, updates in phases:
        weights = arena._runs.layout.views(parameters[None])["layers.1.weight"]
        assert 0.25 < float(weights.abs().max()) <= 1 / 12**0.5 + 1e-6 and not first.any() and not second.any()
        assert int(updates) == 0
    assert not torch.equal(phases[0][0], phases[1][0])


def test_intervals_and_choices() -> None:
    middle, low, high = study.interval([1.0, 2.0, 3.0])
    assert middle == 2 and high - middle == pytest.approx(4.3027 / 3**0.5, abs=1e-3) and middle - low == high - middle
    rows = [
        {"task": "steady", "arm": "redo", "rate": rate, "knob": knob, "online": rate + knob, "seed": seed}
        for rate, knob in ARMS["redo"].grid()
        for seed in (0, 1)
    ]
    assert study.best_of(rows) == {"steady": {"redo": (max(ARMS["redo"].rates), 0.3)}}
    assert (
        study.compared([{"seed": 1, "online": 0.5}], [{"seed": 0, "online": 9}, {"seed": 1, "online": 0.25}])[0] == 0.25
    )


def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("none", "none-sgd", "fresh", "random-reset", "l2-init", "layer-norm", "grow", "prune")
    short: dict[str, Arm] = {name: ARMS[name] for name in few}
    for module in (study, play, page):
        monkeypatch.setattr(module, "ARMS", short)
    monkeypatch.setattr(script, "SMALL", study.Size(phases=3, steps=4, tuned=(0,), reported=(100, 101), mode="eager"))
    out, text, picture = tmp_path / "new" / "p.json", tmp_path / "p.md", tmp_path / "p.png"
    text.write_text("<!-- table: permuted -->\n<!-- end -->\n")
    line = ["plasticity", "--small", "--keep", str(tmp_path / "keep"), "--out", str(out), "--png", str(picture)]
    monkeypatch.setattr(sys, "argv", [*line, "--page", str(text)])
    script.main()
    assert "edits-random-labels" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert set(result["tasks"]) == set(TASKS) and set(result["tasks"]["steady"]) == set(short)
    assert result["tasks"]["permuted"]["none"]["minus_none"] == [0, 0, 0]
    assert "| `layer-norm` |" in text.read_text() and picture.stat().st_size > 1000
    monkeypatch.setattr(Arena, "play", lambda *_: pytest.fail("it was kept"))
    script.main()
    assert json.loads(out.read_text()) == result
