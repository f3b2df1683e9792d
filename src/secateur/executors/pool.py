"""Jobs that are handed in one after the other and done by several threads of this process.

The threads only ask workers and wait for answers. What comes of a job is taken in by whoever owns
the pool, in its own thread, so that a journal or a display has one writer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

#: Seconds after which a waiting owner looks up, so that Ctrl-C is heard on every system.
LOOK_EVERY = 0.2


class Pool(Generic[Job, Result]):
    """As a context it ends without waiting for jobs that are still at work.

    Args:
        workers: jobs that are done at a time.
        do: does one; called in a thread of the pool.
        end: called once at the end, to wake threads that wait for a worker.
        idle: called in the owner's thread now and then while it waits, to show signs of life.
    """

    def __init__(
        self,
        workers: int,
        do: Callable[[Job], Result],
        *,
        end: Callable[[], None] = lambda: None,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        self._do = do
        self._end = end
        self._idle = idle
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._done: queue.Queue[tuple[Job, Result | None, BaseException | None]] = queue.Queue()
        self._ended = False
        self._given = 0
        self._taken = 0
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for each in self._threads:
            each.start()

    def __enter__(self) -> Pool[Job, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for _thread in self._threads:
            self._jobs.put(None)
        self._end()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._ended:
            try:
                self._done.put((job, self._do(job), None))
            except BaseException as error:  # the owner raises it
                self._done.put((job, None, error))

    def give(self, job: Job) -> None:
        """One more job; they are begun in this order."""
        self._given += 1
        self._jobs.put(job)

    def ready(self) -> Iterator[tuple[Job, Result]]:
        """What is finished by now; raises what a job has raised."""
        while not self._done.empty():
            yield self._take()

    def rest(self) -> Iterator[tuple[Job, Result]]:
        """Everything that was given, as it is finished; raises what a job has raised."""
        while self._taken < self._given:
            yield self._take()

    def _take(self) -> tuple[Job, Result]:
        while True:
            try:
                job, result, error = self._done.get(timeout=LOOK_EVERY)
            except queue.Empty:
                self._idle()
                continue
            self._taken += 1
            if error is not None:
                raise error
            return job, result  # type: ignore[return-value]
