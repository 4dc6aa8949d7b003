"""Every host decides together on two ranks, as its callback attaches when the process group is there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.policies.ranked import Moody, Training, standing_hash, world_of
from torch import nn

from trimtab.inner_training.guard import REASON_WORDS, Reason
from trimtab.policies.together import RanksDecider


def _environment(rank: int, world: int, folder: str) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": world, "ACCELERATE_USE_CPU": "true"}
    os.environ |= {name: str(value) for name, value in own.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # not used: the ranks have met already
    os.chdir(folder)


def _policy(rank: int) -> Moody:
    return Moody(rank, {3: (1, "raise")})


def _found(training: Training, controller: Any) -> dict[str, Any]:
    weights = torch.cat([one.detach().reshape(-1) for one in training.bare.parameters()])
    return {
        "together": isinstance(controller._decider, RanksDecider),
        "steps": controller.steps,
        "weights": weights.tolist(),
        "standing": standing_hash(controller),
        "logged": training.logged.lines[-1],
    }


def accelerate(rank: int, world: int, folder: str) -> dict[str, Any]:
    _environment(rank, world, folder)
    from accelerate import Accelerator

    from trimtab.policies.hosts.accelerate import attach

    training = Training(rank, world, wrap=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(training.bare, training.optimizer)
    controller = attach(accelerator, optimizer, model=model, policy=_policy(rank))
    for _ in range(16):
        with accelerator.accumulate(model):
            loss = (model(training.inputs) - training.targets).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            controller.step(loss)
    return _found(training, controller.controller)


def lightning(rank: int, world: int, folder: str) -> dict[str, Any]:
    _environment(rank, world, folder)
    import lightning.pytorch as framework

    from trimtab.policies.hosts.lightning import TrimtabCallback

    training = Training(rank, world, wrap=False)

    class Module(framework.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.bare = training.bare

        def training_step(self, batch: Any, index: int) -> Any:
            return (self.bare(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    callback = TrimtabCallback(policy=_policy(rank))
    trainer = framework.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp",
        max_steps=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    data = torch.utils.data.TensorDataset(training.inputs, training.targets)
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8))
    return _found(training, callback.controller)


def huggingface(rank: int, world: int, folder: str) -> dict[str, Any]:
    _environment(rank, world, folder)
    from transformers import Trainer, TrainingArguments

    from trimtab.policies.hosts.huggingface import TrimtabCallback

    training = Training(rank, world, wrap=False)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bare = training.bare

        def forward(self, x: Any, labels: Any) -> Any:
            return {"loss": (self.bare(x) - labels).square().mean()}

    callback = TrimtabCallback(policy=_policy(rank))
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=8,
        per_device_train_batch_size=8,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
    )
    rows = [{"x": x, "labels": y} for x, y in zip(training.inputs, training.targets, strict=True)]
    Trainer(Model(), arguments, train_dataset=rows, callbacks=[callback]).train()
    return _found(training, callback.controller)


@pytest.mark.parametrize(
    ("work", "needs"),
    [
        (accelerate, "accelerate"),
        pytest.param(lightning, "lightning", marks=pytest.mark.slow),
        pytest.param(huggingface, "transformers", marks=pytest.mark.slow),
    ],
)
def test_a_host_decides_together_on_two_ranks(work: Any, needs: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    one, other = world_of(2, work, tmp_path, str(tmp_path))
    assert isinstance(one, dict) and isinstance(other, dict), (one, other)
    assert one == other
    assert one["together"] and one["steps"] == 8
    assert "rank 1 abstained at step 2" in one["logged"] and REASON_WORDS[Reason.FAULT] in one["logged"]
