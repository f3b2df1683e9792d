"""What a place to work at offers, and the choice of one by what the user typed."""

from __future__ import annotations

import math
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from secateur.errors import RecipeError

#: Workers of a Ray that is started here, where the user names no number.
WORKERS_OF_A_LOCAL_RAY = 2


class Asked(Protocol):
    """A worker: answers one task after the other, until it is closed."""

    def ask(self, task: str, told: Callable[[Any], None] | None = None, **arguments: Any) -> Any:
        """The answer to one task, see :meth:`secateur.workers.Worker.ask`.

        Raises:
            SecateurError: the one that the worker sent instead.
            WorkerDied: there is no worker any more.
        """

    def close(self) -> None:
        """End the worker, whatever it is doing."""


class Executor(ABC):
    """Starts workers, and ends all of them when it is closed; a context closes itself.

    Attributes:
        workers: how many work at a time.
        threads: threads of torch that each of them has. With another number, sums of floats may
            come out otherwise, so that a run has one number of threads in all of its processes.
        machines: how many machines the workers are spread over.
    """

    workers: int
    threads: int
    machines: int = 1

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Asked] = []
        self._closed = False

    @abstractmethod
    def _start(self, module: str, what: str) -> Asked:
        """A new worker."""

    def worker(self, module: str, what: str) -> Asked:
        """A new worker that runs ``module``, which calls :func:`secateur.workers.serve`.

        Args:
            what: what it does, for the message should it die.
        """
        started = self._start(module, what)
        with self._lock:
            if not self._closed:
                self._open.append(started)
                return started
        started.close()
        raise RuntimeError("this executor is closed")

    @contextmanager
    def working(self, module: str, what: str) -> Iterator[Asked]:
        """A worker for as long as the context lasts."""
        worker = self.worker(module, what)
        try:
            yield worker
        finally:
            self.end(worker)

    def end(self, worker: Asked) -> None:
        """End one worker."""
        with self._lock:
            if worker in self._open:
                self._open.remove(worker)
        worker.close()

    def close(self) -> None:
        """End all workers at once; whoever waits for an answer gets ``WorkerDied``."""
        with self._lock:
            self._closed = True
            workers, self._open = self._open, []
        for worker in workers:
            worker.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def on_one_machine(self) -> int:
        """Workers that one machine must have memory for."""
        return math.ceil(self.workers / self.machines)


def spreads(workers: int | None, cluster: str | None) -> bool:
    """Whether the options ask for more than one process.

    Args:
        workers: processes at a time; None for what the place suggests.
        cluster: ``ray``, or ``ray://HOST:PORT`` for one that runs; None for this machine.

    Raises:
        RecipeError: they cannot be meant so.
    """
    if workers is not None and workers < 1:
        raise RecipeError(f"--workers is {workers}: allowed are numbers from 1 on")
    if cluster is not None and not re.fullmatch(r"ray(://[^/\s:]+:\d+)?", cluster):
        raise RecipeError(
            f"--cluster is {cluster!r}: allowed are ray, and ray://HOST:PORT for one that runs"
        )
    return cluster is not None or (workers or 1) > 1


@contextmanager
def opened_executor(workers: int | None, cluster: str | None) -> Iterator[Executor | None]:
    """The place that the options of :func:`spreads` name; None where nothing is to be spread.

    While it is open, torch has as many threads in this process as it has in the workers.

    Raises:
        RecipeError: the options cannot be meant so, or Ray is not installed.
        OutputError: Ray does not start, or cannot be reached.
    """
    if not spreads(workers, cluster):
        yield None
        return
    import torch

    before = torch.get_num_threads()
    with _executor(workers, cluster, before) as executor:
        torch.set_num_threads(executor.threads)
        try:
            yield executor
        finally:
            torch.set_num_threads(before)


def _executor(workers: int | None, cluster: str | None, threads: int) -> Executor:
    if cluster is None:
        from secateur.executors.local import Local

        return Local(workers or 1, threads)
    from secateur.executors.on_ray import OnRay

    return OnRay(workers, threads, address=None if cluster == "ray" else cluster)


def shared_out(threads: int, workers: int) -> int:
    """Threads of each of so many workers."""
    return max(1, threads // workers)
