"""The same small training in four hosts, with an optimizer that writes down the rates it was given."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trimtab.policies.attach import attach
from trimtab.policies.controller import Controller

SKIPPED = 3  # the batch whose loss is infinite, where a gradient scaler is used


class Recorder(torch.optim.Optimizer):
    """Gradient descent that keeps the rates of its groups before any other hook, and inside each step."""

    def __init__(self, groups: Any, lr: float = 0.05) -> None:
        super().__init__(groups, {"lr": lr, "momentum": 0.9})
        self.scheduled: list[tuple[float, ...]] = []
        self.effective: list[tuple[float, ...]] = []
        self.register_step_pre_hook(lambda one, args, kwargs: one.scheduled.append(one.rates()))

    def rates(self) -> tuple[float, ...]:
        return tuple(group["lr"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.effective.append(self.rates())
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None:
                    state = self.state[one]
                    state["last"] = one.grad + 0.5 * state.get("last", torch.zeros_like(one))
                    one.sub_(group["lr"] * state["last"])
        return loss


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training: which scheduler and which controller, and how the host runs it.

    Attributes:
        schedule: makes the scheduler of an optimizer; None for none.
        policy: None for no controller.
        steps: optimizer steps that are really done.
        amp: autocast and a gradient scaler, with one step that the scaler skips.
        accumulate: batches per optimizer step.
        pause: steps after which the training is saved, and resumed with new objects; 0 for never.
        make: the optimizer of a model.
        fixed: every batch is the first one.
    """

    schedule: Callable[[Any], Any] | None = None
    policy: Any = None
    steps: int = 8
    amp: bool = False
    accumulate: int = 1
    pause: int = 0
    make: Callable[[nn.Module], Any] = field(default=lambda model: Recorder(groups(model)))
    fixed: bool = False

    @property
    def ticks(self) -> int:
        """Optimizer steps that are tried."""
        return self.steps + self.amp

    def batches(self) -> list[dict[str, Tensor]]:
        """Inputs and targets of each batch."""
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(self.ticks * self.accumulate, 4, 3, generator=generator)
        if self.fixed:
            inputs[:] = inputs[:1].clone()
        targets = inputs.sum(-1, keepdim=True).sin()
        if self.amp:
            targets[SKIPPED] = torch.inf
        return [{"x": x, "labels": y} for x, y in zip(inputs, targets, strict=True)]


@dataclass
class Seen:
    """What came of a training."""

    scheduled: list[tuple[float, ...]] = field(default_factory=list)
    effective: list[tuple[float, ...]] = field(default_factory=list)
    multipliers: list[float] = field(default_factory=list)  # in force when each part ended
    weights: Tensor = field(default_factory=lambda: torch.zeros(0))
    controller: Controller | None = None

    def add(self, model: nn.Module, optimizer: Any, controller: Controller | None, multiplier: float | None) -> None:
        """Adds a part of a training."""
        self.scheduled += getattr(optimizer, "scheduled", [])
        self.effective += getattr(optimizer, "effective", [])
        self.weights = torch.cat([one.detach().float().reshape(-1) for one in model.parameters()])
        self.controller = controller
        if multiplier is not None:
            self.multipliers.append(multiplier)


class Net(nn.Module):
    """Gives its loss with its output when it is given labels, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for one in self.parameters():
                one.copy_(0.5 * torch.randn(one.shape, generator=generator))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.last(torch.tanh(self.first(x)))
        return {"logits": out} if labels is None else {"loss": (out - labels).square().mean(), "logits": out}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups, each with its own rate."""
    first, *rest = model.parameters()
    return [{"params": [first]}, {"params": rest, "lr": 0.02}]


def rate(controller: Controller | None) -> float | None:
    """The multiplier on the learning rate."""
    return None if controller is None else controller.multipliers["lr"]


def parts(case: Case) -> Iterator[tuple[int, int]]:
    """First and last tick of each part of a training."""
    bounds = [0, *([case.pause] if case.pause else []), case.ticks]
    return pairwise(bounds)


def follow(scheduler: Any) -> None:
    """One step of any scheduler, with a metric that stands still where one wants it."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(1.0)
    elif scheduler is not None:
        scheduler.step()


# --- the hosts ----------------------------------------------------------------------------------------------------


def pytorch(case: Case) -> Seen:
    """An ordinary loop."""
    seen, saved, batches = Seen(), [], case.batches()
    for begin, end in parts(case):
        model = Net()
        optimizer = case.make(model)
        scheduler = None if case.schedule is None else case.schedule(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, enabled=case.amp)
        controller = None if case.policy is None else attach(optimizer, model=model, policy=case.policy)
        holders = [one for one in (model, optimizer, scheduler, scaler, controller) if one is not None]
        for holder, state in zip(holders, saved, strict=bool(saved)):
            holder.load_state_dict(state)
        for tick in range(begin, end):
            losses = []
            for batch in batches[tick * case.accumulate : (tick + 1) * case.accumulate]:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.amp):
                    loss = model(**batch)["loss"]
                scaler.scale(loss / case.accumulate).backward()
                losses.append(loss.detach())
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scaler.get_scale() >= scale:
                follow(scheduler)
                if controller is not None:
                    controller.step(torch.stack(losses).mean())
        saved = [holder.state_dict() for holder in holders]
        seen.add(model, optimizer, controller, rate(controller))
    return seen


def accelerated(case: Case) -> Seen:
    """Accelerate. On a CPU it makes no gradient scaler, so it is given one."""
    library = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState

    from trimtab.policies.hosts import accelerate as host

    seen, batches = Seen(), case.batches()
    with tempfile.TemporaryDirectory() as folder:
        for begin, end in parts(case):
            AcceleratorState._reset_state(True)
            precision = "bf16" if case.amp else "no"
            accelerator = library.Accelerator(
                cpu=True, gradient_accumulation_steps=case.accumulate, mixed_precision=precision
            )
            if case.amp:
                accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
            own = Net()
            inner = case.make(own)
            scheduler = None if case.schedule is None else case.schedule(inner)
            model, optimizer = accelerator.prepare(own, inner)
            scheduler = None if scheduler is None else accelerator.prepare(scheduler)
            controller = None
            if case.policy is not None:
                controller = host.attach(accelerator, optimizer, model=model, policy=case.policy)
            if begin:
                accelerator.load_state(folder)
            for batch in batches[begin * case.accumulate : end * case.accumulate]:
                with accelerator.accumulate(model):
                    loss = model(**batch)["loss"]
                    accelerator.backward(loss)
                    optimizer.step()
                    if scheduler is not None:
                        plateau = isinstance(scheduler.scheduler, ReduceLROnPlateau)
                        scheduler.step(*([1.0] if plateau else []))
                    optimizer.zero_grad()
                    if controller is not None:
                        controller.step(loss)
            if end < case.ticks:
                accelerator.save_state(folder)
            behind = None if controller is None else controller.controller
            seen.add(own, inner, behind, rate(behind))
    return seen


def lightning(case: Case) -> Seen:
    """Lightning."""
    library = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from lightning.pytorch.plugins.precision import MixedPrecision

    from trimtab.policies.hosts.lightning import TrimtabCallback

    seen = Seen()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "training.ckpt"
        for begin, end in parts(case):
            module = lightning_module(case)
            callback = None if case.policy is None else TrimtabCallback(policy=case.policy)
            found: list[float] = []
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
            trainer = library.Trainer(
                **QUIET_LIGHTNING,
                max_steps=end,
                accumulate_grad_batches=case.accumulate,
                callbacks=[] if callback is None else [callback, last_of(library, callback, found)],
                plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if case.amp else [],
            )
            trainer.fit(module, Loader(case.batches()), ckpt_path=path if begin else None)
            if end < case.ticks:
                trainer.save_checkpoint(path)
            controller = None if callback is None else callback.controller
            seen.add(module, trainer.optimizers[0], controller, found[0] if found else None)
    return seen


QUIET_LIGHTNING: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Loader:
    """Gives batches in order, and goes on where it stood when a checkpoint was saved."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches, self.done = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        begin, self.done = self.done, 0
        for index in range(begin, len(self.batches)):
            self.done = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def last_of(library: Any, callback: Any, found: list[float]) -> Any:
    """A callback that keeps the multiplier before the controller lets go."""

    class Last(library.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            found.append(callback.controller.multipliers["lr"])

    return Last()


def lightning_module(case: Case) -> Any:
    """``Net`` as a LightningModule."""
    import lightning.pytorch as library

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.log("flat", 1.0)
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            optimizer = case.make(self.net)
            if case.schedule is None:
                return optimizer
            scheduler = {"scheduler": case.schedule(optimizer), "interval": "step", "monitor": "flat"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    return Module()


def huggingface(case: Case) -> Seen:
    """Hugging Face. On a CPU it makes no gradient scaler, so it is given one."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from trimtab.policies.hosts.huggingface import TrimtabCallback

    seen = Seen()
    with tempfile.TemporaryDirectory() as folder:
        for begin, end in parts(case):
            found: list[float] = []
            callback = None if case.policy is None else TrimtabCallback(policy=case.policy)
            trainer = huggingface_trainer(case, folder, callback, end, found)
            trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{begin}" if begin else None)
            inner = trainer.optimizer.optimizer
            controller = None if callback is None else callback.controller
            seen.add(trainer.model, inner, controller, found[0] if found else None)
    return seen


def huggingface_trainer(case: Case, folder: Any, callback: Any, end: int, found: list[float], **more: Any) -> Any:
    """A Trainer that takes the batches in order and stops after ``end`` of all steps, with a checkpoint there."""
    from accelerate.state import AcceleratorState
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    class Last(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step >= end
            if state.global_step == end and callback is not None and callback.controller is not None:
                found.append(callback.controller.multipliers["lr"])

    AcceleratorState._reset_state(True)
    model = Net()
    optimizer = case.make(model)
    scheduler = None if case.schedule is None else case.schedule(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):  # which a Trainer steps after evaluations
        more = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "flat", **more}
    if case.pause:
        more = {"save_strategy": "steps", "save_steps": case.pause, **more}
    settings = {
        "output_dir": str(folder),
        "max_steps": case.ticks,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": case.accumulate,
        "max_grad_norm": 0.0,
        "bf16": case.amp,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        **more,
    }
    rows = [{"x": x, "labels": y} for batch in case.batches() for x, y in zip(*batch.values(), strict=True)]
    trainer = InOrder(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows,
        eval_dataset=rows[:4],
        compute_metrics=lambda outputs: {"flat": 1.0},
        optimizers=(optimizer, scheduler or torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        callbacks=[one for one in (callback, Last()) if one is not None],
    )
    if case.amp:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    return trainer


HOSTS: dict[str, Callable[[Case], Seen]] = {
    "pytorch": pytorch,
    "lightning": lightning,
    "huggingface": huggingface,
    "accelerate": accelerated,
}
MODES: dict[str, Callable[[Case], Case]] = {
    "plain": lambda case: case,
    "amp": lambda case: replace(case, amp=True),
    "accumulation": lambda case: replace(case, accumulate=3),
    "resume": lambda case: replace(case, pause=4),
}
