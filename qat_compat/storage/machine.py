"""The stack machine of pickle, without the power to import or call anything."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from typing import Any

from qat_compat.errors import LimitError
from qat_compat.storage.rebuild import build, check_key, construct, find_global
from qat_compat.storage.standins import NumpyArray, Opaque

__all__ = ["EndOfPickle", "Machine"]

_SPARE = 64 << 20  # bytes
_FOLD = 8
_POINTER = 8


class Machine:
    """The pickle, the stack, the marks in it and the memo.

    Args:
        data: The pickle.
        start: Offset of its first opcode.
        end: Offset after which nothing of it can be.
        storage: Called with each persistent id.
    """

    def __init__(
        self, data: bytes | mmap.mmap, start: int, end: int, storage: Callable[[tuple[Any, ...]], object]
    ) -> None:
        self.data = data
        self.position = start
        self.end = end
        self.storage = storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.marks: list[int] = []
        self.credit = _SPARE + _FOLD * (end - start)  # bytes that calls may still make

    # Bytes of the pickle

    def take(self, length: int) -> bytes:
        stop = self.position + length
        if length < 0 or stop > self.end:
            raise EndOfPickle
        piece = self.data[self.position : stop]
        self.position = stop
        return piece

    def byte(self) -> int:
        value = self.data[self.position]
        self.position += 1
        return value

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def line(self) -> bytes:
        stop = self.data.find(b"\n", self.position, self.end)
        if stop < 0:
            raise EndOfPickle
        piece = self.data[self.position : stop]
        self.position = stop + 1
        return piece

    # The stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if self.marks and self.marks[-1] == len(self.stack):
            raise IndexError("stack underflow")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target = target.entries
        elif not isinstance(target, dict):
            raise TypeError(f"items set on {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[check_key(key)] = value

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target = target.items
        if isinstance(target, set):
            target.update(check_key(item) for item in items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise TypeError(f"items appended to {type(target).__name__}")

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def look_up(self, module: str, name: str) -> None:
        self.push(find_global(module, name))

    def reduce(self) -> None:
        arguments = self.pop()
        function = self.pop()
        if not isinstance(arguments, tuple):
            raise TypeError(f"arguments in a {type(arguments).__name__}")
        self.push(self._made(function, arguments))

    def new_object(self, keywords: bool = False) -> None:
        extra = self.pop() if keywords else {}
        arguments = self.pop()
        cls = self.pop()
        if not isinstance(arguments, tuple) or not isinstance(extra, dict):
            raise TypeError("malformed arguments of a class")
        made = self._made(cls, arguments)
        if extra and isinstance(made, Opaque):
            made.entries.update(extra)
        self.push(made)

    def instance(self, cls: object, arguments: list[Any]) -> None:
        self.push(self._made(cls, tuple(arguments)))

    def _made(self, function: object, arguments: tuple[Any, ...]) -> object:
        """What a call makes; what all calls make together is no more than the size of the pickle can justify.

        A few bytes of it can call a function many times on one large value that stands there once.
        """
        made = construct(function, arguments)
        if isinstance(made, (bytes, bytearray, str)):
            self.credit -= len(made)
        elif isinstance(made, (list, tuple, set, frozenset, dict)):
            self.credit -= _POINTER * len(made)
        elif isinstance(made, NumpyArray) and made.array is not None:
            self.credit -= made.array.nbytes
        if self.credit < 0:
            raise LimitError(
                "the pickle makes far more than it holds",
                expected=f"at most {_SPARE >> 20} MiB and {_FOLD} times its size",
                remedy="this is no trainer's file; do not use it",
            )
        return made

    def build(self) -> None:
        state = self.pop()
        self.stack[-1] = build(self.stack[-1], state)

    def persistent(self) -> None:
        identifier = self.pop()
        if not isinstance(identifier, tuple):
            raise TypeError(f"a persistent id of type {type(identifier).__name__}")
        self.push(self.storage(identifier))


class EndOfPickle(ValueError):
    """The pickle ends in the middle of an operation."""

    def __str__(self) -> str:
        return "it ends in the middle"
