"""The study of which signals forecast the outcome of a run: its statistics, and a tiny one from end to end."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score


def load() -> ModuleType:
    path = Path(__file__).parents[1] / "experiments" / "forecast.py"
    spec = importlib.util.spec_from_file_location("trimtab_forecast", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


forecast = load()


def test_rank_statistics_are_those_of_the_libraries() -> None:
    rng = np.random.default_rng(0)
    values, target = rng.integers(0, 5, (60, 3)).astype(float), rng.normal(size=60)
    expected = [spearmanr(values[:, column], target).statistic for column in range(3)]
    np.testing.assert_allclose(forecast.spearman(values, target), expected)
    failed = target > 0.3
    expected = [roc_auc_score(failed, values[:, column]) - 0.5 for column in range(3)]
    np.testing.assert_allclose(forecast.auc(values, failed), expected)
    assert np.isnan(forecast.auc(values, np.zeros(60, dtype=bool))).all()


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> object:
    """Two families in which ``rises`` forecasts the outcome, ``bends`` has its best in the middle, and ``noise`` is none."""
    monkeypatch.setattr(forecast, "REPETITIONS", 20)
    monkeypatch.setattr(forecast, "TREES", 20)
    rng, runs = np.random.default_rng(1), 240
    regret = rng.exponential(size=runs)
    bent = regret * rng.choice([-1, 1], runs)
    noisy = regret + rng.normal(0, 0.3, runs)
    columns = [rng.normal(size=runs), bent, noisy, np.zeros(runs)]
    return forecast.Table(
        names=("noise", "bends", "rises", "still"),
        seen=np.stack([np.column_stack(columns)] * len(forecast.MOMENTS)),
        family=np.repeat([0, 1], runs // 2),
        instance=np.arange(runs) // 4,
        regret=regret,
        failed=regret > 2,
        noise=np.full(runs, np.nan),
    )


def test_a_planted_forecast_is_found(planted: object, capsys: pytest.CaptureFixture[str]) -> None:
    found = forecast.study(planted)
    for part in found.values():
        rows = part["signals"]
        assert list(rows) == ["bends", "rises", "noise"], "what never varies is left out"
        assert rows["bends"]["alone"] > rows["rises"]["alone"] > 0.5
        assert rows["noise"]["alone"] < 0.1
        middle, low, high = rows["rises"]["spearman"]
        assert 0.7 < low < middle < high
        assert rows["rises"]["auc"][0] > 0.9
        assert abs(rows["bends"]["spearman"][0]) < 0.2
        assert rows["bends"]["importance"] > 10 * abs(rows["noise"]["importance"])
        assert rows["rises"]["label_noise"] == [None] * 3
        assert part["runs"] == 240
    forecast.show(found, top=2)
    assert "| `bends` |" in capsys.readouterr().out


def test_the_study_runs_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(forecast, "REPETITIONS", 3)
    monkeypatch.setattr(forecast, "TREES", 3)
    out = tmp_path / "forecast.json"
    arguments = ["--families", "teacher-mlp", "--instances", "8", "--rates", "3", "--steps", "40", "--mode", "eager"]
    monkeypatch.setattr(sys, "argv", ["forecast.py", *arguments, "--out", str(out)])
    forecast.main()
    assert "| `loss_level` |" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["settings"]["families"] == ["teacher-mlp"]
    assert list(written["moments"]) == ["10%", "25%", "50%"]
    assert written["moments"]["50%"]["runs"] > 12
