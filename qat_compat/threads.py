"""Work for several threads: kernels and system calls that release Python's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["THREADS", "in_threads"]

THREADS = min(4, os.cpu_count() or 1)  # more gain nothing: memory is the limit


def in_threads(tasks: Iterable[Callable[[], object]], threads: int = THREADS) -> None:
    """Run tasks in their order, several at a time; the first error stops those that have not begun and is raised.

    Whatever happens, an interrupt included, no task is running any more on return.

    Example:
        >>> found = []
        >>> in_threads([lambda: found.append(1), lambda: found.append(2)])
        >>> sorted(found)
        [1, 2]
    """
    queue = iter(tasks)
    if threads < 2:
        for task in queue:
            task()
        return
    stop = threading.Event()
    lock = threading.Lock()

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    task = next(queue, None)
                if task is None:
                    return
                task()
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in [pool.submit(work) for _ in range(threads)]:
                done.result()
        except BaseException:
            stop.set()
            raise
