"""Words from files on a terminal: what would steer it, or cannot be shown by it, is written out."""

from __future__ import annotations


def printable(words: object) -> str:
    """One line of text in which every character is one that can be seen.

    Control characters (escape sequences, line feeds), those that change the direction of writing, and lone surrogates
    become backslash escapes.

    >>> printable("caf\\u00e9"), printable("a\\x1b[2J\\nb"), printable("\\u202eexe"), printable("\\ud800")
    ('caf\u00e9', 'a\\\\x1b[2J\\\\nb', '\\\\u202eexe', '\\\\ud800')
    """
    text = str(words)
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def printable_lines(text: str) -> str:
    """``printable`` for every line of a text that was put together from lines."""
    return "\n".join(printable(line) for line in text.split("\n"))
