"""Signs of life: stage, block, elapsed, remaining, memory. Plain lines when not on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TextIO

#: Without a terminal, a stage says something at most this often, in seconds.
PLAIN_INTERVAL = 10.0
#: Bytes of a tensor that has pages of its own where blocks are large: a new page costs about as
#: much as a pass over it, which products of matrices of this size do not notice.
LARGE_TENSOR = 2**22


def process_memory() -> int:
    """Resident memory of this process less the pages of mapped files, in bytes."""
    import psutil

    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def give_back_memory() -> None:
    """Ask the C library to return freed memory to the system, where it can.

    Blocks come and go between activations that stay, which leaves holes that grow with depth:
    at 32 blocks of 50 MB the process held 0.6 GB that nobody used.
    """
    import ctypes

    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def map_large_tensors() -> None:
    """Ask the C library to take memory of large tensors from the system, and to give it back there.

    By itself it learns from the tensors that are freed to put those of up to 32 MiB on its heap,
    where what is freed stays in holes until :func:`give_back_memory`. It cannot be asked to learn
    again, so this is for processes that work on large blocks.
    """
    import ctypes

    m_mmap_threshold = -3  # of malloc.h
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(m_mmap_threshold, LARGE_TENSOR)


@dataclass
class PeakMemory:
    """Samples :func:`process_memory` in a thread; ``peak`` is the largest value seen, in bytes."""

    interval: float = 0.02
    peak: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> PeakMemory:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, process_memory())
            self._stop.wait(self.interval)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, process_memory())


class Progress:
    """Shows long work. The base class shows nothing, which is what a library call wants.

    Attributes:
        seconds: time spent in each stage.
        memory: tells how many bytes the process at work takes; this one, unless another does it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.memory: Callable[[], int] = process_memory
        self._stage = ""
        self._total = 0
        self._done = 0
        self._began = time.monotonic()

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of ``total`` steps."""
        self.finish()
        self._stage, self._total, self._done = name, total, 0
        self._began = time.monotonic()
        self._show("")

    def step(self, detail: str = "", steps: int = 1) -> None:
        """One step of the stage is done, or as many as a long one is worth."""
        self._done += steps
        self._show(detail)

    def finish(self) -> None:
        """The last stage is done."""
        if self._stage:
            spent = time.monotonic() - self._began
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + spent
            self._show("", last=True)
            self._stage = ""

    def note(self, text: str) -> None:
        """A line that stays."""

    def _show(self, detail: str, last: bool = False) -> None:
        pass

    def _line(self, detail: str) -> str:
        spent = time.monotonic() - self._began
        parts = [f"{self._stage} {self._done}/{self._total}", f"{spent:.0f} s"]
        if 0 < self._done < self._total:
            parts.append(f"{spent / self._done * (self._total - self._done):.0f} s left")
        parts.append(f"{self.memory() / 2**20:.0f} MiB")
        if detail:
            parts.append(detail)
        return "  ".join(parts)


class PlainProgress(Progress):
    """Lines of text, for logs."""

    def __init__(self, file: TextIO | None = None, interval: float = PLAIN_INTERVAL) -> None:
        super().__init__()
        self._file = file or sys.stderr
        self._interval = interval
        self._last = 0.0

    def note(self, text: str) -> None:
        print(text, file=self._file, flush=True)

    def _show(self, detail: str, last: bool = False) -> None:
        now = time.monotonic()
        complete = self._done == self._total  # said once, when the stage ends
        if last or (now - self._last >= self._interval and not complete):
            self._last = now
            print(self._line(detail), file=self._file, flush=True)


class LiveProgress(Progress):
    """One line of a terminal that is written over and over."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.status import Status

        self._console = Console(stderr=True)
        self._make: Callable[[], Status] = lambda: Status("", console=self._console)
        self._status: Status | None = None

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def _show(self, detail: str, last: bool = False) -> None:
        from rich.text import Text

        if self._status is None:
            self._status = self._make()
            self._status.start()
        self._status.update(Text(self._line(detail)))
        if last:
            self._status.stop()
            self._status = None
            self.note(self._line(detail))


def for_terminal() -> Progress:
    """A live line on a terminal, plain lines elsewhere."""
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()


def quiet() -> None:
    """Silence transformers: its notes and bars would be mixed with ours."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
