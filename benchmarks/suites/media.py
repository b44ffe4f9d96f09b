"""The same load from where files lie: a disk whose pages are not in memory, and a file system that is memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, summary, timed, touch_memory
from benchmarks.models import build, same_values, write_files
from benchmarks.ways import WAYS, available

__all__ = ["one", "prepare", "resident", "rows", "table"]

_MEMORY = Path("/dev/shm")
_WAYS = ("load_file + load_state_dict", "qat_compat", "qat_compat inplace")


def prepare(folder: Path, tiny: bool) -> list[tuple[str, ...]]:
    name = "tiny" if tiny else "llama-4-layers-bf16"
    for each in {"tiny", name}:
        write_files(each, folder)
    media = ["cold"] + (["tmpfs"] if _MEMORY.is_dir() else [])
    return [(name, medium, how, str(folder)) for medium in media for how in available(_WAYS)]


def one(name: str, medium: str, how: str, folder: str) -> Figures:
    way = WAYS[how]
    path = Path(folder, f"{name}.{way.container}")
    copy = _MEMORY / f"qat_compat-{os.getpid()}-{path.name}"
    way.load(way.model("tiny"), Path(folder, f"tiny.{way.container}"))  # what is imported late is there
    model = way.model(name)
    try:
        if medium == "tmpfs":
            path = Path(shutil.copy(path, copy))
        else:
            _forget(path)
        touch_memory(path.stat().st_size * 5 // 4)
        before = resident(path)
        figures = timed(lambda: way.load(model, path))
    finally:
        copy.unlink(missing_ok=True)
    same_values(model, build(name))
    return {**figures, "bytes": Path(folder, f"{name}.{way.container}").stat().st_size, "resident": before}


def _forget(path: Path) -> None:
    """Have the system drop a file's pages, which it does once they are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def resident(path: Path) -> float:
    """The share of a file's pages that are in memory, as `mincore(2)` tells."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as view:
        start = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), found
        )
        del start
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in found) / pages


def rows(taken: Mapping[tuple[str, ...], Sequence[Figures]]) -> list[dict[str, Any]]:
    medians = {case: statistics.median(one["seconds"] for one in figures) for case, figures in taken.items()}
    return [
        summary(
            figures,
            suite="media",
            model=name,
            medium=medium,
            how=how,
            bytes=int(figures[0]["bytes"]),
            resident=max(one["resident"] for one in figures),
            gb_per_s=figures[0]["bytes"] / medians[name, medium, how, folder] / 1e9,
            baseline=_WAYS[0],
            speedup=medians[name, medium, _WAYS[0], folder] / medians[name, medium, how, folder],
        )
        for (name, medium, how, folder), figures in taken.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"| where {rows[0]['model']} lies | in memory before | how | ms | GB/s | against the first |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        mark = " (noisy)" if row["noisy"] else ""
        lines.append(
            f"| {row['medium']} | {row['resident']:.0%} | {row['how']}{mark} | {row['median_s'] * 1e3:.1f} "
            f"| {row['gb_per_s']:.3g} | {row['speedup']:.2f}x |"
        )
    return lines
