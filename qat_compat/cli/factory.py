"""Models that a command is told of as `module:factory`."""

from __future__ import annotations

import importlib
import operator
import os
import sys

from torch import nn

from qat_compat.errors import CompatError

__all__ = ["layout_of", "made_by"]


def layout_of(text: str | None) -> nn.Module | str | None:
    """What `--like` names: a float checkpoint, or the float model that a factory makes."""
    if text is None or os.path.exists(text) or ":" not in text:  # noqa: PTH110 - any text may be asked about
        return text
    return made_by(text)


def made_by(factory: str) -> nn.Module:
    """What the user's own function returns. An exception of that function is the user's, and is shown as it is."""
    name, colon, attribute = factory.partition(":")
    if not (name and colon and attribute):
        raise CompatError("this names no factory", key=factory, expected="module:factory", found=factory)
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not look into the current folder by itself
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise CompatError(
            "there is no such module",
            key=factory,
            found=error,
            remedy="run this where it can be imported: from its folder, or with PYTHONPATH",
        ) from error
    try:
        make = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise CompatError("the module has no such factory", key=factory, found=error) from error
    if not callable(make):
        raise CompatError("this is no factory", key=factory, expected="a callable", found=type(make).__name__)
    model = make()
    if not isinstance(model, nn.Module):
        raise CompatError(
            "the factory returned no model", key=factory, expected="an nn.Module", found=type(model).__name__
        )
    return model
