"""The tensors of a live module, by name. Reading only: nothing here writes to the module.

`Module.load_state_dict` is quadratic in the number of flat children and calls hooks that reset observers, so the
package keeps its own name -> tensor map.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

from torch import Tensor, nn

__all__ = [
    "Slot",
    "collect_slots",
    "has_extra_state",
    "join_path",
    "memory_of",
    "modules_like",
    "modules_of",
    "split_path",
]


def join_path(*parts: str) -> str:
    """Join module paths, any of which may be empty.

    Example:
        >>> join_path("", "conv", "weight")
        'conv.weight'
    """
    if len(parts) == 2:  # by far the most frequent call
        return f"{parts[0]}.{parts[1]}" if parts[0] and parts[1] else parts[0] or parts[1]
    return ".".join(part for part in parts if part)


def split_path(name: str) -> tuple[str, str]:
    """Split a dotted name into its parent and its last part.

    Example:
        >>> split_path("block.conv.weight"), split_path("weight")
        (('block.conv', 'weight'), ('', 'weight'))
    """
    parent, _, leaf = name.rpartition(".")
    return parent, leaf


class Slot:
    """One tensor of a module, under all the names that reach it.

    Args:
        keys: Its names in traversal order; more than one where it is tied or its module is shared. `key` is the first.
        owners: The `(module, attribute)` pairs that hold it, in the same order as `keys`.
        is_parameter: Parameter or buffer.
        persistent: Whether the state_dict holds it.
        tensors: The tensor objects, more than one where different objects share one memory. `tensor` is the first.
    """

    __slots__ = ("is_parameter", "key", "keys", "owners", "persistent", "tensor", "tensors")

    def __init__(
        self,
        keys: tuple[str, ...],
        owners: tuple[tuple[nn.Module, str], ...],
        is_parameter: bool,
        persistent: bool,
        tensors: tuple[Tensor, ...],
    ) -> None:
        self.keys = keys
        self.owners = owners
        self.is_parameter = is_parameter
        self.persistent = persistent
        self.tensors = tensors
        self.key = keys[0]
        self.tensor = tensors[0]


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name that reaches it, in the order of `state_dict`."""
    found: list[tuple[str, nn.Module]] = []
    _walk(model, "", found)
    yield from found


def _walk(module: nn.Module, path: str, found: list[tuple[str, nn.Module]]) -> None:
    # `named_modules` hands each name up through one generator per level
    found.append((path, module))
    prefix = f"{path}." if path else ""
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, prefix + name, found)


def modules_like(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Each module of a kind once, with all the names that reach it.

    Example:
        >>> shared = nn.ReLU()
        >>> modules_like(nn.Sequential(shared, nn.Tanh(), shared), lambda module: isinstance(module, nn.ReLU))
        [(('0', '2'), ReLU())]
    """
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in modules_of(model):
        if wanted(module):
            names.setdefault(id(module), []).append(path)
            modules[id(module)] = module
    return [(tuple(names[ident]), module) for ident, module in modules.items()]


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
    by_address: dict[int, list[_Row]] = {}
    keys: list[str] = []
    for path, module in modules_of(model):
        hidden = module._non_persistent_buffers_set
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    key = join_path(path, name)
                    by_address.setdefault(_address(tensor), []).append((key, module, name, tensor, name not in hidden))
                    keys.append(key)
    slots: dict[str, Slot] = {}
    for rows in by_address.values():
        if len(rows) == 1:  # nearly always
            slots[rows[0][0]] = _slot(rows)
            continue
        same: dict[Hashable, list[_Row]] = {}
        for row in rows:  # what begins at one address may still be several views
            same.setdefault(memory_of(row[3]), []).append(row)
        for tied in same.values():
            slots.update(dict.fromkeys([row[0] for row in tied], _slot(tied)))
    return {key: slots[key] for key in keys}


_Row = tuple[str, nn.Module, str, Tensor, bool]  # key, owner, name, tensor, persistent


def _address(tensor: Tensor) -> int:
    """A number that tensors of the same memory have in common: the quick half of :func:`memory_of`."""
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and not tensor.is_meta
    return (tensor.data_ptr() if plain else 0) or id(tensor)


def _slot(rows: list[_Row]) -> Slot:
    if len(rows) == 1:  # nearly always
        ((key, module, name, tensor, kept),) = rows
        return Slot((key,), ((module, name),), isinstance(tensor, nn.Parameter), kept, (tensor,))
    return Slot(
        tuple(key for key, *_ in rows),
        tuple((module, name) for _, module, name, _, _ in rows),
        isinstance(rows[0][3], nn.Parameter),
        any(kept for *_, kept in rows),
        tuple({id(tensor): tensor for _, _, _, tensor, _ in rows}.values()),
    )


def memory_of(tensor: Tensor) -> Hashable:
    """What two tensors have in common exactly when they are the same view of the same memory.

    Example:
        >>> import torch
        >>> weight = torch.zeros(2, 2)
        >>> memory_of(weight) == memory_of(weight.detach()), memory_of(weight) == memory_of(weight[0])
        (True, False)
    """
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def has_extra_state(module: nn.Module) -> bool:
    """Whether a module overrides `get_extra_state`."""
    return type(module).get_extra_state is not nn.Module.get_extra_state
