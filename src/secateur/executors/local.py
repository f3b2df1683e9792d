"""Workers as processes of this machine."""

from __future__ import annotations

from secateur.executors.base import Asked, Executor, shared_out
from secateur.workers import Worker


class Local(Executor):
    """Processes here, which share out the threads of this one.

    Args:
        workers: how many at a time.
        threads: that torch has in this process.
    """

    def __init__(self, workers: int, threads: int) -> None:
        super().__init__()
        self.workers = workers
        self.threads = shared_out(threads, workers)

    def _start(self, module: str, what: str) -> Asked:
        return Worker(module, what, self.threads)
