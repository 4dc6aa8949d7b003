"""Models whose units are edited in hosts: a training that was saved and resumed is as one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_pruning")

from tests.policies.hosts.machines import QUIET_LIGHTNING, Case, Loader, Net
from tests.policies.hosts.test_composer import Stub
from tests.policies.live import Scripted

import trimtab
from trimtab.errors import MismatchError
from trimtab.inner_training.edits import EditConfig
from trimtab.policies.editing import Editing
from trimtab.policies.hosts.composer import TrimtabAlgorithm
from trimtab.policies.hosts.hosted import Hosted, HostOptions

STEPS, PAUSE = 24, 13
# Units that were removed before the pause come back after it, with the weights that they had: these are in no weight.
CONFIG = EditConfig(criterion="magnitude", growth="random-parked", rest=0, least=0.2)
TARGETS = [[0.6], [0.4], [0.4], [0.8], [1.0], [0.6]]


def policy() -> Scripted:
    return Scripted(TARGETS, levers={"width": "targets"}, decide_every=4)  # type: ignore[arg-type]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def editing(model: nn.Module, optimizer: torch.optim.Optimizer) -> Editing:
    return Editing(trimtab.gates(model, optimizer, torch.zeros(1, 3)), config=CONFIG)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([one.detach().reshape(-1) for one in model.parameters()])


def lightning(folder: Path, parts: list[tuple[int, int]]) -> Tensor:
    library = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from trimtab.policies.hosts.lightning import TrimtabCallback

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss: Tensor = self.net(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> Any:
            return adam(self.net)

    path = folder / "training.ckpt"
    for begin, end in parts:
        module = Module()
        callback = TrimtabCallback(
            policy(), total_steps=STEPS, structure=lambda trainer: editing(trainer.model.net, trainer.optimizers[0])
        )
        trainer = library.Trainer(**QUIET_LIGHTNING, max_steps=end, callbacks=[callback])
        trainer.fit(module, Loader(Case(steps=STEPS).batches()), ckpt_path=path if begin else None)
        trainer.save_checkpoint(path)
    return weights(module)


def accelerate(folder: Path, parts: list[tuple[int, int]]) -> Tensor:
    library = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState

    from trimtab.policies.hosts import accelerate as host

    for begin, end in parts:
        AcceleratorState._reset_state(True)
        accelerator = library.Accelerator(cpu=True)
        own = Net()
        inner = adam(own)
        model, optimizer = accelerator.prepare(own, inner)
        structure = editing(own, inner)
        controller = host.attach(
            accelerator, optimizer, model=model, policy=policy(), total_steps=STEPS, structure=structure
        )
        if begin:
            accelerator.load_state(folder)
        for batch in Case(steps=STEPS).batches()[begin:end]:
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            controller.step(loss)
        accelerator.save_state(folder)
    return weights(own)


def composer(folder: Path, parts: list[tuple[int, int]]) -> Tensor:
    path = folder / "training.pt"
    for begin, end in parts:
        algorithm = TrimtabAlgorithm(
            policy(), total_steps=STEPS, structure=lambda state: editing(state.model, state.optimizers[0])
        )
        stub = Stub(Case(steps=STEPS, make=adam), algorithm)
        if begin:
            stub.load(torch.load(path, weights_only=True))
        stub.fit(end - begin)
        torch.save(stub.save(), path)
    return weights(stub.state.model)


@pytest.mark.parametrize("host", [lightning, accelerate, composer])
def test_a_resumed_training_is_as_one_that_was_not_stopped(host: Any, tmp_path: Path) -> None:
    whole, stopped = (tmp_path / name for name in ("whole", "stopped"))
    for folder in (whole, stopped):
        folder.mkdir()
    assert torch.equal(host(whole, [(0, STEPS)]), host(stopped, [(0, PAUSE), (PAUSE, STEPS)]))


def test_a_host_of_plain_values_keeps_no_tensors() -> None:
    model = Net()
    optimizer = adam(model)
    hosted = Hosted(HostOptions(policy=policy(), structure=editing(model, optimizer)), tensors=False)
    hosted.begin(optimizer, model, host=None, total_steps=STEPS)
    assert "structure_state" not in json.loads(json.dumps(hosted.state_dict()))
    hosted.end()


@pytest.mark.parametrize("damage", ["structure_state", "structure"])
def test_a_state_of_other_units_is_refused_and_nothing_stays_attached(damage: str) -> None:
    """The structure's own state is read before attaching, the controller's after it."""

    def begun(saved: Any = None) -> Hosted:
        hosted = Hosted(HostOptions(policy=policy(), structure=Editing(structure, config=CONFIG)))
        hosted.load_state_dict(saved)
        hosted.begin(optimizer, model, host=None, total_steps=STEPS)
        return hosted

    model = Net()
    optimizer = adam(model)
    structure = editing(model, optimizer).structure
    first = begun()
    saved = first.state_dict()
    first.end()
    assert saved is not None
    saved[damage]["active"] = {"first": torch.ones(4, dtype=torch.bool) if damage == "structure_state" else "0" * 64}
    before, active = len(optimizer._optimizer_step_pre_hooks), structure.active["first"]
    with pytest.raises(MismatchError, match="units|groups"):
        begun(saved)
    assert len(optimizer._optimizer_step_pre_hooks) == before
    assert torch.equal(structure.active["first"], active)
