"""The process that runs llama.cpp: it answers the tasks of :mod:`secateur.outputs.llama_cpp`."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from secateur.errors import OutputError
from secateur.outputs.llama_cpp import TOKENS_PER_CALL, fixed_tokens
from secateur.workers import serve

F32 = 0  # ggml_type
WARNING, ERROR, CONTINUED = 3, 4, 5  # ggml_log_level


class _Log:
    """llama.cpp's warnings and errors. They come in pieces, of which a newline ends the last."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        self._level = 0
        self._pieces = ""

    def __call__(self, level: int, piece: str) -> None:
        if level == CONTINUED:
            level = self._level
        if level != self._level:
            self._end_line()
        self._level = level
        if level in (WARNING, ERROR):
            os.write(2, piece.encode())  # not to be lost if the process aborts
            self._pieces += piece
            if piece.endswith("\n"):
                self._end_line()

    def _end_line(self) -> None:
        # Names of functions, and what the message says again, tell a user nothing.
        text = " ".join(self._pieces.split())
        text = re.sub(r"^(\w+: |error loading model: |failed to quantize: )+", "", text)
        if text:
            self.lines.append((self._level, text))
        self._pieces = ""

    def take(self, level: int) -> list[str]:
        """The lines of one level since the last call."""
        self._end_line()
        taken = [text for at, text in self.lines if at == level]
        self.lines = [line for line in self.lines if line[0] != level]
        return taken


_log = _Log()


@lru_cache(maxsize=1)
def _library() -> Any:
    """cyllama's low-level module."""
    from importlib import import_module

    library = import_module("cyllama.llama.llama_cpp")
    library.set_log_callback(_log)
    library.llama_backend_init()
    library.ggml_backend_load_all()
    return library


def _run(file: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call into llama.cpp; a refusal is told by the first error that it logged.

    Raises:
        OutputError: it refuses.
    """
    _log.take(ERROR)  # whatever was said before did not end anything
    try:
        return function(*arguments)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        # cyllama's own text only lists what it might have been.
        reason = next(iter(_log.take(ERROR)), None) or str(error)
        if "no tensor type fallback" in reason:  # names the type, the warning before it the tensor
            reason = "; ".join([*_log.take(WARNING)[-1:], reason])
        raise OutputError(f"llama.cpp refuses {file}: {reason}") from error


def _open_model(file: str, **settings: Any) -> Any:
    library = _library()
    kind = library.LlamaModel
    if not hasattr(kind, "n_vocab"):  # 0.2.18 reads it when it hands out logits, but has it not
        kind = type("Model", (kind,), {"n_vocab": property(lambda self: self.get_vocab().n_vocab)})
    params = library.LlamaModelParams()
    params.n_gpu_layers = 0
    for name, value in settings.items():
        setattr(params, name, value)
    return _run(file, kind, file, params)


class _Model:
    """A file that is open, with room for ``length`` tokens."""

    def __init__(
        self,
        file: str,
        length: int,
        *,
        at_once: int = TOKENS_PER_CALL,
        threads: int | None = None,
        exact: bool = False,
        mapped: bool = True,
    ) -> None:
        library = _library()
        self.file = file
        # The extra buffers hold weights that are rearranged for this processor's own instructions.
        self.model = _open_model(file, use_mmap=mapped, use_extra_bufts=not exact)
        self.vocabulary = int(self.model.n_vocab)
        params = library.LlamaContextParams()
        params.n_ctx = max(length, 1)
        params.n_batch = min(at_once, params.n_ctx)
        params.n_ubatch = min(params.n_batch, 512)
        params.n_threads = params.n_threads_batch = threads or _cores()
        params.offload_kqv = params.op_offload = False
        if exact:
            params.type_k = params.type_v = F32
            params.flash_attn_type = 0
        self.context = _run(file, library.LlamaContext, self.model, params)
        self.at_once = params.n_batch
        self.batch = library.LlamaBatch(n_tokens=self.at_once, embd=0, n_seq_max=1)

    def clear(self) -> None:
        """Forget all tokens."""
        self.context.kv_cache_clear()

    def put(self, tokens: Sequence[int], start: int, *, all_logits: bool = False) -> None:
        """Run ``tokens`` from position ``start`` on; logits are kept of the last, or of all.

        Logits can be read for as many tokens as go through at once, the last of them at -1.
        """
        for begin in range(0, len(tokens), self.at_once):
            self.batch.clear()
            for i, token in enumerate(tokens[begin : begin + self.at_once], begin):
                self.batch.add(token, start + i, [0], all_logits or i == len(tokens) - 1)
            _run(self.file, self.context.decode, self.batch)

    def rows(self, tokens: Sequence[int]) -> Iterator[list[float]]:
        """Logits (vocabulary,) behind each token; the model begins anew."""
        self.clear()
        for begin in range(0, len(tokens), self.at_once):
            piece = tokens[begin : begin + self.at_once]
            self.put(piece, begin, all_logits=True)
            for i in range(len(piece)):
                yield self.context.get_logits_ith(i)


def _cores() -> int:
    """Cores this process may use: llama.cpp runs no faster on the second thread of a core."""
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = min(cores, len(os.sched_getaffinity(0)))
    return int(cores)


def _tokenize(file: str, texts: list[str]) -> list[list[int]]:
    # Not vocab_only: cyllama 0.2.18 asks such a model for its heads, at which llama.cpp aborts.
    model = _open_model(file, no_alloc=True, use_mmap=False)
    vocabulary = model.get_vocab()  # which does not keep its model alive
    return [list(_run(file, vocabulary.tokenize, text, False, True)) for text in texts]


def _logits(file: str, tokens: list[int], exact: bool, out: str) -> None:
    import numpy as np

    model = _Model(file, len(tokens), exact=exact)
    found = np.empty((len(tokens), model.vocabulary), dtype=np.float32)
    for i, row in enumerate(model.rows(tokens)):
        found[i] = row
    np.save(out, found)


def _losses(file: str, windows: list[list[int]], exact: bool) -> list[list[float]]:
    import numpy as np

    def loss(row: list[float], target: int) -> float:
        values = np.array(row, dtype=np.float64)
        top = values.max()
        return float(np.log(np.exp(values - top).sum()) + top - values[target])

    model = _Model(file, max(map(len, windows), default=1), exact=exact)
    return [
        [loss(row, target) for row, target in zip(model.rows(w[:-1]), w[1:], strict=True)]
        for w in windows
    ]


def _greedy(file: str, prompts: list[list[int]], new_tokens: int, exact: bool) -> list[list[int]]:
    library = _library()
    model = _Model(file, max(map(len, prompts), default=1) + new_tokens, exact=exact)
    sampler = library.LlamaSampler(library.LlamaSamplerChainParams())
    sampler.add_greedy()

    made = []
    for prompt in prompts:
        model.clear()
        tokens, done = list(prompt), 0
        for _ in range(new_tokens):
            model.put(tokens[done:], done)
            done = len(tokens)
            tokens.append(int(_run(file, sampler.sample, model.context, -1)))
        made.append(tokens[len(prompt) :])
    return made


def _quantize(file: str, target: str, ftype: int) -> list[str]:
    library = _library()
    params = library.LlamaModelQuantizeParams()
    params.ftype = ftype
    params.nthread = _cores()
    _log.take(WARNING)  # of tasks before
    _run(file, library.model_quantize, file, target, params)
    return _log.take(WARNING)


class _Meter:
    """Runs one file over and over; see :func:`speed`."""

    def open(
        self, source: str, prompt_tokens: int, new_tokens: int, threads: int | None
    ) -> dict[str, int]:
        """Load the model and run it once, to warm up."""
        from secateur.progress import PeakMemory

        length = prompt_tokens + new_tokens
        with PeakMemory() as memory:
            self._model = _Model(
                source, length, at_once=prompt_tokens, threads=threads, mapped=False
            )
            self._tokens = fixed_tokens(length, self._model.vocabulary)
            self._prompt_tokens = prompt_tokens
            self.measure()
        return {
            "nbytes": os.path.getsize(source),
            "parameters": int(self._model.model.n_params),
            "memory": memory.peak,
        }

    def measure(self) -> dict[str, float]:
        """Tokens per second of one run."""
        model, count = self._model, self._prompt_tokens
        model.clear()
        began = time.perf_counter()
        model.put(self._tokens[:count], 0)
        model.context.synchronize()
        between = time.perf_counter()
        for i, token in enumerate(self._tokens[count:], count):
            model.put([token], i)
        model.context.synchronize()
        ended = time.perf_counter()
        return {
            "prompt": count / (between - began),
            "generation": (len(self._tokens) - count) / (ended - between),
        }


def main() -> None:
    """Answer tasks; see the top of this file."""
    meter = _Meter()
    code = 0
    try:
        serve(
            {
                "tokenize": _tokenize,
                "logits": _logits,
                "losses": _losses,
                "greedy": _greedy,
                "quantize": _quantize,
                "open": meter.open,
                "measure": meter.measure,
            }
        )
    except BaseException:
        traceback.print_exc()
        code = 1
    # An interpreter that ends in order goes before llama.cpp, which then logs into a function that
    # is no more: a segmentation fault.
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
