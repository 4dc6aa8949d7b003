"""What is done about a defect: refuse at the first one, or note it and go on, to find all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trimtab.errors import UserError

Refuse = Callable[[UserError], None]


def at_once(error: UserError) -> None:
    """Raises it: what is loaded must have no defect at all."""
    raise error


def refuse_all(errors: Sequence[UserError], refuse: Refuse) -> None:
    """Refuses each; after the last, which is raised, there is nothing to go on with."""
    for error in errors[:-1]:
        refuse(error)
    if errors:
        raise errors[-1]
