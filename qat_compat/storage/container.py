"""What every file format offers to the rest: how it is recognised, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qat_compat.storage.archive import Archive
from qat_compat.storage.mapped import MappedFile

__all__ = ["Container", "Opened", "Source"]

_HEAD = 4096


class Source:
    """A path, with the file at it mapped and its first bytes read; a folder has neither.

    Args:
        path: What the caller passed.
        verify: Check all data against the file's checksums while opening (True), never (False), or each tensor when it
            is first read, if the file carries checksums of this package (None).
    """

    def __init__(self, path: Path, verify: bool | None = None) -> None:
        self.path = path
        self.verify = verify
        self.is_folder = path.is_dir()
        self._file = None if self.is_folder else MappedFile(path)
        self.head = self._file.read(0, min(_HEAD, self._file.size)) if self._file else b""

    @cached_property
    def archive(self) -> Archive:
        """The ZIP archive that the file is."""
        return Archive(self.file)

    @property
    def file(self) -> MappedFile:
        assert self._file is not None, "a folder has no bytes"
        return self._file


@dataclass
class Opened:
    """The data of one file.

    Args:
        tree: Nested mappings and lists, in which tensors are :class:`~qat_compat.storage.lazy.LazyTensor`.
        metadata: What the file keeps beside its tensors.
        headers: Further such metadata, as each file's header has it: attributes of flattened tensor subclasses, too.
        versions: The `_metadata` of the state_dict, where the format keeps it apart from the tree.
        record: What this package wrote about the keys.
        notes: What had to be decided while opening.
    """

    tree: Any
    metadata: dict[str, Any] = field(default_factory=dict)
    headers: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Container:
    """One file format.

    Args:
        name: For messages.
        matches: Whether a source is of this format, by its content.
        open: Opens it.
    """

    name: str
    matches: Callable[[Source], bool]
    open: Callable[[Source], Opened]
