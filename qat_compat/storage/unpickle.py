"""A pickle machine that builds data and calls nothing.

The opcodes are those of the pickle protocols 0 to 5. A global that the table :mod:`qat_compat.storage.rebuild` knows
becomes data; every other one becomes an :class:`Opaque` stand-in that only records what the file says about it. No
class of the file is ever imported, no function of it ever called.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qat_compat.errors import CheckpointError, CompatError, LimitError
from qat_compat.storage.machine import EndOfPickle, Machine
from qat_compat.storage.opcodes import OPERATIONS, STOP

__all__ = ["unpickle"]

_MAX_STEPS = 50_000_000
_FRESH_COPY = "the file is corrupt or cut short; get a fresh copy"
# What operations on malformed operands raise; all of them mean the same here.
_MALFORMED = (
    *(AttributeError, IndexError, KeyError, MemoryError, OverflowError),
    *(TypeError, UnicodeError, ValueError, struct.error),
)


def unpickle(
    data: bytes | mmap.mmap,
    *,
    file: Path,
    record: str,
    storage: Callable[[tuple[Any, ...]], object],
    start: int = 0,
    end: int | None = None,
) -> tuple[Any, int]:
    """Build the object that `data[start:end]` describes; also return the offset after its last opcode.

    Args:
        data: The pickle.
        file: For messages.
        record: For messages: the record of the file that holds the pickle.
        storage: Called with each persistent id; returns the storage (or other object) that it stands for.

    Raises:
        UnsafeCheckpointError: It names a callable that runs code.
        LimitError: It asks for more than its size can justify.
        CheckpointError: It is malformed or cut short.
    """
    machine = Machine(data, start, len(data) if end is None else end, storage)
    try:
        return _run(machine), machine.position
    except CompatError as error:
        error.file = error.file or str(file)
        error.key = error.key or record
        raise
    except _MALFORMED as error:
        raise CheckpointError(
            f"the pickle is malformed at byte {machine.position}",
            file=file,
            key=record,
            expected="a complete pickle",
            found=f"{type(error).__name__}: {error}",
            remedy=_FRESH_COPY,
        ) from error


def _run(machine: Machine) -> Any:
    data, operations = machine.data, OPERATIONS
    for _ in range(_MAX_STEPS):
        if machine.position >= machine.end:
            raise EndOfPickle
        code = data[machine.position]
        machine.position += 1
        if code == STOP:
            if len(machine.stack) != 1 or machine.marks:
                raise ValueError(f"{len(machine.stack)} objects at the end")
            return machine.stack.pop()
        operation = operations.get(code)
        if operation is None:
            raise ValueError(f"unknown opcode 0x{code:02x}")
        operation(machine)
    raise LimitError(
        "the pickle has too many operations",
        expected=f"at most {_MAX_STEPS}",
        found="more",
        remedy="keep bulk data in tensors, or do not use this file",
    )
