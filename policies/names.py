"""Names of the rules, without importing any of them: `trimtab --help` and `trimtab.rules()` stay light."""

from __future__ import annotations

BUILT_IN = (
    "constant",
    "step",
    "exponential",
    "cosine",
    "warmup-cosine",
    "cosine-restarts",
    "wsd",
    "one-cycle",
    "plateau",
    "greedy",
    "random",
    "prune-once",
    "prune-cubic",
    "prune-iterative",
    "grow-steps",
    "prune-steps",
    "rewire",
    "dormant-reset",
    "newborn-aware",
    "plateau-nudge",
    "hypergradient",
    "autoclip",
    "zclip",
    "sigma-clip",
    "palm-rewind",
    "opt-restart",
    "moment-reset",
    "anchor",
    "steady",
    "careful",
    "recovering",
    "responsive",
    "shifting",
    "full",
)
REGISTERED: list[str] = []  # filled by `register_rule`


def rules() -> tuple[str, ...]:
    """Names that `load_policy` takes: the built-in rules, then those that were registered.

    >>> "cosine" in rules()
    True
    """
    return (*BUILT_IN, *REGISTERED)
