"""Where shards run: in threads of the run's process, or in processes of their own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from types import TracebackType
from typing import Final, Protocol, Self

from embedd_dagster.engine.shards.job import ShardJob, ShardResources, ShardResult, load_shard, load_with

_DRAIN_SECONDS: Final = 0.05


class ShardPool(Protocol):
    """Loads shards at the same time. Used by one thread; a context manager that waits for running shards at its end."""

    def submit(self, job: ShardJob) -> Future[ShardResult]:
        """Begins to load a shard."""
        ...

    def poll(self) -> None:
        """Shows in the run's log and progress what the shards have reported. Called about once per second."""
        ...

    def stop(self) -> None:
        """Asks the running shards to end; does not wait for them."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class ThreadShardPool:
    """Shards in threads that share the run's open resources. They report directly and stop by the run's lease."""

    def __init__(self, shared: ShardResources, shard_count: int) -> None:
        self._shared = shared
        self._batches_in_flight = 2 * shared.pipeline.concurrency // shard_count
        self._threads = ThreadPoolExecutor(shard_count, thread_name_prefix="shard")

    def submit(self, job: ShardJob) -> Future[ShardResult]:
        """Begins to load a shard."""
        return self._threads.submit(self._load, job)

    def _load(self, job: ShardJob) -> ShardResult:
        return ShardResult(job.ordinal, load_with(self._shared, job, batches_in_flight=self._batches_in_flight))

    def poll(self) -> None:
        """Does nothing: threads report directly."""

    def stop(self) -> None:
        """Does nothing: the run's lease stops the threads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True)


@dataclass(frozen=True, slots=True)
class _Channel:
    """What a process of the pool shares with the run."""

    stop: Event
    lines: SimpleQueue[str]


class ProcessShardPool:
    """Shards in processes of their own, which use several CPU cores.

    A process reads its settings from the environment and opens its own connections. Text reuse is per process.
    """

    def __init__(self, shard_count: int, *, log: Callable[[str], None], show_progress: Callable[[], None]) -> None:
        """`show_progress` reads from the catalog's checkpoints how far the shards are."""
        processes = get_context("spawn")
        self._channel = _Channel(processes.Event(), processes.SimpleQueue())
        self._log = log
        self._show_progress = show_progress
        self._executor = ProcessPoolExecutor(
            shard_count, mp_context=processes, initializer=_begin_process, initargs=(self._channel,)
        )

    def submit(self, job: ShardJob) -> Future[ShardResult]:
        """Begins to load a shard."""
        return self._executor.submit(_load_in_process, job)

    def poll(self) -> None:
        """Shows in the run's log and progress what the processes have reported."""
        self._drain()
        self._show_progress()

    def _drain(self) -> None:
        while not self._channel.lines.empty():
            self._log(self._channel.lines.get())

    def stop(self) -> None:
        """Asks the running shards to end; does not wait for them."""
        self._channel.stop.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # a process that ends may still log, and would wait for ever if nobody read a full pipe
        ending = threading.Thread(target=self._executor.shutdown, name="shard pool")
        ending.start()
        while ending.is_alive():
            self._drain()
            ending.join(_DRAIN_SECONDS)
        self._drain()


_channel: _Channel | None = None
"""In a process of the pool: what it shares with the run."""


def _begin_process(channel: _Channel) -> None:
    global _channel
    _channel = channel
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the run's process dies: otherwise it would wait for its next shard for ever."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _load_in_process(job: ShardJob) -> ShardResult:
    assert _channel is not None  # noqa: S101 - the pool's initializer has set it
    return load_shard(job, should_stop=_channel.stop.is_set, log=_channel.lines.put)
