"""A folder that stands at its place complete, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qat_compat.errors import SaveError
from qat_compat.storage.atomic import sync_folder

__all__ = ["new_folder"]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into; when the block ends well, it takes that name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with new_folder(Path(place) / "made") as folder:
        ...         _ = (folder / "config.json").write_text("{}")
        ...     sorted(path.name for path in Path(place).rglob("*"))
        ['config.json', 'made']

    Raises:
        SaveError: There is something at `path` already, or the operating system refused.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - `.` has no name, and a link stays one
    temporary = path.with_name(f".qat_compat-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise SaveError(
                "the destination is taken",
                file=path,
                expected="the name of a new folder, or of an empty one",
                found="a folder with files" if path.is_dir() else "a file",
                remedy="choose another name, or remove what is there",
            )
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        sync_folder(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except SaveError as error:
        if error.file is not None:  # of a file in it, whose place will be gone when this is read
            error.file = error.file.replace(str(temporary), str(path), 1)
        raise
    except (OSError, ValueError) as error:
        raise SaveError(
            "the folder could not be written",
            file=path,
            expected="a folder above it that exists, may be written to and has space",
            found=f"[errno {error.errno}] {error.strerror}" if isinstance(error, OSError) else error,
            remedy="free space or choose another place",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone by now, unless something failed
