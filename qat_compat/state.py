"""The tensors of a live module, by name. Reading only: nothing here writes to the module.

`Module.load_state_dict` is quadratic in the number of flat children and calls hooks that reset observers, so the package
keeps its own name -> tensor map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Slot", "collect_slots", "extra_state_keys", "join_path", "modules_of", "split_path"]


def join_path(*parts: str) -> str:
    """Join module paths, any of which may be empty.

    Example:
        >>> join_path("", "conv", "weight")
        'conv.weight'
    """
    return ".".join(part for part in parts if part)


def split_path(name: str) -> tuple[str, str]:
    """Split a dotted name into its parent and its last part.

    Example:
        >>> split_path("block.conv.weight"), split_path("weight")
        (('block.conv', 'weight'), ('', 'weight'))
    """
    parent, _, leaf = name.rpartition(".")
    return parent, leaf


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One tensor of a module, under all the names that reach it.

    Args:
        keys: Its names in traversal order; more than one where it is tied or its module is shared.
        owners: The `(module, attribute)` pairs that hold it, in the same order as `keys`.
        is_parameter: Parameter or buffer.
        persistent: Whether the state_dict holds it.
        tensor: The tensor object itself.
    """

    keys: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...]
    is_parameter: bool
    persistent: bool
    tensor: Tensor

    @property
    def key(self) -> str:
        return self.keys[0]


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name that reaches it, in the order of `state_dict`."""
    return model.named_modules(remove_duplicate=False)


def collect_slots(model: nn.Module) -> dict[str, Slot]:
    """Map every parameter and buffer name to its :class:`Slot`; tied names share one.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> model[1].weight = model[0].weight
        >>> slots = collect_slots(model)
        >>> list(slots), slots["0.weight"] is slots["1.weight"]
        (['0.weight', '1.weight'], True)
    """
    names: dict[int, list[str]] = {}
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    tensors: dict[int, Tensor] = {}
    persistent: dict[int, bool] = {}
    order: list[tuple[str, int]] = []
    for path, module in modules_of(model):
        own: list[tuple[str, Tensor | None, bool]] = [(n, p, True) for n, p in module._parameters.items()]
        own += [(n, b, n not in module._non_persistent_buffers_set) for n, b in module._buffers.items()]
        for name, tensor, kept in own:
            if tensor is None:
                continue
            ident = id(tensor)
            key = join_path(path, name)
            tensors[ident] = tensor
            names.setdefault(ident, []).append(key)
            owners.setdefault(ident, []).append((module, name))
            persistent[ident] = persistent.get(ident, False) or kept
            order.append((key, ident))
    slots = {
        ident: Slot(
            tuple(names[ident]),
            tuple(owners[ident]),
            isinstance(tensor, nn.Parameter),
            persistent[ident],
            tensor,
        )
        for ident, tensor in tensors.items()
    }
    return {key: slots[ident] for key, ident in order}


def extra_state_keys(model: nn.Module) -> dict[str, nn.Module]:
    """Key -> module for every module that overrides `get_extra_state`."""
    default = nn.Module.get_extra_state
    return {
        join_path(path, torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX): module
        for path, module in modules_of(model)
        if type(module).get_extra_state is not default
    }
