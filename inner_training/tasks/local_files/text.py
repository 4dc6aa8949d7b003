"""A text file of the user's own, learned byte by byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.inner_training.tasks.language import RECIPE, Part, TextFamily, TextVariation
from trimtab.inner_training.tasks.local_files import family_name
from trimtab.inner_training.tasks.local_files.common import existing
from trimtab.inner_training.tasks.recipe import RecipeRange, halves

SECTIONS = 32
BYTES = 8 * 2**20


class TextTask(TextFamily):
    """Next-byte prediction on a text file, in any encoding.

    The text is cut into 32 sections of equal length, a fixed half of which is for training instances and the other for
    held-out ones; an instance takes windows of some of its half's sections, none of them corrupted.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "squares.txt"
    ...     _ = path.write_text(" ".join(f"{n} {n * n}" for n in range(1000)))
    ...     family = TextTask(path, network={"context": 24})
    >>> family.name, family.vocabulary, tuple(family.inputs.shape)
    ('text-squares', 128, (416, 25))
    """

    def __init__(
        self, path: str | Path, *, network: Mapping[str, Any] | None = None, recipe: RecipeRange | None = None
    ) -> None:
        """Reads the text.

        Args:
            path: the file; of one longer than 8 MiB the beginning is used.
            network: arguments of `LanguageModel` in place of the default ones, such as ``context`` or ``width``.
            recipe: what to draw recipes from; None is the default.

        Raises:
            UserError: when there is no such file, it is too short or repeats itself, or the network cannot be made.
        """
        file = existing(path, "give the path of a text file")
        if not file.is_file():
            raise UserError(f"{file} is no file; give the path of a text file")
        with file.open("rb") as opened:
            text = opened.read(BYTES)
        name = family_name("text", file)
        held_out = set(halves(name, SECTIONS)[1].tolist())
        bounds = [len(text) * section // SECTIONS for section in range(SECTIONS + 1)]
        parts = [
            Part(f"section-{section}", text[bounds[section] : bounds[section + 1]], section in held_out)
            for section in range(SECTIONS)
        ]
        super().__init__(
            name,
            f"bytes of {file.name}",
            parts,
            network=network,
            recipe=recipe or RECIPE,
            variation=TextVariation(corrupted=0.0),
        )
