"""Rules: hand-written policies, by name. One table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trimtab.policies.policy import Policy
from trimtab.policies.rules import blind, reactive, schedules
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
        *(row(name, factory, doc, source, adapts=True) for name, (factory, doc, source) in SINGLE.items()),
        *(row(name, composite_factory(name), doc, adapts=True) for name, (_, doc) in COMPOSITES.items()),
    )  # fmt: skip


RULES: dict[str, RuleEntry] = {entry.name: entry for entry in _table()}
