"""Families made from files of the user's own, named ``format:path``, for example ``npz:data/mine.npz``.

Importing this module is light: a format's reader is imported when a family is made.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import UserError

if TYPE_CHECKING:
    from trimtab.inner_training.task import TaskFamily

# Reader of each format as module:function, and its options.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar10": ("cifar:cifar_task", {"classes": 10}),
    "cifar100": ("cifar:cifar_task", {"classes": 100}),
    "image-folder": ("image_folder:image_folder_task", {}),
    "npz": ("npz:npz_task", {}),
    "text": ("text:TextTask", {}),
}


def names_a_file(name: str) -> bool:
    """Whether a family's name is a format and a path.

    >>> names_a_file("npz:data/mine.npz"), names_a_file("my_tasks:make"), names_a_file("npz:")
    (True, False, False)
    """
    form, _, path = name.partition(":")
    return form in FORMATS and bool(path.strip())


def file_family(name: str) -> TaskFamily:
    """Makes the family of a file or folder, or returns the one made before in this process.

    Args:
        name: ``format:path`` with a format of ``FORMATS``; a relative path starts from the current folder, and ``~``
            is the user's home.

    Raises:
        UserError: when the path is missing or empty, or what is there cannot be used; the message says why.
    """
    form, _, path = name.partition(":")
    if not path.strip():
        raise UserError(f"task family {name!r} has no path; write {form}:PATH")
    place = expanded(path).absolute()
    try:
        return _file_family(form, place)
    except OSError as error:
        raise UserError(
            f"task family {name!r}: cannot read {place}: {error.strerror}; check who may read it"
        ) from error


def expanded(path: str | Path) -> Path:
    """The path with ``~`` filled in.

    Raises:
        UserError: when nobody is known by the name after it.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"path {str(path)!r} begins with a home folder that is unknown; write it out") from error


@cache
def _file_family(form: str, path: Path) -> TaskFamily:
    place, options = FORMATS[form]
    module, _, function = place.partition(":")
    made: TaskFamily = getattr(importlib.import_module(f"{__name__}.{module}"), function)(path, **options)
    return made


def family_name(form: str, path: Path) -> str:
    """Name of a family: the format and the last part of the path, so that moving the data changes no instance.

    >>> family_name("npz", Path("/data/My sets/Wheat_7.npz"))
    'npz-wheat-7'
    """
    return "-".join([form, *re.findall(r"[a-z0-9]+", path.stem.lower())])
