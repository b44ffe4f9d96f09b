"""Replacing a file so that either the old or the new one is there, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from qat_compat.errors import SaveError

__all__ = ["sync_folder", "write_atomically"]

_BUFFER = 1 << 20


def write_atomically(path: Path, write: Callable[[BinaryIO], None], *, backup: bool = False) -> Path:
    """Write a file beside `path`, bring it to the disk, and rename it to `path`.

    The file and its folder are fsynced, so that the rename is not ahead of the data after a power loss. A symbolic
    link stays a link: what it points to is replaced. The mode of an existing file is kept; a file without write
    permission is not replaced.

    Args:
        path: The destination.
        write: Writes the content into the stream that it is given, which can seek.
        backup: Keep the old file as `name.YYYYmmdd-HHMMSS.suffix`, by the time at which it was written.

    Returns:
        The path of the file that was written, links resolved.

    Raises:
        SaveError: The operating system refused a step; its error (with `errno`) is the `__cause__`. The old file is
            untouched.
    """
    try:
        target = Path(os.path.realpath(path))
        mode = _mode_of(target)
        temporary = target.with_name(f".qat_compat-{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            # Nobody may read what is to replace a private file; a new one is subject to the umask, as any is.
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            descriptor = os.open(temporary, flags, 0o666 if mode is None else mode & 0o666)
            with os.fdopen(descriptor, "w+b", buffering=_BUFFER) as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            if mode is not None:
                temporary.chmod(mode)
            if backup and mode is not None:
                _keep(target)
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
    except (OSError, ValueError) as error:
        raise SaveError(
            "the file could not be written",
            file=path,
            expected="a folder that exists, may be written to and has space",
            found=f"[errno {error.errno}] {error.strerror}" if isinstance(error, OSError) else error,
            remedy="free space or choose another place; what stood there before is unchanged",
        ) from error
    sync_folder(target.parent)
    return target


def _mode_of(target: Path) -> int | None:
    """Permission bits of the existing file, or None where there is none."""
    try:
        state = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(state.st_mode):
        raise SaveError(
            "the destination is not a regular file",
            file=target,
            expected="a file, or a name that is still free",
            found="a folder" if stat.S_ISDIR(state.st_mode) else "a pipe, device or socket",
            remedy="choose another name",
        )
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "Permission denied: the existing file is read-only", str(target))
    return stat.S_IMODE(state.st_mode)


def _keep(target: Path) -> None:
    """Give the old file a second name; it keeps its first one until the new file takes it over."""
    written = time.strftime("%Y%m%d-%H%M%S", time.localtime(target.stat().st_mtime))
    for number in range(1000):
        suffix = f"-{number}" if number else ""
        dated = target.with_name(f"{target.stem}.{written}{suffix}{target.suffix}")
        try:
            os.link(target, dated)
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            if dated.exists():
                continue
            shutil.copy2(target, dated)
        return
    raise FileExistsError(errno.EEXIST, "too many backups of the same second", str(target))


def sync_folder(folder: Path) -> None:
    """Bring the rename to the disk, on systems that can do that for a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            return
        raise SaveError(
            "the new file is in place, but its folder could not be brought to the disk",
            file=folder,
            expected="a disk without faults",
            found=f"[errno {error.errno}] {error.strerror}",
            remedy="check the disk; a power loss now may bring the old file back",
        ) from error
