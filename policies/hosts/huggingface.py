"""Hugging Face: ``Trainer(callbacks=[TrimtabCallback(policy="default")])``.

``TrimtabCallback`` is made when it is first asked for, because that imports transformers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from trimtab.errors import UserError, require_extra
from trimtab.inner_training.guard import GuardConfig
from trimtab.policies.audit import AuditFile
from trimtab.policies.controller import Controller
from trimtab.policies.hosts.hosted import Common, Hosted, HostOptions
from trimtab.policies.policy import Policy

NAME = "TrimtabCallback"


def loss_of(outputs: Any) -> Tensor | None:
    """The loss in the output of a model's forward pass, where the Trainer looks for it; None where there is none.

    >>> loss_of({"loss": torch.tensor(2.0)}), loss_of((torch.zeros(3, 2),)), loss_of({"logits": torch.zeros(3)})
    (tensor(2.), None, None)
    """
    if isinstance(outputs, Mapping):
        found = outputs.get("loss")
    else:
        found = outputs[0] if isinstance(outputs, tuple | list) and outputs else None
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


class HuggingFaceHooks:
    """Steers a Hugging Face training, once per optimizer step.

    The Trainer tells its callbacks no loss. It is taken from the model's output by a forward hook, as the Trainer takes
    it; where the loss is computed outside of the model (``compute_loss_func``, label smoothing, a Trainer's own
    ``compute_loss``), call ``callback.follow(trainer)`` once before ``trainer.train()``. A gradient scaler is rolled
    back with the model.

    The controller's state lies in ``trainer_state.json`` of each checkpoint, and is restored from there by the callback
    itself, whether ``restore_callback_states_from_checkpoint`` is set or not. If it is, the Trainer replaces this
    object by one made from the checkpoint; then the policy must be given by name or path, and the acting callback is
    found in ``trainer.callback_handler.callbacks``.

    Args:
        policy: as for ``trimtab.attach``.
        monitor: name of the validation loss among the metrics of an evaluation.
        guard: as for ``trimtab.attach``; or its settings by name, as a checkpoint holds them.
        audit: as for ``trimtab.attach``; or the fields of an ``AuditFile`` by name.
        total_steps: optimizer steps of the whole training, None for the Trainer's ``max_steps``.
        options: ``decide_every``, ``mode``, ``stateful``, ``structure`` (objects) and ``process_group`` as for ``trimtab.attach``;
            ``stop_when_lost=True`` ends the training when the run has diverged for good.

    Raises:
        UserError: when the training starts: an argument that cannot be used, or a checkpoint of another controller
            or optimizer; or when no loss is found at the first step.
    """

    def __init__(
        self,
        policy: str | os.PathLike[str] | Policy = "default",
        *,
        monitor: str = "eval_loss",
        total_steps: int | None = None,
        guard: GuardConfig | Mapping[str, Any] | bool | None = None,
        audit: str | os.PathLike[str] | AuditFile | Mapping[str, Any] | None = None,
        **options: Unpack[Common],
    ) -> None:
        objects = (options.get("stateful"), options.get("process_group"), options.get("structure"))
        if isinstance(policy, Mapping) or any(isinstance(one, str) for one in objects):
            raise UserError(
                "restore_callback_states_from_checkpoint=True makes the Trainer rebuild the callback from JSON, which "
                "cannot hold a policy object, stateful objects, a structure or a process group; leave it False (the controller is "
                "restored anyway), or give the policy by name or path, and none of the others"
            )
        for name in ("stateful", "structure"):
            if callable(options.get(name)):
                raise UserError(
                    f"{name} is a function, but a Trainer does not show itself to its callbacks, so there is nothing to call it "
                    "with; give the objects themselves"
                )
        self._monitor = monitor
        self._hosted = Hosted(
            HostOptions(
                policy=policy,
                total_steps=total_steps,
                guard=GuardConfig(**guard) if isinstance(guard, Mapping) else guard,
                audit=AuditFile(**audit) if isinstance(audit, Mapping) else audit,
                **options,
            ),
            tensors=False,  # what a Trainer keeps of its callbacks is JSON
        )
        self._handle: Any = None
        self._follows = self._total = False

    @property
    def controller(self) -> Controller | None:
        """The controller of this training, or of the last one; None before the first has started."""
        return self._hosted.controller

    def follow(self, trainer: Any) -> None:
        """Takes the loss from what ``trainer.training_step`` returns, whatever computes it; call it before ``train()``."""
        inner = trainer.training_step

        @functools.wraps(inner)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            loss = inner(*args, **kwargs)  # scaled for gradient accumulation: the micro-batches add up
            self._hosted.note(loss)
            return loss

        trainer.training_step = training_step
        self._follows = self._total = True

    # --- the state that Trainer keeps ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint: how to make this callback again, and the controller's state."""
        options = self._hosted.options
        by_name = isinstance(options.policy, str | os.PathLike)
        guard, audit = options.guard, options.audit
        path = None if audit is None else os.fspath(audit)
        arguments = {
            "policy": os.fspath(options.policy) if by_name else {"object": type(options.policy).__name__},  # type: ignore[arg-type]
            "total_steps": options.total_steps,
            "decide_every": options.decide_every,
            "mode": options.mode,
            "guard": guard.plain() if isinstance(guard, GuardConfig) else guard,
            "stateful": "objects" if options.stateful else [],
            "audit": {**asdict(audit), "path": path} if isinstance(audit, AuditFile) else path,
            "process_group": None if options.process_group is None else "object",
            "structure": None if options.structure is None else "object",
            "stop_when_lost": options.stop_when_lost,
            "monitor": self._monitor,
        }
        return {"args": arguments, "attributes": {"saved": self.saved}}

    @property
    def saved(self) -> dict[str, Any] | None:
        """The controller's state in plain values; setting it keeps a state until the training starts."""
        return self._hosted.state_dict()

    @saved.setter
    def saved(self, state: Mapping[str, Any] | None) -> None:
        self._hosted.load_state_dict(state)

    def _resume(self, state: Any) -> None:
        """Takes the controller's state from that of the Trainer, which would not always restore it."""
        stored = (state.stateful_callbacks or {}).get(NAME)
        first = stored[0] if isinstance(stored, list) and stored else stored
        found = first.get("attributes", {}).get("saved") if isinstance(first, Mapping) else None
        if state.global_step == 0:
            found = None  # what stands there is of an earlier training of this process
        self._hosted.load_state_dict(found)
        if state.stateful_callbacks is not None:
            state.stateful_callbacks.setdefault(NAME, {})  # the Trainer cannot save a callback that it has not read

    # --- what the Trainer calls ---------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches the controller: model, optimizer and scheduler have been restored by now."""
        self._let_go()
        self._resume(state)
        optimizer, model = kwargs.get("optimizer"), kwargs.get("model")
        scaler = getattr(optimizer, "scaler", None)
        self._hosted.begin(
            optimizer,
            model,
            host=None,
            total_steps=state.max_steps if state.max_steps > 0 else None,
            also=() if scaler is None else (scaler,),
            done=state.global_step,
        )
        try:
            self._watch(model)
        except BaseException:
            self._hosted.withdraw()
            raise

    def _watch(self, model: Any) -> None:
        if isinstance(model, nn.Module) and not self._follows:
            self._total = False
            hook = torch.compiler.disable(self._forward)  # type: ignore[no-untyped-call]
            self._handle = model.register_forward_hook(hook, with_kwargs=True)

    def _forward(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        loss = loss_of(outputs)
        if loss is not None:
            self._total = kwargs.get("num_items_in_batch") is not None  # then the losses of micro-batches add up
            self._hosted.note(loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tells the controller of an optimizer step, unless a gradient scaler skipped it."""
        if not self._hosted.noted and not self._hosted.told:
            raise UserError(
                "no loss was found in the model's output; call callback.follow(trainer) before trainer.train() where "
                "the loss is computed outside of the model"
            )
        self._hosted.step(total=self._total)
        if self._hosted.stops:
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Passes the validation loss on, with the next step."""
        self._hosted.validated((metrics or {}).get(self._monitor))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets go of model and optimizer."""
        self._let_go()

    def _let_go(self) -> None:
        self._hosted.end()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def __getattr__(name: str) -> Any:
    """Makes the callback on first use."""
    if name != NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    framework = require_extra("transformers.trainer_callback", "huggingface")
    bases = (HuggingFaceHooks, framework.TrainerCallback, framework.ExportableState)
    made = type(name, bases, {"__doc__": HuggingFaceHooks.__doc__, "__module__": __name__})
    globals()[name] = made
    return made
