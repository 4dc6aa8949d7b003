"""Random sequences of edits and training steps, over modules and optimizers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from tests.inner_training.structure.test_edits import differing, picture
from tests.inner_training.structure.test_gating import assert_held
from tests.inner_training.structure.zoo import OPTIMIZERS, ZOO, make, mean_square, train
from trimtab.errors import UserError
from trimtab.inner_training.structure.edit import Edit
from trimtab.inner_training.structure.structure import Structure

METHODS = ("pairing", "random", "zero-out", "net2wider", "random-parked")
STATES = ("zero", "transplant")
KINDS = ("prune", "grow", "reset", "undo", "undo", "train")
# Muon is for matrices, of which there are none among transposed convolutions.
COMBINATIONS = [pair for pair in itertools.product(ZOO, OPTIMIZERS) if pair != ("transposed", "muon")]


class Sequence:
    """One random sequence; each operation checks what it must leave alone."""

    def __init__(self, name: str, optimizer: str, seed: int) -> None:
        self.draws = torch.Generator().manual_seed(seed)
        self.model, self.example = make(name, seed)
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        if self.pick(("cold", "warm")) == "warm":
            train(self.model, self.optimizer, self.example, 2)
        self.structure: Structure = trimtab.gates(self.model, self.optimizer, self.example)
        self.edits: list[tuple[Edit, dict[str, Any], bool]] = []  # with the picture before, and whether it still holds

    def pick(self, options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=self.draws))]

    def run(self, length: int) -> None:
        for _ in range(length):
            self.check(self.pick(KINDS))
        assert_held(self.structure, self.optimizer)
        self.check_optimizer()

    def check(self, kind: str) -> None:
        if kind == "train":
            train(self.model, self.optimizer, self.example, 1)
            self.edits = [(edit, before, False) for edit, before, _ in self.edits]
        elif kind == "undo":
            self.undo()
        else:
            before, active = picture(self.model, self.optimizer), self.structure.active
            try:
                edit = self.make_edit(kind)
            except UserError:
                assert differing(before, picture(self.model, self.optimizer)) == []
                return
            self.check_survivors(edit, before, active)
            self.edits.append((edit, before, True))

    def make_edit(self, kind: str) -> Edit:
        share = self.pick((0.2, 0.4, 0.6))
        if kind == "prune":
            return self.structure.prune(share, self.pick(("magnitude", "random")), self.pick(("global", "layer")))
        if kind == "grow":
            return self.structure.grow(share, self.pick(METHODS), newborn_state=self.pick(STATES))
        name = self.pick(list(self.structure.groups))
        chosen = torch.rand(self.structure.groups[name], generator=self.draws) < share
        return self.structure.reset({name: chosen & self.structure.active[name]})

    def check_survivors(self, edit: Edit, before: dict[str, Any], active: dict[str, Tensor]) -> None:
        """What belongs to no unit of the edit is as before; growth may also rescale columns of incumbents."""
        gates, after = self.structure._gates, picture(self.model, self.optimizer)
        touched: dict[str, Tensor] = {}
        for name, units in edit.units.items():
            group = gates.groups[name]
            for key, mask in gates.entries(group, units).items():
                touched[key] = touched.get(key, torch.zeros_like(mask)) | mask
        loose = {one.parameter for name in edit.units for one in gates.groups[name].of_role("column")}
        for key, value in before.items():
            kind, _, name = key.partition(".")
            if not isinstance(value, Tensor):
                assert value == after[key]
            elif name in touched and value.shape == touched[name].shape:
                if not (edit.kind == "grow" and kind == "model" and name in loose):
                    assert torch.equal(value[~touched[name]], after[key][~touched[name]]), key
            else:
                assert torch.equal(value, after[key]), key
        changed = {"prune": (True, False), "grow": (False, True), "reset": (True, True)}[edit.kind]
        for name, units in edit.units.items():
            assert active[name][units].eq(changed[0]).all() and self.structure.active[name][units].eq(changed[1]).all()

    def undo(self) -> None:
        if not self.edits:
            return
        edit, before, exact = self.edits.pop()
        record = self.structure._editor._history[-1].records[0]
        now = picture(self.model, self.optimizer)
        edit.undo()
        after = picture(self.model, self.optimizer)
        if exact:
            assert differing(before, after) == []
            return
        for name, saved in record.entries.items():
            tensor = self.structure._gates.tensor(name).detach()
            assert torch.equal(tensor.reshape(-1)[saved.where], before[f"model.{name}"].reshape(-1)[saved.where])
        touched = {name for one in self.structure._gates.groups.values() for name in (m.parameter for m in one.members)}
        for key, value in now.items():
            if key.partition(".")[2] not in touched and isinstance(value, Tensor):
                assert torch.equal(value, after[key]), key

    def check_optimizer(self) -> None:
        """After compaction the optimizer holds exactly the live parameters, and state of their shapes."""
        self.model.eval()
        wanted = {id(one) for one in self.model.parameters()}
        given = {id(one) for group in self.optimizer.param_groups for one in group["params"]}
        partial = len(given) < len(wanted)  # an optimizer of some parameters
        before = self.model(self.example).detach()
        self.structure.compact()
        assert torch.allclose(self.model(self.example), before, atol=1e-5)
        live = {id(one): one for one in self.model.parameters()}
        held = [one for group in self.optimizer.param_groups for one in group["params"]]
        assert {id(one) for one in held} <= live.keys() and (partial or len(held) == len(live))
        for one in held:
            for value in self.optimizer.state.get(one, {}).values():
                assert not isinstance(value, Tensor) or value.numel() == 1 or value.shape == one.shape
        assert all(id(one) in live for one in self.optimizer.state)
        for name, group in self.structure._gates.groups.items():
            assert group.kept or bool(self.structure.active[name].all())
        train(self.model, self.optimizer, self.example, 2)
        assert all(torch.isfinite(one).all() for one in self.model.parameters())
        mean_square(self.model, self.example).backward()


@pytest.mark.parametrize("index", range(30))
def test_some_random_sequences(index: int) -> None:
    name, optimizer = COMBINATIONS[(index * 37) % len(COMBINATIONS)]
    Sequence(name, optimizer, index).run(8)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(100))
def test_a_thousand_random_sequences(part: int) -> None:
    for index in range(part * 10, (part + 1) * 10):
        name, optimizer = COMBINATIONS[index % len(COMBINATIONS)]
        Sequence(name, optimizer, 1000 + index).run(10)
