"""Composites: policies made of blocks. Every change can be traced to the block that made it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.errors import ConfigError, MismatchError, unknown
from trimtab.inner_training.levers import LEVERS
from trimtab.policies.policy import Kind
from trimtab.policies.rules.block import SHARED, Block, Fields, advance_shared, fresh_shared
from trimtab.policies.rules.blocks import make_blocks

SHARED_PREFIX = "shared"
FADING, ACTED = 1, 2
NOTED = ("before", "now", "evidence", "acted")  # what is kept of each block's last decision, for ``why``


@dataclass(frozen=True, kw_only=True)
class Composite:
    """A policy that is made of blocks.

    The target of a lever is the product of its blocks' factors, held to the lever's bounds; an event happens when any
    of its blocks fires. Blocks take their turns in order, and each sees what those before it have set in the shared
    state. Use ``compose`` to make one.

    The state has a row per run: ``shared.<field>`` for the shared state, ``<block>.<field>`` for what a block remembers,
    and ``<block>.before``, ``.now``, ``.evidence`` and ``.acted`` for its last decision.

    Attributes:
        name: for tables and audits.
        blocks: in the order of their turns.
        signals: those that the blocks read.
        levers: those that the blocks govern.
    """

    name: str
    blocks: tuple[Block, ...]
    signals: tuple[str, ...]
    levers: Mapping[str, Kind]
    decide_every: int | None = None

    def init(self, num_runs: int) -> dict[str, Any]:
        """Arrays with a leading axis of ``num_runs``."""
        state = {f"{SHARED_PREFIX}.{name}": value for name, value in fresh_shared(num_runs).items()}
        for block in self.blocks:
            null = 0.0 if block.kind == "events" else 1.0
            noted = (np.full(num_runs, null), np.full(num_runs, null), np.zeros(num_runs), np.zeros(num_runs, int))
            state |= _named(block.name, {**block.init(num_runs), **dict(zip(NOTED, noted, strict=True))})
        return state

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Targets and events (N, L) float64; see ``Policy.act``."""
        seen = dict(zip(self.signals, observations.astype(np.float64).T, strict=True))
        shared = advance_shared({name: state[f"{SHARED_PREFIX}.{name}"] for name in SHARED})
        actions = {
            name: np.full(len(observations), kind != "events", dtype=float) for name, kind in self.levers.items()
        }
        after: dict[str, Any] = {}
        for block in self.blocks:
            memory = _own(block.name, state)
            outcome = block.step(seen, {name: memory[name] for name in memory if name not in NOTED}, shared)
            now = outcome.contribution.astype(np.float64)
            if block.kind == "events":
                actions[block.lever] = np.maximum(actions[block.lever], now)
                changed = now > 0
            else:
                actions[block.lever] = actions[block.lever] * now
                changed = now != memory["now"]
            acted = np.where(changed if outcome.acted is None else outcome.acted, ACTED, np.where(changed, FADING, 0))
            noted = dict(zip(NOTED, (memory["now"], now, outcome.evidence, acted), strict=True))
            after |= _named(block.name, {**outcome.memory, **noted})
            shared = {**shared, **outcome.shared}
        after |= {f"{SHARED_PREFIX}.{name}": value for name, value in shared.items()}
        columns = [self._bounded(name, value) for name, value in actions.items()]
        return np.stack(columns, axis=1), {name: np.array(value) for name, value in after.items()}

    def _bounded(self, lever: str, value: np.ndarray) -> np.ndarray:
        if self.levers[lever] == "events":
            return value
        return np.clip(value, LEVERS[lever].target_low, LEVERS[lever].high)

    def why(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """Which block moved which lever at the last decision, and on what evidence.

        Args:
            state: as ``act`` returned it.

        Returns:
            One text per run, empty where no block acted.
        """
        texts: list[list[str]] = [[] for _ in state[f"{SHARED_PREFIX}.since_shock"]]
        for block in self.blocks:
            before, now, evidence, acted = (state[f"{block.name}.{name}"] for name in NOTED)
            for run in np.flatnonzero(acted):
                reason = block.because.format(float(evidence[run])) if acted[run] == ACTED else "going back"
                texts[run].append(f"{_deed(block, float(before[run]), float(now[run]))}: {reason}")
        return tuple("; ".join(parts) for parts in texts)


def _deed(block: Block, before: float, now: float) -> str:
    if block.kind == "events":
        return f"{block.lever} by {block.name}"
    if before == now:
        return f"{block.name} asks for caution"
    return f"{block.lever} factor {before:.3g} to {now:.3g} by {block.name}"


def _named(prefix: str, fields: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in fields.items()}


def _own(prefix: str, state: Mapping[str, Any]) -> Fields:
    start = prefix + "."
    return {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}


def compose(
    name: str,
    blocks: Iterable[str | Block],
    *,
    levers: Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> Composite:
    """Makes a policy of blocks.

    Args:
        name: of the policy.
        blocks: blocks, or names of them for their defaults, in the order of their turns.
        levers: those that there are; blocks of others are left out, but for those of events, which any run has. None is
            every lever of the lever table.
        without: names of blocks to leave out.

    Raises:
        UserError: an unknown name, a block given twice, a block that follows what no block sets, or no block left.

    >>> compose("mine", ["spike-care", "conservatism", "autoclip"]).levers
    {'lr': 'targets', 'grad_clip': 'targets'}
    """
    made = make_blocks(blocks)
    names = [block.name for block in made]
    for one in names:
        if names.count(one) > 1:
            raise ConfigError(f"block {one!r} is given twice; name each one once")
    left_out = (without,) if isinstance(without, str) else tuple(without)
    for one in left_out:
        if one not in names:
            raise unknown("block", one, names)
    chosen = [block for block in made if block.name not in left_out]
    _check_followers(chosen)
    offered = tuple(LEVERS) if levers is None else (levers,) if isinstance(levers, str) else tuple(levers)
    kept = _without_idle([block for block in chosen if block.lever in offered or block.kind == "events"])
    if not kept:
        governed = ", ".join(dict.fromkeys(block.lever for block in chosen)) or "nothing"
        raise MismatchError(f"rule {name!r} governs {governed}, but the levers are {', '.join(offered)}; add its lever")
    return Composite(
        name=name,
        blocks=kept,
        signals=tuple(dict.fromkeys(signal for block in kept for signal in block.signals)),
        levers={block.lever: block.kind for block in kept},
    )


def _without_idle(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The blocks but those that follow what none of them sets any more, since the lever of the one that did is not there."""
    written = {name for block in blocks for name in block.writes if name not in block.follows}
    return tuple(block for block in blocks if written.issuperset(block.follows))


def _check_followers(blocks: Sequence[Block]) -> None:
    for place, block in enumerate(blocks):
        setters = {name for other in blocks[:place] for name in other.writes}
        lacking = [name for name in block.follows if name not in setters]
        if lacking:
            raise ConfigError(
                f"block {block.name!r} follows {lacking[0]!r} of the shared state, which no block before it sets; "
                "put a block that does in front of it"
            )


def single(kind: type[Block], *partners: type[Block]) -> Callable[..., Composite]:
    """The factory of a rule of one block: its options are those of the block, and ``levers``.

    Args:
        kind: the block.
        partners: blocks that follow it, with their defaults.
    """

    def factory(*, levers: Sequence[str] | None = None, **options: Any) -> Composite:
        return compose(kind.name, [kind(**options), *(partner() for partner in partners)], levers=levers)

    own = inspect.signature(kind).parameters.values()
    given = inspect.signature(factory).parameters["levers"]
    signature = inspect.Signature([*own, given], return_annotation=Composite)
    factory.__doc__ = kind.doc
    setattr(factory, "__signature__", signature)  # noqa: B010 - a function has no such attribute for the type checker
    return factory


def several(name: str, doc: str, blocks: Sequence[str]) -> Callable[..., Composite]:
    """The factory of a rule of several blocks with their defaults.

    Its options are ``levers`` and ``without`` of ``compose``.
    """

    def factory(*, levers: Sequence[str] | None = None, without: Sequence[str] = ()) -> Composite:
        return compose(name, blocks, levers=levers, without=without)

    factory.__doc__ = doc
    return factory
