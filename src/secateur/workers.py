"""A process that answers questions: what may crash, or must have its memory measured, runs there.

Questions and answers are JSON objects, one a line. The asking side is :class:`Worker`, the other
end is :func:`serve`. The process ends with the one that asks, even if that one is killed.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from secateur import errors
from secateur.errors import SecateurError, WorkerDied

#: Environment variable with the asking process's number.
ASKING = "SECATEUR_ASKING"
#: Seconds between two looks at whether that process is still there.
LOOK_EVERY = 0.2
#: Environment variables that say how many threads the libraries below torch have.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Worker:
    """A process that answers one line of JSON with another; as a context it ends with its block.

    Args:
        module: what to run; it calls :func:`serve`.
        what: what it does, for the message should it die.
        threads: of its libraries; None for as many as this process has.
        environment: variables for it where the user has set none of that name.
    """

    def __init__(
        self, module: str, what: str, threads: int | None = None, /, **environment: str
    ) -> None:
        self._what = what
        # Not a pipe, which would have to be read all the time.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            # Without the variable ggml calls a debugger when it aborts, which takes seconds.
            env={
                **environment,
                **os.environ,
                "GGML_NO_BACKTRACE": "1",
                **({} if threads is None else dict.fromkeys(THREADS, str(threads))),
                ASKING: str(os.getpid()),
            },
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._process.communicate()
        self._stderr.close()

    def close(self) -> None:
        """End the process, whatever it is doing; another thread may be waiting for its answer."""
        self._process.kill()
        self._process.wait()

    def ask(self, task: str, told: Callable[[Any], None] | None = None, **arguments: Any) -> Any:
        """The answer to one task.

        Args:
            told: called with what the process tells before it answers.

        Raises:
            SecateurError: the one that the process sent instead.
            WorkerDied: the process died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._answer()
            while "told" in answer:
                if told is not None:
                    told(answer["told"])
                answer = self._answer()
        except BrokenPipeError as error:
            raise WorkerDied(self._last_words()) from error
        if "error" in answer:
            raise getattr(errors, answer["kind"])(answer["error"])
        return answer["value"]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise BrokenPipeError
        return json.loads(line)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        # ggml says why it aborts; other libraries may speak after it.
        reasons = [line for line in lines if "GGML_ASSERT" in line or "GGML_ABORT" in line] or lines
        end = f"code {code}" if code >= 0 else signal.Signals(-code).name
        if -code == signal.SIGKILL:
            reasons = ["out of memory, or killed by somebody"]
        return f"{self._what} ended with {end}: {reasons[-1] if reasons else 'no output'}"


def serve(tasks: Mapping[str, Callable[..., Any]]) -> None:
    """The other end of :class:`Worker`: answer tasks by these functions until there are no more.

    A function that takes ``tell`` is given one, with which it can say things before it answers.
    """
    if asking := os.environ.get(ASKING):
        threading.Thread(target=_end_with, args=(int(asking),), daemon=True).start()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a library prints goes where it does no harm

        def say(what: Any) -> None:
            print(json.dumps(what), file=answers, flush=True)

        for line in iter(sys.stdin.readline, ""):
            asked = json.loads(line)
            task = tasks[asked.pop("task")]
            if "tell" in inspect.signature(task).parameters:
                asked["tell"] = lambda what: say({"told": what})
            try:
                answer = {"value": task(**asked)}
            except SecateurError as error:
                answer = {"error": str(error), "kind": type(error).__name__}
            say(answer)


def _end_with(asking: int) -> None:
    """End this process when the one that asks has ended: a killed one cannot do so itself."""
    while os.getppid() == asking:
        time.sleep(LOOK_EVERY)
    os._exit(1)
