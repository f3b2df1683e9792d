"""Workers as actors of a Ray: on the nodes of a cluster, or on one that is started here.

Ray places the workers, knows their nodes and notices when one is lost. Each actor holds a process
of ours (:class:`secateur.workers.Worker`), so that a worker is the same thing wherever it runs: its
threads and its memory are its own, and it ends with its actor. Nothing large goes through Ray: what
a worker reads and writes are files that all nodes must see.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from secateur import errors
from secateur.errors import OutputError, RecipeError, SecateurError, WorkerDied
from secateur.executors.base import WORKERS_OF_A_LOCAL_RAY, Asked, Executor, shared_out
from secateur.workers import Worker

#: Where a Ray that is started here has its sockets, whose paths Unix wants below 108 characters.
SHORT = "/tmp"
#: Bytes of Ray's own store of objects, the least that it takes: ours go through files.
STORE = 80 * 2**20
#: Starts of a Ray before it is given up: it gives its own processes 15 seconds, and a machine that
#: is at work on something else may need longer.
STARTS = 3
#: Seconds between two looks at what a worker tells before it answers.
NEWS_EVERY = 0.5


class OnRay(Executor):
    """Actors of a Ray.

    Args:
        workers: how many at a time; None for one on each node of a cluster that is joined.
        threads: that torch has in this process.
        address: of the Ray to join; None for the one that ``RAY_ADDRESS`` names or that this
            process has joined already, or else for one that is started here and ends with us.

    Raises:
        RecipeError: the package is not installed.
        OutputError: Ray does not start, or cannot be reached.
    """

    def __init__(self, workers: int | None, threads: int, address: str | None = None) -> None:
        super().__init__()
        # Reports to Ray's makers that nobody here has asked for.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise RecipeError(
                "--cluster ray needs the package ray: pip install 'secateur[cluster]'"
            ) from error
        self._ray: Any = ray
        self._ours = False
        self._folder: Path | None = None
        address = address or os.environ.get("RAY_ADDRESS")
        if address is None and not ray.is_initialized():
            self.workers = workers or WORKERS_OF_A_LOCAL_RAY
            self.threads = shared_out(threads, self.workers)
            self._start_here()
        else:
            if not ray.is_initialized():
                self._join(address)
            nodes = [node for node in self._ray.nodes() if node["Alive"]]
            self.machines = max(1, len(nodes))
            self.workers = workers or self.machines
            cores = int(self._ray.cluster_resources().get("CPU", 1))
            if self.workers > cores:
                self.close()
                raise RecipeError(
                    f"--workers {self.workers} are more than the {cores} CPUs of this Ray: use "
                    f"--workers {cores}"
                )
            self.threads = min(threads, shared_out(cores, self.workers))
        self._actor = ray.remote(_Held)

    def _start_here(self) -> None:
        place = SHORT if Path(SHORT).is_dir() else tempfile.gettempdir()
        for attempt in range(STARTS):
            self._folder = Path(tempfile.mkdtemp(prefix="secateur-ray-", dir=place))
            try:
                self._ray.init(
                    num_cpus=self.workers * self.threads,
                    num_gpus=0,
                    object_store_memory=STORE,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="CRITICAL",
                    _temp_dir=str(self._folder),
                )
            except Exception as error:  # of no kind of its own
                self._ray.shutdown()
                _end_all(self._folder)
                shutil.rmtree(self._folder, ignore_errors=True)
                if attempt == STARTS - 1:
                    raise OutputError(
                        f"Ray does not start on this machine: {_first_line(error)} Try again when "
                        "less goes on here, or use --workers without --cluster"
                    ) from error
            else:
                self._ours = True
                return

    def _join(self, address: str | None) -> None:
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
        except Exception as error:  # ConnectionError, and others by the kind of address
            raise OutputError(
                f"no Ray answers at {address}: {_first_line(error)} Start one there with ray start "
                "--head, or leave the address out"
            ) from error
        self._ours = True

    def _start(self, module: str, what: str) -> Asked:
        actor = self._actor.options(
            num_cpus=self.threads, scheduling_strategy="SPREAD", max_concurrency=2, max_restarts=0
        ).remote(module, what, self.threads)
        return _Remote(self._ray, actor, what)

    def close(self) -> None:
        super().close()
        if self._ours:
            self._ray.shutdown()
            self._ours = False
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Held:
    """The actor: a process of ours on a node of Ray's."""

    def __init__(self, module: str, what: str, threads: int) -> None:
        self._worker = Worker(module, what, threads)
        self._news: list[Any] = []
        self._lock = threading.Lock()

    def ask(self, task: str, arguments: dict[str, Any], listens: bool) -> dict[str, Any]:
        """The answer, or the error, as values: Ray's errors stay those of Ray."""
        try:
            told = self._tell if listens else None
            return {"value": self._worker.ask(task, told=told, **arguments)}
        except SecateurError as error:
            return {"error": str(error), "kind": type(error).__name__}

    def _tell(self, what: Any) -> None:
        with self._lock:
            self._news.append(what)

    def news(self) -> list[Any]:
        """What the process has told since this was last asked."""
        with self._lock:
            found, self._news = self._news, []
        return found


class _Remote:
    """A worker that an actor holds."""

    def __init__(self, ray: Any, actor: Any, what: str) -> None:
        self._ray = ray
        self._actor = actor
        self._what = what

    def ask(self, task: str, told: Callable[[Any], None] | None = None, **arguments: Any) -> Any:
        try:
            answer = self._actor.ask.remote(task, arguments, told is not None)
            if told is not None:
                while not self._ray.wait([answer], timeout=NEWS_EVERY)[0]:
                    self._hear(told)
            found = self._ray.get(answer)
            if told is not None:
                self._hear(told)
        except self._ray.exceptions.RayError as error:
            raise WorkerDied(
                f"{self._what} was lost with its node: {_first_line(error)}"
            ) from error
        if "error" in found:
            raise getattr(errors, found["kind"])(found["error"])
        return found["value"]

    def _hear(self, told: Callable[[Any], None]) -> None:
        for what in self._ray.get(self._actor.news.remote()):
            told(what)

    def close(self) -> None:
        with suppress(Exception):  # it may be gone, and Ray with it
            self._ray.kill(self._actor, no_restart=True)


def _end_all(folder: Path) -> None:
    """End what a start that failed has left: Ray itself does so only when this process ends."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()):
                process.kill()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()
