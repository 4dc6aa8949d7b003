"""Hugging Face's own ways: where the loss comes from, evaluation, checkpoints in JSON, callbacks that are made again."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.policies.hosts.machines import Case, Net, huggingface_trainer
from tests.policies.live import Scripted
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.inner_training.guard import GuardConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from trimtab.policies.hosts.huggingface import TrimtabCallback, loss_of


def run(callback: Any, case: Case, folder: Path, end: int | None = None, resume: int = 0, **more: Any) -> Any:
    trainer = huggingface_trainer(case, folder, callback, end or case.ticks, [], **more)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume}") if resume else None)
    return trainer


def losses(callback: Any) -> list[float]:
    return list(callback.controller.state_dict()["run"]["losses"])


def test_it_is_a_callback_whose_state_can_be_exported(tmp_path: Path) -> None:
    from transformers.trainer_callback import ExportableState

    callback = TrimtabCallback("cosine", guard=GuardConfig(rollback_budget=2, bounds={"lr": (0.1, 3)}))
    assert isinstance(callback, transformers.TrainerCallback) and isinstance(callback, ExportableState)
    other = TrimtabCallback.from_state(callback.state())
    assert replace(other._hosted.options, stateful=()) == callback._hosted.options and other.saved is None
    run(callback, Case(steps=6), tmp_path)
    assert callback.controller is not None and callback.controller._settings.total_steps == 6


def test_evaluations_do_not_count_and_their_loss_arrives_with_the_next_step(tmp_path: Path) -> None:
    policy = Scripted([[1.0]], signals=("val_available",), decide_every=1)
    callback = TrimtabCallback(policy)
    run(callback, Case(steps=6), tmp_path, eval_strategy="steps", eval_steps=3)
    assert [float(one[0, 0]) for one in policy.seen[-7:]] == [0, 0, 0, 0, 1, 1, 1]
    assert callback.controller.steps == 6


class Counting(Net):
    """Divides the sum of its losses by the number of items of all micro-batches, as a causal language model does."""

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        out = super().forward(x, labels)
        items = kwargs.get("num_items_in_batch")
        return out if items is None else {**out, "loss": out["loss"] * labels.numel() / items}  # type: ignore[union-attr]


@pytest.mark.parametrize("counting", [True, False])
@pytest.mark.parametrize("follow", [True, False])
def test_the_loss_is_the_mean_of_the_accumulated_batches(
    counting: bool, follow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(steps=4, accumulate=3)
    expected = []
    for make in (Net, Counting if counting else Net):
        monkeypatch.setattr("tests.policies.hosts.machines.Net", make)
        callback = TrimtabCallback(Scripted([[1.0]], decide_every=100))
        trainer = huggingface_trainer(case, tmp_path, callback, 4, [])
        if make is Counting:
            assert trainer.model_accepts_loss_kwargs
        if follow:
            callback.follow(trainer)
        trainer.train()
        expected.append(losses(callback))
    assert len(expected[0]) == 4
    np.testing.assert_allclose(expected[0], expected[1], rtol=1e-5)


def squared(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return (outputs["logits"] - labels).square().mean()


def test_a_loss_from_outside_of_the_model_is_asked_for_or_followed(tmp_path: Path) -> None:
    expected = TrimtabCallback(Scripted([[1.0]], decide_every=100))
    run(expected, Case(steps=4), tmp_path)
    for follow in (False, True):
        callback = TrimtabCallback(Scripted([[1.0]], decide_every=100))
        trainer = huggingface_trainer(Case(steps=4), tmp_path, callback, 4, [])
        trainer.compute_loss_func = squared
        if not follow:
            with pytest.raises(UserError, match=r"call callback.follow\(trainer\) before trainer.train\(\)"):
                trainer.train()
            continue
        callback.follow(trainer)
        trainer.train()
        np.testing.assert_allclose(losses(callback), losses(expected), rtol=1e-6)


def test_a_step_without_a_loss_ends_no_training_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    outputs: list[Any] = []

    def at_times(output: Any) -> Any:
        outputs.append(output)
        return None if len(outputs) in (3, 4) else loss_of(output)

    monkeypatch.setattr("trimtab.policies.hosts.huggingface.loss_of", at_times)
    callback = TrimtabCallback(Scripted([[1.0], [1.0], [0.5], [0.25]], decide_every=2))
    run(callback, Case(steps=8), tmp_path)
    assert callback.controller.steps == 8 and sum("loss is None" in line for line in caplog.messages) == 1
    assert losses(callback) == [] and "between x0.25 and x1" in callback.controller.summary()


def test_a_compiled_model_is_steered_too(tmp_path: Path) -> None:
    torch.compiler.reset()
    seen = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        callback = TrimtabCallback(Scripted([[1.0], [0.5]], decide_every=2))
        trainer = run(callback, Case(steps=6), tmp_path, **options)
        seen.append((trainer.optimizer.optimizer.effective, callback.controller.steps))
        assert not trainer.model._forward_hooks, "the hook is gone"
    assert seen[0] == seen[1]
    assert {rates[0] for rates in seen[0][0]} == {0.05, 0.025}


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rebuilt", [False, True])
def test_the_state_survives_whether_the_trainer_makes_callbacks_again_or_not(rebuilt: bool, tmp_path: Path) -> None:
    case = Case(steps=8, pause=4)
    run(TrimtabCallback("exponential", decide_every=1), case, tmp_path, end=4)
    callback = TrimtabCallback("exponential", decide_every=1)
    trainer = run(callback, case, tmp_path, resume=4, restore_callback_states_from_checkpoint=rebuilt)
    acting = [one for one in trainer.callback_handler.callbacks if isinstance(one, TrimtabCallback)]
    assert len(acting) == 1 and (acting[0] is callback) is not rebuilt
    assert acting[0].controller is not None and acting[0].controller.steps == 8
    straight = TrimtabCallback("exponential", decide_every=1)
    whole = run(straight, Case(steps=8), tmp_path)
    assert trainer.optimizer.optimizer.effective == whole.optimizer.optimizer.effective[4:]


def test_a_policy_object_cannot_be_made_again_from_json(tmp_path: Path) -> None:
    case = Case(steps=8, pause=4)
    run(TrimtabCallback(Scripted([[0.5]])), case, tmp_path, end=4)
    with pytest.raises(UserError, match="leave it False"):
        run(TrimtabCallback(Scripted([[0.5]])), case, tmp_path, resume=4, restore_callback_states_from_checkpoint=True)


def test_a_checkpoint_without_a_controller_is_said_and_can_be_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    case = Case(steps=12, pause=4)
    run(None, case, tmp_path, end=4)
    run(TrimtabCallback("constant"), case, tmp_path, end=8, resume=4)
    assert caplog.text.count("this controller begins at null multipliers") == 1
    callback = TrimtabCallback("constant")
    run(callback, case, tmp_path, resume=8)
    assert caplog.text.count("this controller begins at null multipliers") == 1
    assert callback.controller.steps == 8, "it has seen the last eight of twelve steps"


def test_a_second_training_starts_anew(tmp_path: Path) -> None:
    callback = TrimtabCallback(Scripted([[1.0], [0.5]], decide_every=2))
    trainer = huggingface_trainer(Case(steps=4), tmp_path, callback, 4, [])
    trainer.train()
    trainer.train()
    assert callback.controller.steps == 4
    assert [one[0] for one in trainer.optimizer.optimizer.effective] == [0.05, 0.05, 0.025, 0.025] * 2


def test_an_interrupted_training_does_not_hinder_the_next(tmp_path: Path) -> None:
    callback = TrimtabCallback("constant")
    trainer = huggingface_trainer(Case(steps=4), tmp_path, callback, 4, [])
    inner = trainer.training_step

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    trainer.training_step = fail
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.training_step = inner
    trainer.train()
    assert callback.controller.steps == 4


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    trainer = huggingface_trainer(Case(steps=4), tmp_path, TrimtabCallback("constant"), 4, [])
    trainer.add_callback(TrimtabCallback("greedy"))
    with pytest.raises(UserError, match="has a controller already"):
        trainer.train()


def test_a_real_model_of_the_library(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
    rows = [{"input_ids": torch.arange(8) % 11, "labels": torch.arange(8) % 11} for _ in range(16)]
    callback = TrimtabCallback("greedy", decide_every=2)
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows, callbacks=[callback])
    noted: list[float] = []
    step = callback._hosted.step

    def watched(*, total: bool = False) -> Any:
        noted.append(float(sum(callback._hosted._losses)))
        assert total
        return step(total=total)

    callback._hosted.step = watched
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert isinstance(callback.controller._optimizer, torch.optim.AdamW) and callback.controller.steps == 6
    np.testing.assert_allclose(noted, logged, atol=1e-3)


def test_a_loss_is_looked_for_in_tuples_too() -> None:
    from trimtab.policies.hosts.huggingface import loss_of

    assert loss_of((torch.tensor(3.0), torch.zeros(2, 2))) == 3.0
    assert loss_of(nn.Identity()) is None
