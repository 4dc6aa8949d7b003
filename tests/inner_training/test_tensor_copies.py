"""Snapshots in host memory: everything that is copied lies there, and comes back as it was, where it was."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tests.policies.live import Loop, Scripted
from trimtab.errors import UnknownNameError
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.live_snapshot import LiveSnapshots
from trimtab.inner_training.tensor_copies import Copy, Tree, again, copied
from trimtab.policies.attach import attach

META = torch.device("meta")  # another device than the originals', also on a machine that has one alone


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of anything that holds some."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Copy):
        yield value.values
    elif isinstance(value, Tree):
        yield from tensors(value.held)
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)


class Averages:
    """A stateful object that keeps tensors in many ways, and hands them out as they are."""

    def __init__(self, weight: Tensor) -> None:
        self.state: dict[str, Any] = {"plain": weight, "list": [weight, {"deep": (weight, 3)}], "name": "ema"}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.mark.parametrize(
    "make", [lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.01)), lambda ps: torch.optim.LBFGS(ps, max_iter=3)]
)
def test_everything_lies_where_it_is_wanted(make: Any) -> None:
    loop = Loop(make, norm=True)

    def closure() -> Tensor:
        loop.optimizer.zero_grad()
        loss = loop.loss()
        loss.backward()
        return loss

    loop.optimizer.step(closure), loop.optimizer.step(closure)
    for device in (META, None):
        stateful = Averages(torch.ones(2)), AveragedModel(loop.model)
        snapshots = LiveSnapshots(loop.optimizer, loop.model, stateful, device=device)
        snapshots.take(2)
        moment = snapshots._confirmed
        assert moment is not None
        parts = ([one for _, one in moment.parameters], moment.buffers, moment.state, moment.groups, moment.others)
        found = [{one.device.type for one in tensors(part)} for part in parts]
        where = "cpu" if device is None else "meta"
        assert found[:3] == [{where}] * 3 and found[3] <= {where} and found[4] == {where}


def test_trees_come_back_as_they_were_where_they_were() -> None:
    weight = torch.arange(3.0)
    state = nn.Linear(2, 1).state_dict()
    given = {"a": [weight, (weight, "text")], "module": state, "size": torch.Size([2])}
    held = copied(given, torch.device("cpu"))
    weight += 1
    found, once_more = again(held), again(held)
    assert found["a"][0].tolist() == found["a"][1][0].tolist() == [0, 1, 2] and found["a"][1][1] == "text"
    assert isinstance(found["module"], OrderedDict) and found["module"]._metadata == state._metadata  # type: ignore[attr-defined]
    assert found["size"] == torch.Size([2]) and type(found["size"]) is torch.Size
    found["a"][0].zero_()
    assert once_more["a"][0].tolist() == again(held)["a"][0].tolist() == [0, 1, 2], "each time anew"
    assert Copy(torch.ones(2), META).again().device == META


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, lambda ps: torch.optim.SGD(ps, lr=torch.tensor(0.05), momentum=0.9)]
)
def test_a_run_with_snapshots_in_host_memory_is_the_same_bit_for_bit(make: Any) -> None:
    found, start = [], {name: one.clone() for name, one in Loop(make, norm=True).model.state_dict().items()}
    for place in ("device", "cpu"):
        loop = Loop(make, norm=True)
        loop.model.load_state_dict(start)
        average = AveragedModel(loop.model, use_buffers=True)
        schedule = torch.optim.lr_scheduler.StepLR(loop.optimizer, 4)
        config = GuardConfig(snapshots=place)  # type: ignore[arg-type]
        options: dict[str, Any] = {"model": loop.model, "stateful": (average, schedule), "guard": config}
        loop.controller = attach(loop.optimizer, policy=Scripted([[0.9]]), **options)
        assert loop.controller._snapshots._device == (torch.device("cpu") if place == "cpu" else None)  # type: ignore[union-attr]
        for step in range(60):
            loop.step(spoil=math.nan if step in (31, 47) else None)
            average.update_parameters(loop.model)
            schedule.step()
        assert sum(one.rolled_back for one in loop.decisions) == 2
        found.append([*loop.model.state_dict().values(), *average.state_dict().values(), loop.weights()])
        found[-1] += [torch.tensor(loop.losses), torch.tensor(float(schedule.last_epoch))]
    assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(*found, strict=True))
    assert torch.isfinite(found[0][-3]).all()


def test_another_place_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown place of snapshots 'host'; .*allowed: device, cpu"):
        GuardConfig(snapshots="host")  # type: ignore[arg-type]
