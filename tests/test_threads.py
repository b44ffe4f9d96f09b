"""Tasks in several threads: all of them, in turn, none left running, whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from qat_compat import threads
from qat_compat.threads import _openmp, in_threads


@pytest.fixture(autouse=True)
def several(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four threads, on whatever machine."""
    monkeypatch.setattr(threads, "THREADS", 4)
    threads._helpers.cache_clear()
    yield
    threads._helpers.cache_clear()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_task_runs_once_and_is_begun_in_order(count: int) -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def numbered() -> Iterator[Callable[[], None]]:
        for number in range(500):
            begun.append(number)
            yield partial(done, number)

    found: list[int] = []

    def done(number: int) -> None:
        with lock:
            found.append(number)

    in_threads(numbered(), count)
    assert begun == list(range(500))
    assert sorted(found) == list(range(500))


def test_tasks_run_at_the_same_time() -> None:
    meeting = threading.Barrier(4, timeout=20)
    in_threads([meeting.wait] * 4, 4)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("by", ["the caller", "a helper"])
def test_the_first_error_is_raised_when_nothing_runs_any_more(error: type[BaseException], by: str) -> None:
    caller = threading.current_thread()
    meeting = threading.Barrier(4, timeout=20)
    running: set[int] = set()
    once = threading.Lock()

    def task() -> None:
        running.add(threading.get_ident())
        meeting.wait()
        mine = threading.current_thread() is caller
        if mine == (by == "the caller") and once.acquire(blocking=False):
            running.discard(threading.get_ident())
            raise error("this one")
        time.sleep(0.05)
        running.discard(threading.get_ident())

    later: list[int] = []
    with pytest.raises(error, match="this one"):
        in_threads([*[task] * 4, *[lambda: later.append(1)] * 1000], 4)
    assert not running
    assert len(later) < 1000


def test_an_error_of_the_tasks_source_ends_it() -> None:
    def tasks() -> Iterator[Callable[[], object]]:
        yield int
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        in_threads(tasks(), 4)


def test_callers_in_several_threads_do_not_wait_for_one_another() -> None:
    """All helpers are busy with the first; the second does its work itself."""
    leave, inside = threading.Event(), threading.Barrier(5, timeout=20)

    def held() -> None:
        inside.wait()
        leave.wait(20)

    first = threading.Thread(target=in_threads, args=([held] * 4, 4))
    first.start()
    inside.wait()
    found: list[int] = []
    in_threads([partial(found.append, number) for number in range(10)], 4)
    assert found == list(range(10))
    leave.set()
    first.join(20)
    assert not first.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("where", ["after a fork", "at exit"])
def test_there_are_threads_where_there_were_none(where: str) -> None:
    program = {
        "after a fork": """
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                run()
                os._exit(0)
            sys.exit(os.waitpid(child, 0)[1])
        """,
        "at exit": "atexit.register(run)",
    }[where]
    lines = [
        "import atexit, os, signal, sys",
        "from qat_compat.threads import in_threads",
        "def run():",
        "    found = []",
        "    in_threads([lambda: found.append(1)] * 9, 4)",
        "    print(len(found), flush=True)",
        "run()",
        *(line[12:] for line in ("            " + program.strip()).splitlines()),
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["9", "9"]), done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a thread cannot choose its processors here")
def test_a_helper_leaves_the_processor_of_the_caller_and_may_come_back() -> None:
    """Where the scheduler puts both on one: a load is over before it looks again."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("there is one processor")
    seen: list[tuple[int, set[int]]] = []

    def together() -> None:
        here = threads._processor()
        threads._leave(here)
        seen.append((threads._processor() - here, os.sched_getaffinity(0)))

    thread = threading.Thread(target=together)
    thread.start()
    thread.join()
    ((moved, afterwards),) = seen
    assert moved != 0
    assert afterwards == allowed == os.sched_getaffinity(0)
    threads._leave(-1)  # where it cannot be told, nothing is done


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a thread cannot choose its processors here")
def test_with_one_processor_there_is_nowhere_to_go() -> None:
    def alone() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        threads._leave(threads._processor())
        seen.append(os.sched_getaffinity(0))

    seen: list[set[int]] = []
    thread = threading.Thread(target=alone)
    thread.start()
    thread.join()
    assert len(seen[0]) == 1


def test_kernels_are_not_divided_again_in_the_threads_and_are_afterwards() -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        in_threads([lambda: seen.append(torch.get_num_threads()) for _ in range(8)], threads=2)
        assert torch.get_num_threads() == 3
        if _openmp() is not None:
            assert set(seen) == {1}
        in_threads([lambda: seen.append(torch.get_num_threads())], threads=1)
        assert seen[-1] == 3  # alone, a kernel may take what it likes

        def fails() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            in_threads([fails] * 4, threads=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
