"""One file per suite; each has the same four functions.

prepare(folder, tiny) -> the arguments of every case; writes the files that the cases read
one(*arguments)       -> the figures of one case, in a process of its own
rows(taken)           -> rows for the JSON
table(rows)           -> lines of Markdown
"""

from __future__ import annotations

from types import ModuleType

from benchmarks.suites import calibration, conversion, load, media, memory, planning, qparams, ranges

__all__ = ["SUITES"]

SUITES: dict[str, ModuleType] = {
    "load": load,
    "media": media,
    "ranges": ranges,
    "load+ranges": qparams,
    "planning": planning,
    "memory": memory,
    "conversion": conversion,
    "calibration": calibration,
}
