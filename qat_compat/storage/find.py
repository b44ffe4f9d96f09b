"""Which of the checkpoints in a folder to go on from."""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat_compat.errors import CheckpointError
from qat_compat.storage.io import open_source
from qat_compat.storage.locate import SeveralSetsError

__all__ = ["find_checkpoint"]

_LOG = logging.getLogger(__name__)
_SIDECARS = {".sha256": 64, ".md5": 32}  # suffix -> hexadecimal digits
_BLOCK = 1 << 20
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # a link that leads nowhere, too


def find_checkpoint(
    folder: str | os.PathLike[str], pattern: str, *, config: Mapping[str, Any] | None = None
) -> Path | None:
    """The newest complete checkpoint that matches, or None: then training starts from scratch.

    A file is complete if it opens, and if its data fit its checksums: those in the file, and those of a sidecar
    (`model.pt.sha256`, `model.pt.md5`) where there is one. An incomplete file is passed over, and the log says why; one
    that cannot be opened now, though it is there, is an error: it may be the newest.

    Example:
        >>> import tempfile, torch
        >>> from qat_compat.storage import save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save({"w": torch.ones(2)}, f"{folder}/pretrain_512.pth")
        ...     found = find_checkpoint(folder, "pretrain_{hidden_size}*.pth", config={"hidden_size": 512})
        ...     print(found.name, find_checkpoint(folder, "full_sft_*.pth"))
        pretrain_512.pth None

    Args:
        folder: Where to look; it need not exist.
        pattern: Glob pattern of the names; `{field}` stands for a value of `config`.
        config: Values for the pattern. Needed only if it has fields.

    Raises:
        CheckpointError: The pattern is none, or has a field that `config` has not; or the folder or a file in it
            cannot be read (permissions, too many open files, the disk).
    """
    names = _filled(pattern, config or {})
    root = _folder(folder)
    for path in sorted(_matching(root, names), key=_age, reverse=True):
        problem = _problem(path)
        if problem is None:
            return path
        _LOG.warning("%s is not complete and is passed over: %s", path, problem)
    _LOG.warning("no complete checkpoint matches %s in %s: training starts from scratch", names, root)
    return None


def _folder(folder: str | os.PathLike[str]) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise CheckpointError(
            "this is no folder", expected="a path", found=type(folder).__name__, remedy="pass where the checkpoints are"
        )
    return Path(os.fsdecode(folder))


def _matching(root: Path, names: str) -> list[Path]:
    try:
        found = [path for path in root.glob(names) if not path.name.startswith(".") and not _is_sidecar(path)]
        if not found and root.is_dir():
            os.scandir(root).close()  # a glob keeps silent about a folder that may not be read
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(
            "the pattern is malformed",
            key=names,
            expected="a glob for names below the folder",
            found=error,
            remedy="pass the folder by itself, and the pattern of what is in it",
        ) from error
    except OSError as error:
        raise _unreadable(root, error) from error
    return found


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        "it cannot be told which checkpoint is the newest: this one cannot be read",
        file=path,
        found=error,
        remedy="check its permissions, the disk and how many files may be open at a time (`ulimit -n`)",
    )


class _Escaped(string.Formatter):
    """A value of the configuration is text, whatever a glob would read in it."""

    def format_field(self, value: Any, format_spec: str) -> str:
        return glob.escape(str(super().format_field(value, format_spec)))


def _filled(pattern: str, config: Mapping[str, Any]) -> str:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "the pattern is malformed", key=str(pattern), found=error, remedy="double a literal brace"
        ) from error
    missing = [name for name in fields if name not in config]
    if missing:
        raise CheckpointError(
            "the pattern has a field that the configuration has not",
            key=pattern,
            expected=", ".join(sorted(map(str, config))) or "a configuration",
            found=missing[0],
            remedy=f"pass config={{{missing[0]!r}: ...}}",
        )
    try:
        return _Escaped().vformat(pattern, (), config) if fields else pattern
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(
            "the pattern does not fit the configuration",
            key=pattern,
            found=error,
            remedy="see the format of its fields",
        ) from error


def _age(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:  # a broken link, or a file that has just gone
        return 0, path.name


def _problem(path: Path) -> str | None:
    """Why a file is not complete; None if it is."""
    try:
        open_source(path, verify=True)
    except SeveralSetsError:
        pass  # which of them is for whoever loads it to say
    except CheckpointError as error:
        if (cause := _of_the_system(error)) is not None and cause.errno not in _NOT_THERE:
            raise _unreadable(path, cause) from error
        return str(error.message)
    try:
        return _differs_from_sidecar(path)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return "it has gone meanwhile"
        raise _unreadable(path, error) from error


def _of_the_system(error: BaseException | None) -> OSError | None:
    """What the operating system said, where that is behind an error."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error


def _differs_from_sidecar(path: Path) -> str | None:
    for suffix, digits in _SIDECARS.items():
        sidecar = path.with_name(path.name + suffix)
        if path.is_file() and sidecar.is_file():
            expected = sidecar.read_text(errors="replace").split()[:1]
            if not expected or len(expected[0]) != digits:
                return f"{sidecar.name} holds no checksum"
            if _checksum(path, suffix.removeprefix(".")) != expected[0].lower():
                return f"its checksum differs from {sidecar.name}"
    return None


def _checksum(path: Path, name: str) -> str:
    digest = hashlib.new(name, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _is_sidecar(path: Path) -> bool:
    return path.suffix in _SIDECARS or path.suffix == ".tmp"
