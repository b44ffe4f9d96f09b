"""Values of a file as text for messages."""

from __future__ import annotations

import reprlib

__all__ = ["short"]

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = _SHORT.maxset = _SHORT.maxfrozenset = 8
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def short(value: object) -> str:
    """`repr(value)`, cut in length and depth: a file can nest parts so that they share, and their full text never ends.

    Example:
        >>> short([[[[[1]]]]])
        '[[[[...]]]]'
    """
    return _SHORT.repr(value)
