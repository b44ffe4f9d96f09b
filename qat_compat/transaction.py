"""The model as it was, and the way back to it: what makes a load all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from qat_compat.frameworks import Description
from qat_compat.isolation import preserved_random_state
from qat_compat.state import Slot

__all__ = ["Transaction", "rehearsal"]


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Transaction:
    """The model as it was, and the way back to it.

    Args:
        model: The model.
        slots: Its tensors.
        runs: Whether anything will run that can change more of a module than the tensors that are installed.
    """

    def __init__(self, model: nn.Module, slots: Mapping[str, Slot], *, runs: bool = True) -> None:
        self.slots = {slot.key: slot for slot in slots.values()}
        changed = dict.fromkeys(model.modules()) if runs else {}
        if not runs:  # only what is on the meta device gets other tensor objects
            metas = (slot for slot in self.slots.values() if slot.tensor.is_meta)
            changed = dict.fromkeys(module for slot in metas for module, _ in slot.owners)
        self._modules = [
            (
                m,
                dict(m.__dict__),
                dict(m._parameters),
                dict(m._buffers),
                dict(m._modules),
                set(m._non_persistent_buffers_set),
                {name: dict(hooks) for name in _HOOKS if (hooks := m.__dict__.get(name))},
            )
            for m in changed
        ]
        self.undo: list[Callable[[], object]] = []  # what else is to be called on the way back, the last first
        self._data = {key: slot.tensor.data for key, slot in self.slots.items()}

    def install(self, key: str, value: Tensor) -> None:
        """Make a slot hold `value`; the tensor object stays the same wherever that is possible."""
        slot = self.slots[key]
        if not slot.tensor.is_meta:
            for tensor in slot.tensors:
                tensor.data = value
            return
        fresh = nn.Parameter(value, slot.tensor.requires_grad) if slot.is_parameter else value
        for module, name in slot.owners:
            (module._parameters if slot.is_parameter else module._buffers)[name] = fresh  # type: ignore[assignment]

    def scratch(self, but: Container[str] = ()) -> None:
        """Copies stand in for every buffer `but` those, so that nothing that runs can reach the model's own."""
        for key, slot in self.slots.items():
            if not slot.is_parameter and not slot.tensor.is_meta and key not in but:
                self.install(key, slot.tensor.data.clone())

    def settle(self, staged: Mapping[str, Tensor], changed: set[str]) -> None:
        """Keep what quantizers wrote to the buffers in `changed`; every other one gets its staged or its old value."""
        for key, slot in self.slots.items():
            if slot.is_parameter or slot.tensor.is_meta:
                continue
            if key in changed:
                module, name = slot.owners[0]
                current = module._buffers[name]
                if current is not None and current is not slot.tensor:
                    self.install(key, current.data)
            else:
                self.install(key, staged.get(key, self._data[key]))
            by_id = {id(tensor): tensor for tensor in slot.tensors}
            for module, name in slot.owners:
                if id(module._buffers[name]) not in by_id:
                    module._buffers[name] = slot.tensor

    def roll_back(self) -> None:
        """Put everything back; an interrupt in the middle of it is raised when it is done."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self._put_back()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _put_back(self) -> None:
        for undo in reversed(self.undo):
            with suppress(Exception):  # a module's own code; the error that leads back is the one to be told
                undo()
        for module, attributes, parameters, buffers, children, hidden, hooks in self._modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for mapping, saved in (
                (module._parameters, parameters),
                (module._buffers, buffers),
                (module._modules, children),
            ):
                mapping.clear()
                mapping.update(saved)  # type: ignore[arg-type]
            module._non_persistent_buffers_set = hidden
            for name in _HOOKS:  # handles of the user's hooks know these very mappings
                now = module.__dict__.get(name, {})
                if now != (before := hooks.get(name, {})):
                    now.clear()
                    now.update(before)
        for key, slot in self.slots.items():
            for tensor in slot.tensors:
                tensor.data = self._data[key]


@contextmanager
def rehearsal(description: Description, values: Mapping[str, Callable[[], Tensor]] | None = None) -> Iterator[None]:
    """Run the model on scratch copies of its buffers; afterwards everything is as it was, whatever happened.

    Args:
        description: The model.
        values: Key -> reads the value that stands in for the model's own meanwhile.
    """
    with preserved_random_state(), torch.no_grad():
        transaction = Transaction(description.view.model, description.view.slots)
        try:
            transaction.scratch()
            for key, read in (values or {}).items():
                slot = description.view.slots[key]
                transaction.install(slot.key, read().to(slot.tensor.device, slot.tensor.dtype, copy=True))
            yield
        finally:
            transaction.roll_back()
