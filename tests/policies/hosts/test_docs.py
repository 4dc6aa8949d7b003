"""The blocks on the page about hosts run, each by itself."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "hosts.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## (\w[^\n]*)\n\n```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
NEEDS = {
    "Lightning": "lightning.pytorch",
    "Hugging Face": "transformers",
    "Accelerate": "accelerate",
    "Composer": "torch",
}


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # Lightning's advice
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    if NEEDS[name] in ("transformers", "accelerate"):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(BLOCKS[name], encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "block.py"))
    if name == "Composer":
        assert names["algorithm"].controller is None
        return
    steps = 10 if name == "Accelerate" else 30
    assert f"policy cosine, mode act: {steps} steps" in capsys.readouterr().out


def test_every_host_of_the_table_exists() -> None:
    assert set(BLOCKS) == set(NEEDS)
    for module, name in re.findall(r"`(trimtab\.policies\.hosts\.\w+)\.(\w+)`", PAGE):
        assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("name", "needs", "told"),
    [
        ("attach_lightning", "lightning.pytorch", r"test accuracy: ([\d.]+) alone, ([\d.]+) with greedy"),
        ("attach_huggingface", "transformers", r"perplexity: ([\d.]+) alone, ([\d.]+) with greedy"),
    ],
)
def test_an_example_runs_and_helps(name: str, needs: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(needs, reason=f"{needs} is not installed")
    if needs == "transformers":
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
    example = runpy.run_path(str(Path(__file__).parents[3] / "examples" / f"{name}.py"))
    example["main"]("greedy")
    found = re.fullmatch(told, capsys.readouterr().out.splitlines()[-1])
    assert found is not None
    alone, steered = float(found[1]), float(found[2])
    assert steered > alone if name == "attach_lightning" else steered < alone
