"""Structural levers under ``attach``: what rules do to a real model, what holds them, what is undone, saved and refused."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torch_pruning")

from tests.inner_training.problems import SmallDigits, plain_optimizer
from tests.policies.edited import Digits, mean_loss, network, same
from tests.policies.live import Scripted
from tests.policies.made_up import learned

from trimtab.agents.audit_report import run_report
from trimtab.envs.structures import COUNTS, Structures
from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.edits import EditConfig
from trimtab.inner_training.guard import REASON_WORDS, GuardConfig, Reason, in_words
from trimtab.inner_training.measurements import UNITS
from trimtab.inner_training.population import Population
from trimtab.inner_training.signals import SIGNALS, resolve_signals
from trimtab.inner_training.steering import Steering
from trimtab.inner_training.structure.entry import gates
from trimtab.inner_training.task import OptimizerSettings
from trimtab.inner_training.telemetry import Measured
from trimtab.policies.attach import attach
from trimtab.policies.audit import read_audit, verify_audit
from trimtab.policies.editing import Editing
from trimtab.policies.hosts.hosted import Hosted, HostOptions

WIDTH = {"width": "targets"}
UNIT_SIGNALS = tuple(name for name, signal in SIGNALS.items() if signal.group == "structure")


def wanting(*targets: float, every: int | None = 5) -> Scripted:
    """Gives targets for the active share."""
    return Scripted([[one] for one in targets], levers=dict(WIDTH), decide_every=every)  # type: ignore[arg-type]


def idle_is_zero(loop: Digits) -> None:
    gates = loop.structure.editor.gates
    for name, mask in gates.active.items():
        for tensor, entries in gates.entries(gates.groups[name], (~mask).nonzero()[:, 0]).items():
            assert not gates.tensor(tensor)[entries].any()


@pytest.mark.parametrize(("normalisation", "least"), [("mean", 0.4), ("none", 0.0)])
def test_a_group_of_small_scores_keeps_its_share_where_they_are_normalised(normalisation: str, least: float) -> None:
    loop = Digits()
    with torch.no_grad():
        loop.model.get_parameter("2.weight").mul_(1e-3)
    loop.attach(wanting(0.5), loop.editing(criterion="magnitude-l1", normalisation=normalisation))
    left = {name: float(mask.float().mean()) for name, mask in loop.structure.active.items()}
    assert min(left.values()) >= least
    assert (left["2"] < 0.2) == (normalisation == "none")


# --- rules on a real model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start", "least", "most", "loss"),
    [
        ("prune-cubic", 0.0, 0.25, 0.35, 0.7),
        ("prune-steps", 0.0, 0.18, 0.25, 0.8),  # a fifth of 28 units is not much
        ("newborn-aware", 0.8, 0.75, 0.85, 0.7),
        ("rewire", 0.3, 0.5, 0.75, 0.7),
    ],
)
def test_rules_reach_their_share_and_the_model_still_learns(
    name: str, start: float, least: float, most: float, loss: float
) -> None:
    loop = Digits()
    if start:
        loop.structure.prune(start, "random", "layer")
    loop.attach(name)
    first = np.mean([loop.step() for _ in range(10)])
    loop.run(180)
    assert np.mean([loop.step() for _ in range(10)]) < loss * first
    assert least <= sum(loop.active.values()) / 28 <= most
    idle_is_zero(loop)
    assert loop.controller is not None
    assert "width: now" in loop.controller.summary() and "of the units" in loop.controller.summary()


def test_dormant_units_are_reset() -> None:
    loop = Digits()
    with torch.no_grad():
        loop.model[0].weight[:6] = 0.0  # type: ignore[index]
        loop.model[0].bias[:6] = -1.0  # type: ignore[index]
    loop.attach("dormant-reset").run(6)
    assert (loop.structure.ages["0"] <= 1).sum() == 3 and loop.active == {"0": 16, "2": 12}
    assert "reset 3 units of 0" in loop.decisions[4].reason and loop.decisions[4].acted


# --- the same as in an environment -------------------------------------------------------------------------------


class Layers(SmallDigits):
    def __init__(self) -> None:
        super().__init__()
        self.module = network()  # type: ignore[assignment]

    def instance(self, *args: Any, **options: Any) -> Any:
        made = super().instance(*args, **options)
        object.__setattr__(made, "buffers", {})
        return made


CONFIG = EditConfig(growth="activation-frequency", rest=2, least=0.25, most_active=0.9, budget=6)
SCRIPT = [1.0, 0.5, 0.7, 0.7, 0.6, 0.8, 0.01, 0.01, 0.05, 1.0, 1.0, 1.0, 0.7, 0.7, 0.7, 0.5, 0.5, 0.5, 0.6]
SETTINGS = OptimizerSettings(rule="adam", lr=5e-3)


def eyes() -> Scripted:
    return Scripted([[one] for one in SCRIPT], levers=dict(WIDTH), signals=UNIT_SIGNALS)  # type: ignore[arg-type]


def in_a_population(family: Layers, instance: Any, policy: Scripted) -> tuple[list[np.ndarray], list[str]]:
    """Active units and the guard's words, decision by decision."""
    population = Population(family, 1, rules=("adam",), mode="eager")
    population.reset([0], [instance])
    structures = Structures([population], CONFIG)
    structures.measured = True
    steering = Steering((), resolve_signals(policy.signals), GuardConfig(), 1, CONFIG)
    steering.reset(np.ones(1, dtype=bool), population.base)
    state, measured, active, words = policy.init(1), None, [], []
    for _ in SCRIPT:
        reading = population.reading(measured, np.full(1, np.nan))
        reading.units = structures.units
        steering.assess(reading).carry_out(population)
        actions, state = policy.act(steering.observe(reading), state)
        move = steering.decide(actions, policy.levers)
        structures.edit(move.edits)
        words.append(in_words(int(move.edit_reasons["width"][0])))
        telemetry = population.advance(5)
        rows = structures.rows(0)
        host = telemetry.to_host()
        found = {name: value.double().numpy() for name, value in rows.items()}
        structures.note(found[COUNTS])
        measured = Measured(**{**vars(host), "probed": {UNITS: found[UNITS]} if UNITS in found else {}})
        active.append(structures.units.active[0])
    return active, words


def in_a_loop(family: Layers, instance: Any, policy: Scripted, path: Path) -> tuple[list[np.ndarray], list[str]]:
    source = Population(family, 1, rules=("adam",), mode="eager")
    source.reset([0], [instance])
    model = network()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(instance.parameters[name]))
    optimizer, step = plain_optimizer(model, SETTINGS), 0
    structure = trimtab_gates(model, optimizer)

    def loss_fn(module: Any, batch: Any) -> torch.Tensor:
        return family.loss(module(batch[0]), batch[1]).mean()

    editing = Editing(structure, lambda: [source.batch(0, step)], loss_fn, CONFIG)
    controller = attach(
        optimizer, model=model, policy=policy, total_steps=200, decide_every=5, structure=editing, audit=path
    )
    del policy.seen[:-1]  # the trial that every policy is put to
    for step in range(5 * (len(SCRIPT) - 1)):
        batch = source.batch(0, step)
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        step += 1
        controller.step(loss)
    lines = [line for line in read_audit(path) if line["kind"] == "decision"]
    words = [line["guard"] for line in lines]
    return [np.array(list(line["active"].values())) for line in lines], words


def trimtab_gates(model: Any, optimizer: Any) -> Any:
    import trimtab

    return trimtab.gates(model, optimizer, torch.zeros(1, 64))


def test_edits_signals_and_reasons_are_those_of_a_population(tmp_path: Path) -> None:
    family = Layers()
    instance = family.instance(3, SETTINGS)
    one, other = eyes(), eyes()
    active, words = in_a_population(family, instance, one)
    same_active, same_words = in_a_loop(family, instance, other, tmp_path / "run.jsonl")
    np.testing.assert_array_equal(np.array(active), np.array(same_active))
    assert words == same_words
    assert len({tuple(row) for row in np.array(active).tolist()}) >= 5
    said = " ".join(words)
    for reason in (Reason.RESTING, Reason.NARROWEST, Reason.WIDEST, Reason.EDITS_SPENT):
        assert REASON_WORDS[reason] in said
    seen, again = np.concatenate(one.seen[-len(SCRIPT) :]), np.concatenate(other.seen)
    np.testing.assert_allclose(again, seen, atol=2e-3)
    assert (seen != 0).any(0).all(), "a signal that was never known"


# --- the guard ---------------------------------------------------------------------------------------------------


@dataclass
class Watched(Scripted):
    """Keeps the run as it is at each decision, before anything is edited."""

    look: Callable[[], dict[str, Any]] | None = None
    kept: list[dict[str, Any]] = field(default_factory=list)

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        if self.look is not None:
            self.kept.append(self.look())
        return super().act(observations, state)


@pytest.mark.parametrize("place", ["device", "cpu"])
@pytest.mark.parametrize(
    ("targets", "edited", "restored"),
    [
        ((1.0, 1.0, 1.0, 1.0, 0.4), 11, 28),  # the edit is younger than the moment that is restored
        ((1.0, 0.5, 0.5, 0.5, 0.5), 14, 14),  # older
        ((0.5, 0.5, 0.5, 0.5, 0.5, 0.9), 25, 14),  # one of each
    ],
)
def test_a_rollback_restores_weights_state_and_units_bit_for_bit(
    targets: tuple[float, ...], edited: int, restored: int, place: Any
) -> None:
    loop = Digits()
    policy = Watched([[one] for one in targets], levers=dict(WIDTH))  # type: ignore[arg-type]
    loop.attach(policy, loop.editing(rest=1), guard=GuardConfig(snapshots=place))
    policy.look = loop.everything
    loop.run(29)
    assert sum(loop.active.values()) == edited
    loop.step(spoil=math.nan)
    assert loop.decisions[-1].rolled_back and sum(loop.active.values()) == restored
    assert any(same(kept, loop.everything()) for kept in policy.kept[:-1])
    loop.run(30)
    idle_is_zero(loop)


@pytest.mark.parametrize("given", [True, False])
def test_a_rollback_takes_edits_of_the_users_own_back(given: bool) -> None:
    """Also under a policy that edits nothing, whether it was given the structure or not."""
    loop, policy = Digits(), Scripted([[0.0]], levers={"lr": "moves"})  # type: ignore[arg-type]
    structure = loop.structure if given else None
    loop.controller = attach(
        loop.optimizer, model=loop.model, policy=policy, total_steps=200, decide_every=5, structure=structure
    )
    loop.run(27)
    loop.structure.prune(0.5, "magnitude", "layer")
    with torch.no_grad():
        next(loop.model.parameters()).fill_(math.nan)
    loop.run(10)
    assert any(decision.rolled_back for decision in loop.decisions)
    assert loop.active == {"0": 16, "2": 12}
    idle_is_zero(loop)
    assert all(bool(loop.model.get_parameter(f"{name}.weight").any(1).all()) for name in loop.active)


def test_compaction_waits_for_the_controller() -> None:
    loop = Digits().attach(wanting(0.5)).run(12)
    with pytest.raises(UserError, match="call controller.detach"):
        loop.structure.compact()
    assert loop.controller is not None
    loop.controller.detach()
    loop.structure.compact()
    loop.attach(wanting(0.75)).run(6)
    assert sum(loop.structure.groups.values()) == 14


def test_gates_come_before_the_controller() -> None:
    loop = Digits().attach(wanting(1.0))
    with pytest.raises(MismatchError, match="call trimtab.gates before attach"):
        gates(loop.model, loop.optimizer, torch.zeros(1, 64))


def test_the_users_own_edit_is_undone_after_those_of_the_controller() -> None:
    loop = Digits()
    own = loop.structure.prune(0.25, "random", "layer")
    loop.attach(wanting(0.5)).run(1)
    gone = {name: ~mask for name, mask in loop.structure.active.items()}
    own.undo()
    idle_is_zero(loop)
    for name, mask in loop.structure.active.items():
        gone[name][own.units[name]] = False
        assert torch.equal(~mask, gone[name])
    loop.run(20)
    idle_is_zero(loop)


def test_a_hard_prune_is_no_setback_and_without_the_edit_the_same_rise_is() -> None:
    loop = Digits()
    loop.attach(wanting(*[1.0] * 24, 0.25), loop.editing(criterion="magnitude"))
    losses = [loop.step() for _ in range(160)]
    before, after = np.mean(losses[115:120]), np.mean(losses[122:125])
    assert np.log(after / before) > 0.6, "the prune was meant to hurt"
    assert not any(decision.rolled_back for decision in loop.decisions)
    assert sum(loop.active.values()) == 7
    plain = Digits()
    plain.controller = attach(plain.optimizer, model=plain.model, policy="constant", total_steps=200, decide_every=5)
    plain.run(120)
    plain.structure.prune(0.75, "magnitude")
    plain.run(40)
    assert any(decision.rolled_back for decision in plain.decisions)


def test_the_null_policy_with_a_structure_is_bit_identical_to_no_controller() -> None:
    alone, steered = Digits(), Digits()
    for one in (alone, steered):
        one.structure.prune(0.3, "magnitude")
    steered.attach("constant")
    alone.run(60)
    steered.run(60)
    assert same(alone.everything(), steered.everything())


def test_an_anchor_does_not_pull_on_edited_units() -> None:
    table = [[0.4, 0.0], [0.4, 0.0], [0.4, 1.0], [0.4, 0.0]]
    policy = Scripted(table, levers={"width": "targets", "anchor": "events"})
    loop = Digits().attach(policy).run(50)
    assert sum(loop.active.values()) == 11
    idle_is_zero(loop)


# --- saying and saving -------------------------------------------------------------------------------------------


def test_the_audit_tells_each_edit_with_units_reasons_and_outcome(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    loop = Digits()
    loop.attach(wanting(1.0, 0.5, 0.6), loop.editing(rest=1), audit=path).run(40)
    lines = read_audit(path)
    assert verify_audit(path).holds
    assert lines[0]["structure"]["units"] == {"0": 16, "2": 12} and lines[0]["structure"]["criterion"] == "agf"
    decisions = {line["step"]: line for line in lines if line["kind"] == "decision"}
    pruned, grown = decisions[5], decisions[10]
    assert pruned["edited"]["width"]["kind"] == "prune" and sum(pruned["edited"]["width"]["units"].values()) == 14
    assert pruned["changed"]["width"] == [1.0, 0.5] and pruned["proposed"] == {"width": 0.5}
    assert "prune" in pruned["reason"] and grown["edited"]["width"]["kind"] == "grow"
    assert sum(pruned["active"].values()) == 14 and decisions[0]["edited"] == {}
    outcome = next(line for line in lines if line["kind"] == "outcome" and line["decided_at"] == 5)
    assert outcome["changed"]["width"] == [1.0, 0.5] and outcome["cause"] == "policy" and outcome["step"] == 10
    page = tmp_path / "report.html"
    run_report(path, [], page)
    told = page.read_text(encoding="utf-8")
    assert "width 100 % to 50 % of the units" in told and "width down, large, by policy" in told
    assert pruned["reason"].split("; ")[1] in told and pruned["reason"].split("; ")[1].startswith("prune ")


def test_advice_says_what_it_would_edit_and_edits_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    alone, advised = Digits(), Digits()
    advised.attach(wanting(1.0, 0.5), mode="advise", audit=path).run(40)
    alone.run(40)
    assert same(alone.everything(), advised.everything())
    lines = [line for line in read_audit(path) if line["kind"] == "decision"]
    told = [line for line in lines if line["edited"]]
    assert len(told) == 2 and told[0]["advised"] == {"width": 0.5}  # once in each rest
    assert sum(told[0]["edited"]["width"]["units"].values()) == 14 and told[0]["active"] == {"0": 16, "2": 12}
    assert all("prune" in line["reason"] and line["reason"].startswith("advice only") for line in told)


def test_switched_off_and_detached_the_structure_stays_as_it_is() -> None:
    loop = Digits().attach(wanting(1.0, 0.5, 1.0)).run(8)
    assert loop.controller is not None and sum(loop.active.values()) == 14
    loop.controller.switch_off()
    loop.run(20)
    assert sum(loop.active.values()) == 14
    loop.controller.switch_on()
    loop.controller.detach()
    loop.run(20)
    assert sum(loop.active.values()) == 14 and loop.decisions[-1].reason == "detached"
    idle_is_zero(loop)


@pytest.mark.parametrize("policy", ["rewire", "newborn-aware"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(policy: str) -> None:
    """Also over the edit that a rule makes at once when it is attached anew: it is taken back."""

    def fresh() -> Digits:
        loop = Digits()
        loop.structure.prune(0.7, "magnitude", "layer")
        return loop

    whole = fresh().attach(policy).run(130)
    first = fresh().attach(policy).run(63)
    assert first.controller is not None
    saved: dict[str, Any] = {
        "model": first.model.state_dict(),
        "optimizer": first.optimizer.state_dict(),
        "structure": first.structure.state_dict(),
    }
    state = json.loads(json.dumps(first.controller.state_dict()))
    again = fresh()
    again.model.load_state_dict(saved["model"])
    again.optimizer.load_state_dict(saved["optimizer"])
    again.structure.load_state_dict(saved["structure"])
    again.done = first.done
    again.attach(policy)
    assert again.controller is not None
    again.controller.load_state_dict(state)
    assert same(again.everything(), first.everything())
    again.run(67)
    assert again.active == whole.active
    assert torch.allclose(again.model[0].weight, whole.model[0].weight, atol=1e-6)  # type: ignore[arg-type]


def test_a_state_of_another_structure_is_refused() -> None:
    first = Digits().attach(wanting(0.5)).run(7)
    assert first.controller is not None
    state = first.controller.state_dict()
    other = Digits().attach(wanting(0.5))
    assert other.controller is not None
    with pytest.raises(MismatchError, match=r"other units of 0 were active when .* load the structure's own state"):
        other.controller.load_state_dict(state)
    without = {key: value for key, value in state.items() if key != "structure"}
    with pytest.raises(MismatchError, match="was saved without a structure"):
        other.controller.load_state_dict(without)
    state["structure"]["active"] = {"elsewhere": "1 of 2, 00"}
    with pytest.raises(MismatchError, match="of a structure with the groups elsewhere; this one has 0, 2"):
        other.controller.load_state_dict(state)
    plain, same_policy = Digits(), Digits().attach("constant").run(7)
    assert same_policy.controller is not None
    bare = attach(plain.optimizer, model=plain.model, policy="constant", total_steps=200, decide_every=5)
    with pytest.raises(MismatchError, match=r"saved with a structure, .* give attach\(..., structure=...\)"):
        bare.load_state_dict(same_policy.controller.state_dict())


def test_nothing_is_left_behind_where_the_first_decision_has_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Digits()
    before = loop.everything()

    def interrupted(self: Any) -> None:
        self._decide(measure=False)
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.policies.controller.Controller.begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.attach(wanting(0.5))
    assert loop.active == {"0": 16, "2": 12} and same(
        {name: before[name] for name in loop.model.state_dict()},
        {name: loop.everything()[name] for name in loop.model.state_dict()},
    )


# --- failing and being refused -----------------------------------------------------------------------------------


def test_an_edit_that_fails_is_said_and_the_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    loop, broken = Digits(), False

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        if broken:
            raise FloatingPointError("no loss today")
        return mean_loss(model, batch)

    batches = [(loop.inputs[:64], loop.labels[:64])]
    loop.attach(wanting(1.0, 0.5), Editing(loop.structure, batches, loss_fn))
    broken = True
    before = [parameter.clone() for parameter in loop.model.parameters()]
    with caplog.at_level(logging.WARNING, logger="trimtab"):
        loop.run(10)
    assert "no loss today" in caplog.text and loop.active == {"0": 16, "2": 12}
    assert "an edit that was permitted could not be made" in loop.decisions[4].reason and not loop.decisions[4].acted
    assert any(not torch.equal(one, other) for one, other in zip(before, loop.model.parameters(), strict=True))


def test_criteria_of_weights_need_no_data_and_signals_of_units_stay_unknown(caplog: pytest.LogCaptureFixture) -> None:
    loop = Digits()
    with caplog.at_level(logging.WARNING, logger="trimtab"):
        loop.attach("prune-steps", Editing(loop.structure, config=EditConfig(criterion="magnitude"))).run(100)
        assert "stay 0" not in caplog.text
        other = Digits()
        other.structure.prune(0.5, "magnitude")
        other.attach("newborn-aware", Editing(other.structure, config=EditConfig(criterion="magnitude")))
    assert sum(loop.active.values()) < 28
    assert "structure=Editing(structure, batches, loss_fn)) for parity_available, newborn_parity" in caplog.text


@pytest.mark.parametrize(
    ("policy", "config", "words"),
    [
        ("prune-cubic", {}, r"criterion 'agf' reads agf, .* structure=Editing\(structure, batches, loss_fn\)"),
        ("dormant-reset", {}, "criterion 'redo' of resets reads mean_abs"),
        ("grow-steps", {"criterion": "magnitude", "growth": "gradient"}, "growth method 'gradient' reads grad"),
    ],
)
def test_a_criterion_without_its_data_is_refused(policy: str, config: dict[str, Any], words: str) -> None:
    loop = Digits()
    with pytest.raises(UserError, match=words) as caught:
        loop.attach(policy, Editing(loop.structure, config=EditConfig(**config)))
    assert "\n" not in str(caught.value)
    assert not loop.optimizer._optimizer_step_pre_hooks


def test_a_growth_method_that_cannot_be_had_of_the_model_is_refused_at_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.LayerNorm(8), torch.nn.GLU(), torch.nn.Linear(4, 8),
                                torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 10))  # fmt: skip
    loop = Digits()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    structure = gates(model, optimizer, loop.inputs[:4])
    editing = Editing(structure, [(loop.inputs, loop.labels)], mean_loss, EditConfig(growth="splitting"))
    with pytest.raises(UserError, match="growth method 'splitting' reads split, which cannot be had"):
        attach(optimizer, model=model, policy="grow-steps", total_steps=9, structure=editing)
    assert not optimizer._optimizer_step_pre_hooks


def test_other_things_that_are_refused() -> None:
    loop, other = Digits(), Digits()
    with pytest.raises(MismatchError, match="'prune-cubic' moves 'width', .* structure=trimtab.gates"):
        attach(loop.optimizer, model=loop.model, policy="prune-cubic", total_steps=9)
    with pytest.raises(MismatchError, match="made for another optimizer"):
        loop.attach("prune-cubic", other.editing())
    again = trimtab_gates(other.model, other.optimizer)
    other.optimizer.param_groups[0]["params"] += list(loop.model.parameters())
    with pytest.raises(UserError, match="do not belong to the model"):
        other.attach("prune-cubic", Editing(again, [1], mean_loss), model=loop.model)
    everything = torch.nn.ParameterList([*other.model.parameters(), *loop.model.parameters()])
    with pytest.raises(MismatchError, match=r"of a Sequential that is no part of the model .* \(ParameterList\)"):
        other.attach("prune-cubic", Editing(again, [1], mean_loss), model=everything)
    for given, words in (
        ((loop.model,), "structure is a Sequential; it must be what trimtab.gates"),
        ((loop.structure, [1]), "batches and loss_fn are needed together"),
        ((loop.structure, iter([1]), mean_loss), "cannot be read again and again"),
        ((loop.structure, [1], 3), "loss_fn is a int"),
        ((loop.structure, None, None, 3), "config is a int"),
        ((loop.structure, None, None, EditConfig(start=0.2)), "start is 0.2, but a run of your own .* structure.prune"),
    ):
        with pytest.raises(UserError, match=words):
            Editing(*given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="structure is a Linear"):
        loop.attach("constant", torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no loss|scalar"):
        loop.attach("prune-cubic", Editing(loop.structure, [(loop.inputs, loop.labels)], lambda m, b: m(b[0])))
    with pytest.raises(TypeError, match=r"attach\(\) got an unexpected keyword argument 'structur'"):
        attach(loop.optimizer, policy="constant", structur=loop.structure)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("batches", "loss"),
    [
        ([torch.zeros(4, 64)], mean_loss),
        (lambda: None, mean_loss),
        (lambda: [(torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64))], torch.nn.CrossEntropyLoss()),
        (lambda: [(torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64))], lambda model, batch: 1 / 0),
    ],
)
def test_batches_and_losses_that_do_not_work_are_refused_in_one_sentence(batches: Any, loss: Any) -> None:
    loop = Digits()
    with pytest.raises(UserError, match="what criterion 'agf' reads could not be had"):
        loop.attach(wanting(0.5), Editing(loop.structure, batches, loss))
    loop.attach(wanting(0.5)).run(6)


@pytest.mark.parametrize(
    "wrong", [{"least": "a"}, {"most": None}, {"dead_band": True}, {"criterion": []}, {"scope": None}]
)
def test_settings_of_another_kind_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        EditConfig(**wrong)


def test_several_ranks_are_refused() -> None:
    from trimtab.policies.editing import check_editing
    from trimtab.policies.registry import load_policy

    class Two:
        size = 2

    loop = Digits()
    with pytest.raises(UserError, match="given on 2 ranks, each of which would score units by data of its own"):
        check_editing(loop.structure, load_policy("constant"), loop.optimizer, loop.model, Two())  # type: ignore[arg-type]


def test_reading_batches_leaves_random_states_alone() -> None:
    alone, steered = Digits(), Digits()
    data = torch.utils.data.TensorDataset(steered.inputs, steered.labels)
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)
    torch.manual_seed(3)
    alone.run(20)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    steered.attach("dormant-reset", Editing(steered.structure, loader, mean_loss), mode="advise").run(20)
    assert torch.equal(torch.rand(3), wanted)


def test_hosts_pass_it_on_and_call_a_function_for_it() -> None:
    for given in (lambda host: host.editing(), None):
        loop = Digits()
        hosted = Hosted(HostOptions(policy="prune-steps", structure=given or loop.editing(), decide_every=5))
        loop.controller = hosted.begin(loop.optimizer, loop.model, host=loop, total_steps=50)
        loop.run(30)
        assert sum(loop.active.values()) < 28
    assert hosted.options.structure is not None


def test_a_structure_of_a_part_of_the_model_and_without_a_model() -> None:
    loop = Digits()
    loop.attach(wanting(0.5), model=torch.nn.ModuleDict({"net": loop.model}))
    assert sum(loop.active.values()) == 14
    other = Digits().attach(wanting(0.5), model=None)
    assert other.controller is not None and other.controller._settings.model is other.model


def test_a_learned_policy_moves_width_beside_other_levers() -> None:
    loop = Digits()
    loop.structure.prune(0.3, "magnitude")
    policy = learned(signals=(*UNIT_SIGNALS[:7],), levers={"lr": "moves", "width": "moves"})
    loop.attach(policy, loop.editing(most=0.2, dead_band=0.0)).run(60)
    assert loop.controller is not None and set(loop.controller.multipliers) == {"lr"}
    assert 0 < loop.controller._steering.guard.edits.done[0] <= 12  # type: ignore[union-attr]
    assert "prune" in loop.controller.summary() or "grow" in loop.controller.summary()
    idle_is_zero(loop)


def test_a_compiled_module_is_edited_without_compiling_anew() -> None:
    loop, graphs = Digits(), []

    def backend(module: Any, example: Any) -> Any:
        graphs.append(module)
        return module.forward

    inner = loop.model
    loop.model = torch.compile(inner, backend=backend)  # type: ignore[assignment]
    loop.structure = trimtab_gates(loop.model, loop.optimizer)
    loop.run(2)
    before = len(graphs)
    loop.attach(wanting(1.0, 0.5, 0.7), loop.editing(rest=1)).run(30)
    assert sum(loop.active.values()) in (19, 20) and len(graphs) == before
    idle_is_zero(loop)


def test_an_audit_that_is_resumed_with_other_settings_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    loop = Digits()
    loop.attach("constant", audit=path).run(5)
    assert loop.controller is not None
    loop.controller.detach()
    for rest, differs in ((5, set()), (9, {"structure"})):
        loop.attach("constant", loop.editing(rest=rest), audit=path).run(5)
        resumed = [line for line in read_audit(path) if line["kind"] == "resumed"][-1]
        assert set(resumed["differs"]) == differs
        assert loop.controller is not None
        loop.controller.detach()
    assert verify_audit(path).holds


@pytest.mark.parametrize("seed", range(3))
def test_limits_hold_whatever_is_asked_and_whatever_befalls_the_run(seed: int) -> None:
    rng = np.random.default_rng(seed)
    moves = rng.uniform(-1.5, 1.5, (60, 2))
    policy = Scripted(moves.tolist(), levers={"width": "moves", "reset": "moves"}, decide_every=3)
    loop = Digits()
    config: dict[str, Any] = {"rest": 2, "budget": 9, "least": 0.3, "most_active": 0.8, "most": 0.25, "dead_band": 0.2}
    loop.structure.prune(0.5, "random", "layer")
    loop.attach(policy, loop.editing(**config), guard=GuardConfig(aftermath=1), decide_every=3)
    edits, last = 1, 0 if loop.active != {"0": 8, "2": 6} else -99
    for number in range(1, 60):
        before = loop.active
        for _ in range(3):
            loop.step(spoil=math.nan if rng.random() < 0.01 else None)
        idle_is_zero(loop)
        share = sum(loop.active.values()) / 28
        assert 0.3 - 1e-9 <= share <= 0.8 + 1e-9 and min(loop.active.values()) >= 1
        decision = loop.decisions[-1]
        if any(word in decision.reason for word in ("prune ", "grow ", "reset ")):
            assert number - last >= config["rest"]
            edits, last = edits + 1, number
        elif not decision.rolled_back:
            assert loop.active == before
    assert edits <= 10 and loop.controller is not None
    assert loop.controller._steering.guard.edits.done[0] <= 9  # type: ignore[union-attr]
