"""Lottery tickets: each round beside the slow way, what is begun anew, and the controls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.inner_training.structure.populations import family_of
from tests.inner_training.structure.test_stacked_masks import assert_masked
from trimtab.errors import UserError
from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.lottery import ARMS, Lottery
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.task import Instance

STEPS = 10


def instance(seed: int, name: str = "mlp", rule: str = "adamw", width: float = 1.0) -> Instance:
    return replace(family_of(name).made(seed, rule, width), steps=STEPS)


def fresh(one: Instance, seed: int) -> Instance:
    return replace(one, parameters=instance(seed).parameters)


def lottery(rewind: object = 0, seeds: int = 2, name: str = "mlp", width: float = 1.0) -> Lottery:
    """All arms of each ticket, one after another."""
    made, arms, tickets = [], [], []
    for seed in range(seeds):
        ticket = len(made)
        for arm in ARMS:
            one = instance(seed, name, width=width)
            made.append(fresh(one, 100 + seed) if arm == "fresh" else one)
            arms.append(arm)
            tickets.append(ticket)
    runs = Population(family_of(name), len(made), rules=("adamw",), mode="eager")
    runs.reset(range(len(made)), made)
    return Lottery(Stacked(runs), arms, tickets, rewind=rewind)  # type: ignore[arg-type]


def play(game: Lottery, rounds: int) -> None:
    for _ in range(rounds):
        game.begin()
        game._structure.population.advance(STEPS - game.latest)
        game.prune()


def weights(game: Lottery) -> dict[str, Tensor]:
    runs = game._structure.population
    return {name: one.clone() for name, one in runs.layout.views(runs._learner.parameters).items()}


def flat(game: Lottery, parts: dict[str, Tensor], run: int) -> Tensor:
    return torch.cat([parts[name][run].flatten() for name in game.live])


def test_a_round_takes_a_fifth_of_the_smallest_of_all_layers() -> None:
    game = lottery()
    for _ in range(3):
        live = dict(game.live)
        play(game, 1)
        for run in (0, len(ARMS)):
            before, after = flat(game, live, run), flat(game, game.live, run)
            assert int(after.sum()) == int(before.sum()) - round(0.2 * int(before.sum()))
            values = flat(game, weights(game), run).abs()
            order = sorted(
                (place for place in range(len(values)) if before[place]), key=lambda place: float(values[place])
            )
            expected = before.clone()
            expected[order[: int(before.sum()) - int(after.sum())]] = False
            assert torch.equal(after, expected)
    assert game.rounds == 3 and torch.allclose(game.density, torch.full((8,), 0.8**3), atol=0.01)


@pytest.mark.parametrize("rewind", [0, 3])
def test_survivors_begin_again_and_nothing_else_is_left(rewind: int) -> None:
    game = lottery(rewind)
    runs = game._structure.population
    game.begin()
    dense = weights(game)
    runs.advance(STEPS - rewind)
    game.prune()
    game.begin()
    assert (runs.steps_done == rewind).all() and (runs.base["lr"] == runs._recipes.initial_lr).all()
    assert not runs._learner.first.any() and not runs._learner.second.any() and not runs._learner.updates.any()
    now = weights(game)
    for name, old in dense.items():
        live = game.live.get(name, torch.ones_like(old, dtype=torch.bool))
        assert torch.equal(now[name], torch.where(live, old, 0.0))
    runs.advance(2)
    assert_masked(game._structure)


def test_steps_of_rewinding_may_differ_and_do_not_touch_each_other() -> None:
    """Runs side by side do what each does among its like."""
    both = lottery([0] * len(ARMS) + [4] * len(ARMS))
    play(both, 2)
    for rewind, which in ((0, slice(0, len(ARMS))), (4, slice(len(ARMS), None))):
        alone = lottery(rewind)
        play(alone, 2)
        for name, live in alone.live.items():
            assert torch.equal(live[which], both.live[name][which])
            torch.testing.assert_close(weights(alone)[name][which], weights(both)[name][which], rtol=0, atol=1e-6)


def test_the_dense_round_is_the_plain_training() -> None:
    game = lottery(3)
    runs = game._structure.population
    plain = Population(family_of("mlp"), runs.num_runs, rules=("adamw",), mode="eager")
    plain.reset(range(runs.num_runs), [one for one in runs.instances if one is not None])
    plain.advance(STEPS)
    game.begin()
    runs.advance(STEPS - 3)
    assert torch.equal(runs._learner.parameters, plain._learner.parameters)


def test_controls_have_what_they_promise() -> None:
    game = lottery()
    play(game, 4)
    arms, masks = list(ARMS), {name: live.clone() for name, live in game.live.items()}
    ticket, other, shuffled, spread = (arms.index(name) for name in ("ticket", "fresh", "shuffled", "random"))
    differ = 0
    for live in masks.values():
        counts = live.flatten(1).sum(1)
        assert torch.equal(live[other], live[ticket])
        assert counts[shuffled] == counts[ticket]
        differ += int((live[shuffled] != live[ticket]).sum())
    assert differ > 0
    total = sum(live.flatten(1).sum(1) for live in masks.values())
    assert len(set(total.tolist())) == 1
    assert any(live[spread].sum() != live[ticket].sum() for live in masks.values())
    game.begin()
    now = weights(game)["layers.1.weight"]
    live = masks["layers.1.weight"]
    assert not torch.equal(now[other][live[other]], now[ticket][live[ticket]])
    both = live[ticket] & live[shuffled]
    assert torch.equal(now[ticket][both], now[shuffled][both])


def test_shuffles_are_even_over_the_places() -> None:
    """Each place lives in about the share of shuffles that it should: 200 tickets' controls of one round."""
    game = lottery(seeds=50)
    play(game, 3)
    mean = game.live["layers.1.weight"][list(ARMS).index("random") :: len(ARMS)].float().mean(0)
    assert abs(float(mean.mean()) - 0.512) < 0.02 and float((mean - 0.512).abs().max()) < 0.3


def test_weights_of_inactive_units_are_none() -> None:
    game, whole = lottery(width=0.5), lottery()
    sizes = [sum(int(one[0].sum()) for one in each.live.values()) for each in (game, whole)]
    assert sizes[0] < sizes[1]
    play(game, 1)
    for run in range(2 * len(ARMS)):
        assert int(flat(game, game.live, run).sum()) == sizes[0] - round(0.2 * sizes[0])
    inactive = ~game._structure.active["layers.0"][0]
    assert not game.live["layers.0.weight"][:, inactive].any()


def test_what_does_not_fit_is_refused() -> None:
    runs = Population(family_of("mlp"), 2, rules=("adamw",), mode="eager")
    structure = Stacked(runs)
    with pytest.raises(UserError, match="run 0 has not begun"):
        Lottery(structure, ["ticket", "shuffled"], [0, 0])
    one = instance(0)
    runs.reset(range(2), [one, one])
    for arms, tickets, message in (
        (["ticket"], [0], "give one of each for 2 runs"),
        (["ticket", "shuffeld"], [0, 0], "did you mean 'shuffled'"),
        (["ticket", "shuffled"], [0, 1], "which is no ticket"),
        (["ticket", "ticket"], [0, 0], "a ticket follows itself"),
        (["ticket", "fresh"], [0, 0], "other initial values"),
    ):
        with pytest.raises(UserError, match=message):
            Lottery(structure, arms, tickets)
    for options, message in (
        ({"share": 1.0}, "strictly between"),
        ({"rewind": STEPS}, "rewind"),
        ({"rewind": [1]}, "one for each of 2"),
    ):
        with pytest.raises(UserError, match=message):
            Lottery(structure, ["ticket", "shuffled"], [0, 0], **options)  # type: ignore[arg-type]
    runs.reset([1], [fresh(one, 7)])
    with pytest.raises(UserError, match="initial values of its ticket"):
        Lottery(structure, ["ticket", "shuffled"], [0, 0])
    runs.reset([1], [instance(3, width=0.5)])
    with pytest.raises(UserError, match="give them the same widths"):
        Lottery(structure, ["ticket", "fresh"], [0, 0])
    assert np.isfinite(runs._learner.parameters.numpy()).all()
