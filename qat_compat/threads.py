"""Work for several threads: kernels and system calls that release Python's lock."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache

import torch

__all__ = ["THREADS", "in_threads"]

THREADS = min(4, os.cpu_count() or 1)  # more gain nothing: memory is the limit


@cache
def _helpers() -> ThreadPoolExecutor:
    """Threads that are there from their first use on: starting some costs more than looking at a few MiB."""
    return ThreadPoolExecutor(max(1, THREADS - 1), thread_name_prefix="qat_compat")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # a child has only the thread that forked


def _getcpu() -> Callable[[], int] | None:
    """The C library's `sched_getcpu`, where there is one and a thread can choose its processors (Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    found: Callable[[], int] | None = getattr(ctypes.CDLL(None), "sched_getcpu", None)
    return found


_processor = _getcpu() or (lambda: -1)


def _leave(processor: int) -> None:
    """Have the calling thread run on another processor than that one, if it may.

    A scheduler can leave a thread for a tenth of a second where it was made, beside the one that made it, while another
    processor has nothing to do: that of Linux does in some virtual machines. A load is over by then.
    """
    if processor < 0 or _processor() != processor:
        return
    allowed = os.sched_getaffinity(0)
    if others := allowed - {processor}:
        with suppress(OSError):
            os.sched_setaffinity(0, others)  # moves it
            os.sched_setaffinity(0, allowed)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch divides its kernels with, where that can be told how many threads to take."""
    if os.name != "posix" or not hasattr(library := ctypes.CDLL(None), "omp_set_num_threads"):
        return None
    before = torch.get_num_threads()
    library.omp_set_num_threads(before + 1)  # of the calling thread alone, and of one library if there are several
    is_torchs = torch.get_num_threads() == before + 1
    library.omp_set_num_threads(before)
    return library if is_torchs else None


@contextmanager
def _undivided() -> Iterator[None]:
    """Kernels of torch that this thread calls are not divided among threads of their own: the work is divided already.

    Two threads that each start two more on two processors take twice the time of two.
    """
    library, before = _openmp(), torch.get_num_threads()
    if library is None:
        yield
        return
    try:
        library.omp_set_num_threads(1)
        yield
    finally:
        library.omp_set_num_threads(before)


def in_threads(tasks: Iterable[Callable[[], object]], threads: int = THREADS) -> None:
    """Run tasks in their order, several at a time; the first error stops those that have not begun and is raised.

    The calling thread is one of them. Whatever happens, an interrupt included, no task is running any more on return.
    A task must not call this function.

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
    callers = _processor()

    def work(helps: bool = True) -> None:
        nonlocal callers
        try:
            with _undivided():
                while not stop.is_set():
                    with lock:
                        task = next(queue, None)
                    if task is None:
                        return
                    if helps:
                        _leave(callers)
                    else:
                        callers = _processor()
                    task()
        except BaseException:
            stop.set()
            raise

    helping: list[Future[None]] = []
    try:
        with suppress(RuntimeError):  # the interpreter is shutting down: there is the calling thread
            for _ in range(threads - 1):
                helping.append(_helpers().submit(work))
        work(helps=False)
        for helper in helping:
            if not helper.cancel():  # one that has not begun, behind the work of another caller, is not waited for
                helper.result()
    finally:
        stop.set()
        wait([helper for helper in helping if not helper.cancel()])
