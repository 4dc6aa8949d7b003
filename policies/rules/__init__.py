"""Rules: hand-written policies, by name. One table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trimtab.policies.policy import Policy
from trimtab.policies.rules import blind, reactive, schedules, structural
from trimtab.policies.rules.composites import COMPOSITES, SINGLE, composite_factory

Factory = Callable[..., Policy]


@dataclass(frozen=True, kw_only=True)
class RuleEntry:
    """One rule.

    Attributes:
        name: lower-case words with hyphens.
        doc: one line for tables.
        factory: makes the policy; its keyword arguments are the rule's options.
        source: the paper or the implementation that it follows; empty for ours.
        needs: what must be known for the rule to act: ``"progress"`` (a budget), ``"val"`` (a validation loss).
        adapts: its factory takes ``levers``, the ones that there are, and makes do with them.
    """

    name: str
    doc: str
    factory: Factory
    source: str = ""
    needs: tuple[str, ...] = ()
    adapts: bool = False


def _table() -> tuple[RuleEntry, ...]:
    def row(
        name: str, factory: Factory, doc: str, source: str = "", needs: tuple[str, ...] = (), adapts: bool = False
    ) -> RuleEntry:
        return RuleEntry(name=name, doc=doc, factory=factory, source=source, needs=needs, adapts=adapts)

    budget = ("progress",)
    return (
        row("constant", schedules.constant, "the identity: multiplier 1 throughout"),
        row("step", schedules.step, "0.1 at half of the budget, 0.01 at three quarters",
            "He et al., arXiv 1512.03385", budget),
        row("exponential", schedules.exponential, "exponential decay to 1 % at the end of the budget", "", budget),
        row("cosine", schedules.cosine, "half a cosine to the floor", "Loshchilov & Hutter, arXiv 1608.03983", budget),
        row("warmup-cosine", schedules.warmup_cosine, "linear warm-up over a tenth, then half a cosine",
            "Goyal et al., arXiv 1706.02677", budget),
        row("cosine-restarts", schedules.cosine_restarts, "three cosine periods, each twice as long as the one before",
            "Loshchilov & Hutter, arXiv 1608.03983", budget),
        row("wsd", schedules.wsd, "warm-up, stable, linear decay over the last fifth",
            "Hu et al., arXiv 2404.06395", budget),
        row("one-cycle", schedules.one_cycle, "cosine up over 30 % of the budget, then down to almost nothing",
            "Smith & Topin, arXiv 1708.07120", budget),
        row("plateau", reactive.plateau, "halves the rate when the validation (else training) loss stops falling",
            "torch.optim.lr_scheduler.ReduceLROnPlateau"),
        row("greedy", reactive.greedy, "raises the rate on every new best training loss, lowers it otherwise",
            "Subramanian et al., GreedyLR, arXiv 2512.14527"),
        row("random", blind.random, "independent uniform moves on every lever", adapts=True),
        row("prune-once", structural.prune_once, "prunes to 30 % of the units at 30 % of the budget",
            "Lee et al., arXiv 1810.02340, later in training", budget),
        row("prune-cubic", structural.prune_cubic, "prunes to 30 % of the units along a cubic, fast at first",
            "Zhu & Gupta, arXiv 1710.01878", budget),
        row("prune-iterative", structural.prune_iterative, "prunes 20 % of the remaining units in each of five rounds",
            "Frankle & Carbin, arXiv 1803.03635, without rewinding", budget),
        row("grow-steps", structural.grow_steps, "grows to 80 % of the units in five equal steps",
            "Lillo & Cheney, arXiv 2605.15435, Grow", budget),
        row("prune-steps", structural.prune_steps, "prunes to 20 % of the units in five equal steps",
            "Lillo & Cheney, arXiv 2605.15435, Prune", budget),
        row("rewire", structural.rewire, "prunes and grows the same share of units again and again, less and less",
            "RigL, Evci et al., arXiv 1911.11134, and SET, arXiv 1707.04780, with units for weights", budget),
        row("dormant-reset", structural.dormant_reset, "resets the worst units while a tenth of them is dormant",
            "Sokar et al., arXiv 2302.12902"),
        row("newborn-aware", structural.newborn_aware, "grows as grow-steps does, once the last newborns have recovered",
            "the open question of Lillo & Cheney, arXiv 2605.15435; the rule is ours", budget),
        *(row(name, factory, doc, source, adapts=True) for name, (factory, doc, source) in SINGLE.items()),
        *(row(name, composite_factory(name), doc, adapts=True) for name, (_, doc) in COMPOSITES.items()),
    )  # fmt: skip


RULES: dict[str, RuleEntry] = {entry.name: entry for entry in _table()}
