"""The logic of the speed benchmarks: what they compare is the same work, and what they count is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.benchmarks.scripts import FOLDER, script
from trimtab.inner_training.population import Population

architectures, loops, card = (script(f"speed.{name}") for name in ("architectures", "loops", "card"))
engine, gpu, scaling = (script(name) for name in ("engine", "gpu", "scaling"))
CPU = torch.device("cpu")


def made(name: str) -> tuple[Any, Any, Any]:
    """An architecture, its family, and one instance at full size."""
    architecture = architectures.ARCHITECTURES[name]
    family = architectures.family_of(architecture)
    return architecture, family, architectures.full_size(family, 1, architecture.rule, architecture.lr)[0]


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_the_plain_network_is_that_of_the_population(name: str) -> None:
    architecture, family, instance = made(name)
    plain = architectures.ordinary(architecture, family, instance)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in family.module.parameters())
    population = Population(family, 1, rules=(architecture.rule,), mode="eager")
    population.reset([0], [instance])
    x, y = population.batch(0, 0)
    assert len(x) == instance.batch_size
    with torch.no_grad():
        loss = nn.functional.cross_entropy(plain(x).flatten(0, -2), y.flatten())
    assert loss.item() == pytest.approx(population.advance(1).losses[0, 0].item(), rel=1e-4)


def test_full_size_leaves_nothing_out() -> None:
    _, family, instance = made("mlp-sgd")
    assert instance.batch_size == family.max_batch == 64
    assert all((value == 1).all() for name, value in instance.buffers.items() if "gate" in name)
    several = architectures.full_size(family, 30, "sgd", 0.1)
    assert len({one.seed for one in several}) == 30
    assert {one.optimizer.lr for one in several} == {0.1}


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_the_plain_loop_learns(name: str) -> None:
    architecture, family, instance = made(name)
    network = []

    def watched(*arguments: Any) -> nn.Module:
        network.append(architecture.plain(*arguments))
        return network[0]

    loop = loops.plain_loop(architectures.replace(architecture, plain=watched), family, instance)
    before = [value.detach().clone() for value in network[0].parameters()]
    loop.run(1)
    moved = [not torch.equal(old, new) for old, new in zip(before, network[0].parameters(), strict=True)]
    assert all(moved)


def test_rounds_alternate_and_the_best_counts() -> None:
    # A warm-up, one interval to see how long it takes, and three rounds.
    costs = {"slow": iter([5.0, 0.1, 9.0, 3.0, 4.0]), "quick": iter([5.0, 0.1, 1.0, 2.0, 0.5])}
    now, calls = [0.0], []

    def loop(name: str) -> Any:
        def run(intervals: int) -> None:
            calls.append((name, intervals))
            now[0] += next(costs[name])

        return loops.Loop(run, runs=2)

    found = loops.best({name: loop(name) for name in costs}, 3, lambda: now[0], seconds=0.2)
    assert calls[4:] == [("slow", 2), ("quick", 2)] * 3
    assert found == pytest.approx({"slow": 3.0 / 40, "quick": 0.5 / 40})


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        ({4: 1.0, 8: 0.6, 16: 0.4, 32: 0.39}, [4, 8, 16, 32]),  # saturated
        ({4: 1.0, 8: 0.6, 16: None}, [4, 8]),  # out of memory
        ({4: 1.0, 8: 2.0}, [4, 8]),  # slower
        ({4: 1.0, 8: 0.5, 16: 0.2, 32: 0.1, 64: 0.01}, [4, 8, 16, 32]),  # the limit
        ({4: None}, []),
    ],
)
def test_populations_double_until_they_gain_nothing(seconds: dict[int, float | None], sizes: list[int]) -> None:
    points = card.saturating(lambda runs: seconds[runs], 4, 63)
    assert [point.runs for point in points] == sizes
    if sizes:
        assert card.quickest(points).seconds == min(seconds[size] for size in sizes)


def test_operations_are_counted() -> None:
    # The forward product, and one for the gradient of each factor; the first layer's input needs none.
    batch, (inputs, hidden, outputs) = 64, (64, 64, 10)
    wanted = 2 * batch * (2 * inputs * hidden + 3 * hidden * outputs)
    assert card.step_flops(*made("mlp-sgd")) == wanted
    _, family, instance = made("transformer")
    tokens = instance.batch_size * family.module.context
    matrices = sum(p.numel() for n, p in family.module.named_parameters() if p.ndim == 2 and "embed" not in n)
    assert card.step_flops(*made("transformer")) > 6 * tokens * (matrices - family.module.place.numel())


def test_the_ceiling_is_a_speed() -> None:
    assert 1e8 < card.product_ceiling(CPU, sizes=(256,), rounds=2) < 1e14


def test_waiting_is_noticed() -> None:
    tensor = torch.ones(3)
    assert card.synchronisations(lambda: tensor + 1, CPU) == 0
    assert card.synchronisations(lambda: [tensor.sum().item(), tensor.nonzero()], CPU) >= 2
    per_interval, inside = card.synchronisations_inside(lambda steps: [tensor[0].item() for _ in range(steps + 1)], CPU)
    assert inside > 0
    assert per_interval > inside


@pytest.mark.parametrize("name", ["mlp-adam", "graph"])
def test_an_interval_does_not_wait_inside(name: str) -> None:
    population = gpu.Card(CPU, mode="eager").population(name, 2)
    assert card.synchronisations_inside(population.advance, CPU)[1] == 0


def test_a_card_is_measured_on_a_cpu_as_well() -> None:
    row = gpu.Card(CPU, mode="eager", rounds=1, seconds=0.0).row("mlp-sgd", start=2, limit=4, ceiling=1e11)
    assert next(iter(row["sizes"])) == 2
    assert row["runs"] in (2, 4)
    assert row["ratio"] > 0
    assert row["of_ceiling"] == pytest.approx(row["tflops"] * 1e12 / 1e11, rel=0.2, abs=0.01)
    assert row["synchronisations_inside"] == 0
    assert gpu.show([row], "title").row_count == 1


def test_without_a_gpu_the_script_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "no CUDA device" in err


def test_the_engine_table_has_a_row_for_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Population.__init__

    def eager(self: Population, *arguments: Any, **options: Any) -> None:
        kept(self, *arguments, **{**options, "mode": "eager"})

    monkeypatch.setattr(Population, "__init__", eager)
    monkeypatch.setattr(loops.best, "__defaults__", (loops.time.process_time, 0.0))
    rows = engine.measure("graph", runs=2, rounds=1, threads=1)
    assert [row["way"] for row in rows][:2] == ["plain PyTorch", "population, eager"]
    assert rows[0]["ratio"] == 1
    assert rows[1]["bytes_per_run"] > rows[1]["parameters"] * 4
    assert engine.show(rows, "title").row_count == len(rows)


@pytest.mark.parametrize("parameters", scaling.PARAMETERS)
def test_networks_have_about_the_parameters_asked_for(parameters: int) -> None:
    hidden = scaling.hidden_units(parameters)
    count = (scaling.INPUTS + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * scaling.CLASSES
    assert count == pytest.approx(parameters, rel=0.05)


def test_slopes_are_those_of_the_upper_half() -> None:
    x = [1, 10, 100, 1000]
    assert scaling.slope(x, [7.0, 7.0, 3e2, 3e4]) == pytest.approx(2)
    assert scaling.slope([1, 2], [1.0, 2.0]) == pytest.approx(1)


def test_scaling_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, png = tmp_path / "out" / "scaling.json", tmp_path / "png" / "scaling.png"
    sizes = ["--runs", "1", "2", "--parameters", "1000", "3000"]
    paths = ["--out", str(out), "--png", str(png)]
    monkeypatch.setattr(
        "sys.argv", ["scaling.py", *sizes, *paths, "--mode", "eager", "--rounds", "1", "--seconds", "0"]
    )
    scaling.main()
    found = json.loads(out.read_text())
    assert [row["runs"] for row in found["runs"]] == [1, 2]
    assert found["runs"][1]["held"] == 2 * found["runs"][0]["held"]
    assert all(row["on_top"] > 0 and row["seconds"] > 0 for rows in found.values() for row in rows)
    assert np.frombuffer(png.read_bytes()[:4], dtype=np.uint8).tolist() == [0x89, *b"PNG"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_can_be_imported(path: Path) -> None:
    assert callable(script(path.stem).main)
