"""Small worlds of real processes with gloo, for the tests of decisions on several ranks."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import multiprocessing
import os
import queue
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # here, so that no child has to: optimizers need it
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trimtab.inner_training.guard import GuardConfig
from trimtab.policies.attach import attach
from trimtab.policies.controller import Controller
from trimtab.policies.policy import Kind

LIMIT = 150.0  # seconds until a world that has not ended is taken to hang
GONE = "gone"  # what a rank that ended without a word has to say


class Logged(logging.Handler):
    """Keeps what trimtab logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _rank(
    work: Callable[..., Any], rank: int, world: int, store: str, seconds: float, answers: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    try:
        answers.put((rank, work(rank, world, *args)))
    except BaseException:  # noqa: BLE001 - whoever started this rank is told
        answers.put((rank, traceback.format_exc()))
    answers.close()
    answers.join_thread()


def world_of(ranks: int, work: Callable[..., Any], folder: Path, *args: Any, seconds: float = LIMIT) -> list[Any]:
    """What ``work(rank, ranks, *args)`` returns on each rank; a text where it raised. No process outlives this.

    Collectives wait for ``seconds``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.policies.ranked"])
    answers: Any = context.Queue()
    store = str(folder / f"store-{time.monotonic_ns()}")
    processes = [
        context.Process(target=_rank, args=(work, rank, ranks, store, seconds, answers, args)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    until = time.monotonic() + LIMIT
    try:
        while len(found) < ranks and time.monotonic() < until:
            try:
                rank, answer = answers.get(timeout=0.2)
                found[rank] = answer
            except queue.Empty:
                ended = {rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)}
                found |= dict.fromkeys(ended - found.keys(), GONE)
    finally:
        for process in processes:
            process.join(timeout=5 if len(found) == ranks else 0)
            process.kill()
            process.join()
    assert len(found) == ranks, f"ranks {sorted(set(range(ranks)) - found.keys())} hang"
    return [found[rank] for rank in range(ranks)]


@dataclass
class Moody:
    """Moves two levers by what it sees, fires events at times, and fails where and when it is told to."""

    rank: int
    fails: Mapping[int, tuple[int, str]] = field(default_factory=dict)  # at a decision: which rank, and how
    fires: Mapping[int, str] = field(default_factory=dict)
    levers: Mapping[str, Kind] = field(
        default_factory=lambda: {
            "lr": "moves",
            "momentum": "moves",
            "grad_clip": "moves",
            "rollback": "events",
            "reset_moments": "events",
            "anchor": "events",
        }
    )
    signals: tuple[str, ...] = ("loss_level", "loss_slope", "grad_cosine", "update_ratio", "lr_position", "caution")
    name: str = "moody"
    decide_every: int | None = 1
    asked: int = 0

    def init(self, num_runs: int) -> dict[str, Any]:
        self.asked = 0
        return {"trace": np.zeros(num_runs)}

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        self.asked += 1
        rank, how = self.fails.get(self.asked, (-1, ""))
        if rank == self.rank and how == "raise":
            raise FloatingPointError("moody")
        if rank == self.rank and how == "late":
            time.sleep(1.0)
        if rank == self.rank and how == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        trace = 0.9 * state["trace"] + observations.sum(1)
        moves = np.stack([np.sin(9 * trace), np.cos(5 * trace), np.sin(3 * trace)], 1)
        events = np.zeros((len(observations), 3))
        if (event := self.fires.get(self.asked)) is not None:
            events[:, list(self.levers).index(event) - 3] = 1
        actions = np.concatenate([moves, events], 1)
        if rank == self.rank and how == "shape":
            actions = actions[:, 1:]
        if rank == self.rank and how == "nan":
            actions = np.full_like(actions, np.nan)
        return actions, {"trace": trace}


class Training:
    """A regression under DistributedDataParallel: the same weights, other data on every rank."""

    def __init__(self, rank: int, world: int, *, norm: bool = False, wrap: bool = True) -> None:
        self.rank, self.world = rank, world
        generator = torch.Generator().manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)]
        self.bare = nn.Sequential(*(layers[:1] + [nn.BatchNorm1d(8)] * norm + layers[1:]))
        with torch.no_grad():
            for parameter in self.bare.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        own = torch.Generator().manual_seed(1 + rank)
        self.inputs = torch.randn(64, 4, generator=own)
        self.targets = torch.sin(self.inputs.sum(1, keepdim=True))
        self.model: nn.Module = DistributedDataParallel(self.bare) if wrap else self.bare
        self.optimizer = torch.optim.AdamW(self.bare.parameters(), lr=0.01)
        self.logged = Logged()
        logger = logging.getLogger("trimtab")
        logger.handlers, logger.propagate = [self.logged], False

    def step(self, factor: float = 1.0) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = (self.model(self.inputs) - self.targets).square().mean() * factor
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def weights_hash(self) -> str:
        tensors = [*self.bare.parameters()]
        tensors += [held for state in self.optimizer.state.values() for held in state.values()]
        return hashlib.sha256(b"".join(one.detach().numpy().tobytes() for one in tensors)).hexdigest()


def standing_hash(controller: Controller) -> str:
    """Of everything that the levers in force follow from."""
    held = {"applied": controller.multipliers, "steering": controller._steering.standing()}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


# --- 1,000 decisions among faults -----------------------------------------------------------------------------------

FAILS = {7 + 61 * k: (k % 4, ("raise", "shape", "nan")[k % 3]) for k in range(16)}
FIRES = {40 + 87 * k: ("rollback", "reset_moments", "anchor")[k % 3] for k in range(11)}


def storm(rank: int, world: int, decisions: int, together: bool) -> dict[str, Any]:
    """Trains through faults of one rank or all, and says what came of it."""
    fails = {at: (who % world, how) for at, (who, how) in FAILS.items()}
    training = Training(rank, world)
    policy = Moody(rank, fails, FIRES)
    group = None if together else dist.new_group([rank], use_local_synchronization=True)
    controller = attach(
        training.optimizer,
        model=training.model,
        policy=policy,
        guard=GuardConfig(rollback_budget=1000, backoff=0.9, rest=1),
        process_group=group,
    )
    controller.time_limit = None
    made, last = [], world - 1
    reading, hashes = controller._run.reading, set()
    for k in range(1, decisions + 1):
        if k % 50 == 0 and rank == k // 50 % world:
            time.sleep(0.05)  # a slow rank
        factor = 1.0
        if rank == last and k % 151 == 50:
            factor = float("nan")  # in the gradients of every rank, by their mean
        if k in (370, 371, 720):
            factor = 1e6  # explodes everywhere
        loss = training.step(factor)
        if rank == last and k % 97 == 13:
            loss = torch.tensor(float("nan"))  # in one rank's loss alone
        if k % 211 == 30:
            loss = -loss  # has no logarithm, so its signals cannot be read
        if rank == last:
            os.environ["TRIMTAB_OFF"] = str(int(400 <= k < 420))
        if rank == 0 and k in (500, 510):
            (controller.switch_off if k == 500 else controller.switch_on)()
        if rank == last and k == 333:
            controller._run.reading = _failing  # type: ignore[method-assign]
        made.append(controller.step(loss))
        controller._run.reading = reading  # type: ignore[method-assign]
        if k % 250 == 0:
            hashes.add((k, training.weights_hash()))
    told = [(one.acted, sorted(one.applied.items()), one.reason, one.rolled_back) for one in made]
    return {
        "weights": training.weights_hash(),
        "on the way": sorted(hashes),
        "standing": standing_hash(controller),
        "decisions": hashlib.sha256(repr(told).encode()).hexdigest(),
        "reasons": sorted({words for one in made for words in one.reason.split("; ")}),
        "rollbacks": sum(one.rolled_back for one in made),
        "moved": sum(one.acted for one in made),
        "steps": controller.steps,
        "finite": all(bool(one.isfinite().all()) for one in training.bare.parameters()),
        "logged": training.logged.lines,
        "state": json.dumps(controller.state_dict()),
    }


def _failing(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError("nothing can be read")
