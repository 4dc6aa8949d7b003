"""Decisions of several ranks are the same on each of them, whatever happens on one: real processes, with gloo."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.policies.live import Loop, Scripted, sgd
from tests.policies.ranked import GONE, Moody, Training, standing_hash, storm, world_of
from torch import nn

import trimtab
from trimtab.errors import UserError
from trimtab.inner_training.guard import REASON_WORDS, GuardConfig, Reason
from trimtab.policies import deciding
from trimtab.policies.attach import attach
from trimtab.policies.controller import Controller
from trimtab.policies.ranks import OWN, _timeout, ranks_of
from trimtab.policies.together import RanksDecider

SAME = ("weights", "on the way", "standing", "decisions", "state")


def attached(training: Training, policy: Any = None, **options: Any) -> Controller:
    chosen = Scripted([[0.5]], decide_every=1) if policy is None else policy
    controller = attach(training.optimizer, model=training.model, policy=chosen, **options)
    controller.time_limit = None
    return controller


# --- 1,000 decisions among faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_stay_the_same_for_a_thousand_decisions_among_faults(ranks: int, tmp_path: Path) -> None:
    first, *others = world_of(ranks, storm, tmp_path, 1000, True)
    assert isinstance(first, dict), first
    for other in others:
        assert {name: other[name] for name in SAME} == {name: first[name] for name in SAME}
    assert first["steps"] == 1000 and first["finite"] and first["moved"] > 500 and first["rollbacks"] > 10
    expected = (
        Reason.ABSTAINED,
        Reason.FAULT,
        Reason.UNREAD,
        Reason.SWITCHED_OFF,
        Reason.ROLLED_BACK,
        Reason.NOT_FINITE,
    )
    assert {REASON_WORDS[reason] for reason in expected} <= set(first["reasons"])
    assert REASON_WORDS[Reason.APART] not in first["reasons"] and REASON_WORDS[Reason.PARTED] not in first["reasons"]
    assert any(f"rank {ranks - 1} abstained at step 13 (a loss is not finite" in line for line in first["logged"])


def test_the_same_faults_drive_ranks_apart_that_decide_alone(tmp_path: Path) -> None:
    one, other = world_of(2, storm, tmp_path, 60, False)
    assert one["weights"] != other["weights"] and one["standing"] != other["standing"]


# --- one thing at a time --------------------------------------------------------------------------------------------


def mean_of_losses(rank: int, world: int) -> Any:
    """Signals and validation losses are of all ranks, also where one rank alone measured something."""
    training = Training(rank, world, norm=True)
    policy = Scripted([[1.0]], signals=("loss_level", "val_level", "val_available"), decide_every=2)
    controller = attached(training, policy, guard=False)
    for k in range(8):
        controller.step(training.step(), val_loss=0.1 * (k + 1) if rank == 1 else None)
    return np.concatenate(policy.seen).tolist()


def audited(rank: int, world: int, path: str) -> Any:
    """The first rank writes the audit; every rank has its summary, and its state can be loaded."""
    training = Training(rank, world)
    controller = attached(training, "plateau-nudge", decide_every=1, audit=path)
    for _ in range(12):
        controller.step(training.step())
    state, before = json.loads(json.dumps(controller.state_dict())), standing_hash(controller)
    controller.detach()
    again = attached(training, "plateau-nudge", decide_every=1, audit=path)
    again.load_state_dict(state)
    resumed = standing_hash(again)
    decisions = [again.step(training.step()).reason for _ in range(4)]
    again.detach()
    return before == resumed, again.summary().splitlines()[0], decisions, training.weights_hash()


def refused(rank: int, world: int, path: str) -> Any:
    """Where one rank cannot attach, none does; and they can try again."""
    training, told = Training(rank, world), []
    trials: list[dict[str, Any]] = [
        {"policy": "cosinus" if rank == 1 else "cosine", "total_steps": 9, "audit": path + ".new"},
        {"policy": "greedy", "audit": path},  # is no audit; only the first rank looks
        {"policy": "greedy", "decide_every": 5 + rank},
        {"policy": "greedy", "guard": GuardConfig(explosion=10.0 + rank)},
    ]
    for options in trials:
        try:
            attached(training, **options)
        except UserError as error:
            told.append(f"{type(error).__name__}: {error}")
    told.append(str(os.path.exists(path + ".new")))
    controller = attached(training)
    controller.step(training.step())
    return told, controller.multipliers["lr"]


def scaled(rank: int, world: int) -> Any:
    """A gradient scaler skips a step on all ranks alike."""
    training = Training(rank, world)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    controller = attached(training, stateful=(scaler,))
    for k in range(6):
        training.optimizer.zero_grad()
        loss = (training.model(training.inputs) - training.targets).square().mean()
        scaler.scale(loss * (float("inf") if k == 3 and rank == 1 else 1.0)).backward()
        scaler.step(training.optimizer)
        scaler.update()
        controller.step(loss.detach())
    return controller.steps, scaler.get_scale(), standing_hash(controller)


def switched(rank: int, world: int) -> Any:
    """One rank that is switched off switches all off, at the next decision and not before."""
    training = Training(rank, world)
    controller = attached(training, decide_every=2)
    seen = []
    for k in range(10):
        if rank == 1 and k == 3:
            controller.switch_off()
        if rank == 1 and k == 6:
            controller.switch_on()
        decision = controller.step(training.step())
        seen.append((controller.multipliers["lr"], controller.enabled, decision.reason))
    return seen


def loaded_on_one(rank: int, world: int) -> Any:
    """A state that one rank alone has loaded is found out; the levers of the first rank win."""
    training = Training(rank, world)
    policy = Scripted([[0.5], [0.25], [0.5]], decide_every=1)
    controller = attached(training, policy)
    state = controller.state_dict()
    controller.step(training.step())
    if rank == 1:
        controller.load_state_dict({**state, "run": controller._run.state_dict(), "decided_at": 1})
    reasons = [controller.step(training.step()).reason for _ in range(3)]
    return reasons, training.logged.lines, standing_hash(controller)


def apart(rank: int, world: int) -> Any:
    """Ranks that count differently, or hold other weights, hold; a rate that differs is said."""
    training = Training(rank, world, wrap=False)
    controller = attached(training, decide_every=2)
    reasons = []
    with torch.no_grad():
        next(iter(training.bare.parameters())).mul_(1 + 0.01 * rank)
    for _ in range(2):
        reasons.append(controller.step(training.step()).reason)
    controller.detach()
    told, training = training.logged.lines, Training(rank, world)
    training.optimizer.param_groups[0]["lr"] = 0.01 * (1 + rank)
    controller = attached(training)
    if rank == 1:
        controller._run.steps += 1
    reasons.append(controller.step(training.step()).reason)
    return reasons[1:], [told, training.logged.lines]


def unrestorable(rank: int, world: int) -> Any:
    """Ranks that could only go back to different moments do not go back at all."""
    training = Training(rank, world)
    controller = attached(training, guard=GuardConfig(explosion=5.0))
    for _ in range(12):
        controller.step(training.step())
    if rank == 1:
        controller._snapshots.clear()  # type: ignore[union-attr]
    decision = controller.step(training.step(factor=1e4))
    return decision.rolled_back, decision.reason, training.logged.lines, training.weights_hash()


class Stubborn:
    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def state_dict(self) -> dict[str, int]:
        return {"one": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.fails:
            raise OSError("stubborn")


def half_restored(rank: int, world: int, all_fail: bool) -> Any:
    """Where some ranks could go back and others could not, the controller leaves; where none could, it goes on."""
    training = Training(rank, world)
    stateful = (Stubborn(all_fail or rank == 1),)
    controller = attached(training, guard=GuardConfig(explosion=5.0), stateful=stateful)
    for _ in range(12):
        controller.step(training.step())
    decision = controller.step(training.step(factor=1e4))
    after = controller.step(training.step()).reason
    return decision.rolled_back, decision.reason, after, controller.multipliers["lr"], training.logged.lines


def late(rank: int, world: int) -> Any:
    """An answer that comes too late on one rank is used on none, and what the policies remember stays the same."""
    training = Training(rank, world)
    controller = attached(training, Moody(rank, {4: (1, "late")}))
    reasons = []
    for k in range(6):
        controller.time_limit = 0.8 if k == 2 else None
        reasons.append(controller.step(training.step()).reason)
    trace = controller._listener.state["trace"].tolist()
    return reasons[2], trace, standing_hash(controller)


def returning(rank: int, world: int) -> Any:
    """Where one rank abstains again and again, whatever fails there, levers return to null on all of them alike."""
    training = Training(rank, world)
    policy = Scripted([[0.1, 0.5]], levers={"lr": "targets", "momentum": "targets"}, decide_every=1)
    controller = attached(training, policy)
    found, assess = [], controller._steering.assess
    for fails in ("policy", "guard"):
        seen = []
        for k in range(8):
            if rank == 1 and k == 1:
                policy.fail_at = 0 if fails == "policy" else None
                controller._steering.assess = assess if fails == "policy" else _broken  # type: ignore[method-assign]
            if k == 6:
                policy.fail_at, controller._steering.assess = None, assess  # type: ignore[method-assign]
            decision = controller.step(training.step())
            hashes = training.weights_hash(), standing_hash(controller)
            seen.append((decision.applied["lr"], decision.applied["momentum"], decision.reason, *hashes))
        found.append(seen)
    return found


def _broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("broken")


def interrupted(rank: int, world: int) -> Any:
    """Ctrl-C on one rank breaks its policy off: both hold, and go on together."""
    training = Training(rank, world)
    controller = attached(training, Moody(rank, {4: (1, "Ctrl-C")}))
    controller.time_limit = None
    reasons, broken = [], []
    for k in range(6):
        loss = training.step()
        try:
            reasons.append(controller.step(loss).reason)
        except KeyboardInterrupt:
            broken.append(k)
            reasons.append("broken off")
    return broken, reasons, controller._listener.state["trace"].tolist(), standing_hash(controller)


def in_groups(rank: int, world: int) -> Any:
    """A group of one decides alone; a group that is none, or another's, is refused."""
    alone = dist.new_group([rank], use_local_synchronization=True)
    other = [dist.new_group([one]) for one in range(world)][1 - rank]
    training, told = Training(rank, world), []
    for group in ("gloo", other):
        try:
            attached(training, process_group=group)
        except UserError as error:
            told.append(str(error))
    controller = attached(training, process_group=alone)
    if rank == 0:  # nobody waits for anybody
        controller.step(training.bare(training.inputs).sum())
        controller.switch_off()
    own = controller.enabled
    controller.detach()
    everyone = attached(training, process_group=dist.group.WORLD)
    inherited = str(_timeout(OWN[dist.group.WORLD])) == str(_timeout(dist.group.WORLD)) == "0:02:30"
    return told, own, isinstance(everyone._decider, RanksDecider), ranks_of(alone) is None, inherited


def sharded(rank: int, world: int) -> Any:
    """Parameters of which a rank has a part are refused on all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    told = []
    for shard in (
        lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (world,))),
        lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    ):
        model = shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
        try:
            attach(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
        except UserError as error:
            told.append(str(error))
    return told


def several(rank: int, world: int, folder: str) -> dict[str, Any]:
    taken = Path(folder) / "taken"
    found: dict[str, Any] = {}
    for work, *args in (
        (mean_of_losses,),
        (audited, str(Path(folder) / "audit.jsonl")),
        (refused, str(taken)),
        (scaled,),
        (switched,),
        (loaded_on_one,),
        (apart,),
        (unrestorable,),
        (half_restored, False),
        (late,),
        (returning,),
        (interrupted,),
        (in_groups,),
        (sharded,),
    ):
        found[work.__name__] = work(rank, world, *args)
    found["none_restored"] = half_restored(rank, world, True)
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found, one thing after the other."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "taken").write_text("mine", encoding="utf-8")
    found = world_of(2, several, folder, str(folder))
    assert all(isinstance(one, dict) for one in found), found
    lines = (folder / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    found[0]["audit"] = [json.loads(line)["kind"] for line in lines]
    return found


def common(both: list[dict[str, Any]], name: str) -> Any:
    """What both ranks found alike."""
    assert both[0][name] == both[1][name]
    return both[0][name]


def test_signals_are_of_all_ranks(both: list[dict[str, Any]]) -> None:
    seen = np.array(common(both, "mean_of_losses"))
    assert seen[-1, 2] == 1 and seen[-1, 1] > seen[-2, 1], "one rank's validation losses are known to both"


def test_the_first_rank_writes_the_audit_and_all_can_save_and_load(both: list[dict[str, Any]]) -> None:
    resumed, summary, decisions, _ = common(both, "audited")
    assert resumed and "16 steps" in summary and len(decisions) == 4
    kinds = both[0]["audit"]
    assert kinds.count("header") == 1 and kinds.count("resumed") == 1 and kinds.count("decision") == 13 + 4


def test_where_one_rank_cannot_attach_none_does(both: list[dict[str, Any]]) -> None:
    (zero, rate), (one, same) = both[0]["refused"], both[1]["refused"]
    assert rate == same == 0.5, "and then they can"
    assert "rank 1 could not attach" in zero[0] and "did you mean 'cosine'" in one[0]
    assert zero[-1] == one[-1] == "False", "and no audit is left behind"
    assert "is not overwritten" in zero[1] and "rank 0 could not attach" in one[1]
    assert zero[2:] == one[2:] and "differ in decide_every;" in zero[2] and "differ in guard;" in zero[3]
    assert all(text.startswith("MismatchError") for text in zero[2:-1])


def test_a_gradient_scaler_skips_on_all_ranks_alike(both: list[dict[str, Any]]) -> None:
    steps, scale, _ = common(both, "scaled")
    assert (steps, scale) == (5, 2.0)


def test_one_rank_switches_all_off_at_a_decision(both: list[dict[str, Any]]) -> None:
    seen = common(both, "switched")
    assert [rate for rate, _, _ in seen] == [0.5] * 3 + [1.0] * 4 + [0.5] * 3
    assert [enabled for _, enabled, _ in seen] == [True] * 3 + [False] * 4 + [True] * 3
    assert "switched off" in seen[3][2] and "a rank abstained" in seen[3][2]


def test_levers_return_to_null_together(both: list[dict[str, Any]]) -> None:
    for seen in common(both, "returning"):
        rates, momenta, reasons, *_ = zip(*seen, strict=True)
        assert rates == pytest.approx([0.1] * 4 + [0.1 * np.e, 0.1 * np.e**2, 0.1, 0.1])
        assert momenta == pytest.approx([0.5] * 4 + [0.5 * np.exp(0.3), 0.5 * np.exp(0.6), 0.5, 0.5])
        told = ["returns towards null" in one and "a rank abstained" in one for one in reasons]
        assert told == [False] * 4 + [True] * 2 + [False] * 2


def test_a_state_loaded_on_one_rank_is_found_out(both: list[dict[str, Any]]) -> None:
    reasons, lines, _ = common(both, "loaded_on_one")
    assert all(REASON_WORDS[Reason.APART] in reason for reason in reasons)
    assert "different levers in force before step 2" in lines[0] and "different weights since step 3" in lines[1]
    assert len(lines) == 2


def test_ranks_that_are_apart_hold_and_say_why_once(both: list[dict[str, Any]]) -> None:
    reasons, (weights, counts) = common(both, "apart")
    assert all(REASON_WORDS[Reason.APART] in reason for reason in reasons)
    assert len(weights) == 1 and "hold different weights since step 2" in weights[0]
    assert "scheduled learning rate differs" in counts[0] and "different steps (1, 2)" in counts[1]


def test_ranks_go_back_together_or_not_at_all(both: list[dict[str, Any]]) -> None:
    rolled_back, reason, lines, _ = common(both, "unrestorable")
    assert not rolled_back and REASON_WORDS[Reason.APART] in reason
    assert "could go back to different steps (0, -1), so none does" in lines[0]


def test_ranks_of_which_some_could_not_go_back_end_their_decisions(both: list[dict[str, Any]]) -> None:
    for rolled_back, reason, after, rate, lines in (found["half_restored"] for found in both):
        assert not rolled_back and reason == REASON_WORDS[Reason.PARTED] and after == "detached" and rate == 1.0
        assert "rank 1 could not change its weights as the others did" in lines[-1]
    for rolled_back, _, after, rate, lines in (found["none_restored"] for found in both):
        assert not rolled_back and after == "the policy holds" and rate != 1.0 and "stubborn" in lines[0]


def test_a_late_answer_on_one_rank_is_used_on_none(both: list[dict[str, Any]]) -> None:
    reason, _, _ = common(both, "late")
    assert REASON_WORDS[Reason.LATE] in reason and REASON_WORDS[Reason.ABSTAINED] in reason


def test_ctrl_c_on_one_rank_leaves_both_alike(both: list[dict[str, Any]]) -> None:
    (none, reasons, *zero), (broken, others, *one) = both[0]["interrupted"], both[1]["interrupted"]
    assert none == [] and broken == [2] and others[2] == "broken off"
    assert "rank 1 abstained" in str(reasons) or "every lever holds" in reasons[2]
    assert reasons[3:] == others[3:] and zero == one


def test_process_groups(both: list[dict[str, Any]]) -> None:
    for rank, (told, alone, together, none, inherited) in enumerate(found["in_groups"] for found in both):
        assert "is 'gloo'; it must be" in told[0] and "does not belong to; it must be" in told[1] and len(told) == 2
        assert alone is (rank == 1) and together and none and inherited


def test_sharded_parameters_are_refused(both: list[dict[str, Any]]) -> None:
    told = common(both, "sharded")
    assert len(told) == 3 and all("sharded" in text for text in told)


# --- ranks that are gone --------------------------------------------------------------------------------------------


def lost(rank: int, world: int) -> Any:
    """One rank ends without a word; the others are told at once, and go on by themselves."""
    training = Training(rank, world, wrap=False)
    controller = attached(training)
    controller.step(training.bare(training.inputs).sum())
    for _ in range(3):
        training.step(factor=0.0)
        if rank == 2 and controller.steps == 3:
            os._exit(1)
        began = time.monotonic()
        decision = controller.step(1.0)
    try:
        attached(training)
    except UserError as error:
        again = str(error)
    return decision.reason, controller.multipliers["lr"], time.monotonic() - began, training.logged.lines[-1], again


def test_a_rank_that_is_gone_is_no_reason_to_wait(tmp_path: Path) -> None:
    found = world_of(4, lost, tmp_path)
    assert found.pop(2) == GONE
    for one in found:
        assert not isinstance(one, str), one
        reason, rate, seconds, line, again = one
        assert reason == REASON_WORDS[Reason.PARTED] and rate == 1.0 and seconds < 30
        assert "could not decide together at step 3 (RuntimeError: " in line and "initialise" in again


def waited(rank: int, world: int) -> Any:
    """A rank that comes after the group's timeout; then one whose own controller breaks in the middle of a decision."""
    training = Training(rank, world, wrap=False)
    controller = attached(training)
    training.step()
    if rank == 1:
        time.sleep(3.5)
    return controller.step(1.0).reason, controller.multipliers["lr"]


def broken(rank: int, world: int) -> Any:
    training = Training(rank, world, wrap=False)
    controller = attached(training)
    if rank == 1:
        controller._decider._adopt = None  # type: ignore[union-attr]
    reasons = []
    for _ in range(2):
        training.step(factor=0.0)
        reasons.append(controller.step(1.0).reason)
    return reasons, controller.multipliers["lr"]


def test_a_rank_that_comes_too_late_ends_the_decisions(tmp_path: Path) -> None:
    assert world_of(2, waited, tmp_path, seconds=2) == [(REASON_WORDS[Reason.PARTED], 1.0)] * 2


def test_a_rank_that_breaks_leaves_nobody_waiting(tmp_path: Path) -> None:
    (zero, rate), (one, same) = world_of(2, broken, tmp_path)
    assert zero == ["the policy holds", REASON_WORDS[Reason.PARTED]] and rate == same == 1.0
    assert one == [REASON_WORDS[Reason.PARTED], "detached"]


# --- one process ----------------------------------------------------------------------------------------------------


def test_one_process_decides_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert ranks_of(None) is None
    loop = Loop(sgd)
    loop.controller = trimtab.attach(loop.optimizer, policy=Scripted([[0.5]], decide_every=1))
    loop.run(2)
    assert not caplog.records
    monkeypatch.setattr(deciding, "initialized", lambda: True)
    loop.run(2)
    assert [record.getMessage()[:40] for record in caplog.records] == ["torch.distributed was initialised after "]
