"""What opens files of others as the program does, and what must hold whatever is in them.

Mutations of them are in ``mutations.py``. Shared by ``test_hostile.py``, which tries some dozens of
inputs of each target, and by ``bench/fuzz.py``, which tries as many as there is time for.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError, one_line

#: Longest that one input may take, in seconds, and most memory that it may add, in bytes.
SLOW = 20.0
MOST_MEMORY = 1 << 30
# ---- targets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Good files to start from, their form, and what opens bytes in their place."""

    seeds: list[bytes]
    form: str
    open: Callable[[bytes], Any]


def surroundings(root: Path) -> dict[str, str]:
    """Environment variables under which the targets work."""
    return {"XDG_CACHE_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1"}


def targets(root: Path) -> dict[str, Target]:
    """Everything that is read of others, by name.

    Args:
        root: an empty folder to work in.
    """
    import tiny
    from test_checkpoint import write_gguf

    from secateur.checkpoint import open_checkpoint
    from secateur.exporting import export
    from secateur.pruning import prune
    from secateur.recipe import make_recipe

    model = tiny.write_model(root / "model", "llama-gqa-tied", layers=2)
    recipe = make_recipe(
        remove="10%", method="magnitude-sp", calibration={"samples": 2, "length": 16}
    )
    pruned = root / "pruned"
    prune(model, pruned, recipe, verify=False)
    export(pruned, root / "exported.gguf", verify=False)
    (model / "evil.py").write_text(f"open({str(root / 'ran')!r}, 'w')")
    export(model, root / "packed", to="packed")
    one, many = open_checkpoint(model), open_checkpoint(pruned)
    gguf = write_gguf(root / "model.gguf", tiny.make_model("llama-gqa-tied", layers=1))
    seen = _Looks(root)
    settings = (model / "tokenizer_config.json").read_bytes()
    return {
        "recipe": Target(
            [json.dumps(recipe.model_dump(exclude_none=True)).encode(), *_recipes()],
            "yaml",
            seen.recipe,
        ),
        "record": Target(
            [(pruned / "secateur.json").read_bytes(), _healed(pruned)],
            "json",
            seen.record(one, many),
        ),
        "safetensors": Target(
            [
                (model / "model.safetensors").read_bytes(),
                next((root / "packed").glob("*.safetensors")).read_bytes(),
            ],
            "safetensors",
            seen.weights,
        ),
        "index": Target(
            [(pruned / "model.safetensors.index.json").read_bytes()], "json", seen.index
        ),
        "config": Target(
            [(model / "config.json").read_bytes(), (pruned / "config.json").read_bytes()],
            "json",
            seen.config,
        ),
        "tokenizer": Target(
            [
                (model / "tokenizer.json").read_bytes(),
                b" " + settings,
                b" " + json.dumps({**json.loads(settings), **_HOSTILE_SETTINGS}).encode(),
            ],
            "json",
            seen.tokenizer,
        ),
        "gguf": Target(
            [gguf.read_bytes(), (root / "exported.gguf").read_bytes()], "gguf", seen.gguf
        ),
    }


NAMES = ("recipe", "record", "safetensors", "index", "config", "tokenizer", "gguf")
_HOSTILE_SETTINGS = {
    "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
    "chat_template": "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "extra_special_tokens": {"image_token": "<image>"},
}


def _recipes() -> list[bytes]:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    return [
        b"remove: 20%\nmethod: comp\noptions: {layers: 0, grid: 8}\ncalibration: {samples: 4}\n",
        b"remove: 20%\noptions: &a\n  layers: *a\n",
        b"remove: 20%\noptions: !!python/object/apply:os.system [touch ran]\n",
        f"{bomb}remove: *a11\n".encode(),
        b"<<: &x {remove: 20%}\noptions: {<<: *x, layers: 2001-01-01, grid: .nan}\nseed: 0x10\n",
    ]


def _healed(pruned: Path) -> bytes:
    record = json.loads((pruned / "secateur.json").read_text())
    record["healed"] = {
        "steps": 5,
        "settings": {"method": "lora", "batch": 2, "length": 16},
        "text": {"origin": "builtin"},
    }
    return json.dumps(record).encode()


class _Looks:
    """What opens each kind of file, as the commands do that read it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model, self.pruned = root / "model", root / "pruned"

    @contextlib.contextmanager
    def _put(self, path: Path, data: bytes) -> Iterator[None]:
        good = path.read_bytes() if path.exists() else None
        path.write_bytes(data)
        try:
            yield
        finally:
            if good is None:
                path.unlink()
            else:
                path.write_bytes(good)

    def recipe(self, data: bytes) -> None:
        from secateur.comparison.cells import _asks_for_zeros
        from secateur.methods import get_method
        from secateur.recipe import load_recipe, parameters_to_remove

        path = self.root / "recipe.yaml"
        with self._put(path, data):
            _asks_for_zeros(path)
            recipe = load_recipe(path)
        method = get_method(recipe.method, recipe.options)
        json.dumps(recipe.model_dump(mode="json"))
        json.dumps(method.options.model_dump(mode="json"))
        if recipe.then is not None:
            get_method(recipe.then, recipe.then_options)
        if recipe.sparsity is None:
            parameters_to_remove(recipe, parameters=10**9, decoder=9 * 10**8, bytes_each=4)

    def record(self, source: Any, pruned: Any) -> Callable[[bytes], None]:
        from secateur.exporting import plan_of
        from secateur.opening import Opened
        from secateur.outputs.gguf import _on_zeros
        from secateur.progress import Progress
        from secateur.recipe import make_recipe
        from secateur.recovery.source import open_pruned
        from secateur.streaming import Stream

        stream = Stream(source)
        recipe = make_recipe(remove="10%", method="magnitude-sp")

        def again() -> None:
            Opened(
                self.model, recipe, device="cpu", trust_remote_code=False, progress=Progress(),
                target=None,
            )  # fmt: skip

        def open_(data: bytes) -> None:
            with self._put(self.pruned / "secateur.json", data):
                _on_zeros(self.pruned)
                tried(
                    lambda: self._inspect(self.pruned),
                    lambda: open_pruned(self.pruned),
                    lambda: plan_of(pruned, stream),
                )
            with self._put(self.model / "secateur.json", data):
                again()

        return open_

    def weights(self, data: bytes) -> None:
        from secateur.checkpoint import open_checkpoint

        with self._put(self.model / "model.safetensors", data):
            opened = open_checkpoint(self.model)
            _ = opened.dtype, opened.fingerprint
            tried(*[lambda name=name: opened.read(name) for name in opened.tensors])

    def index(self, data: bytes) -> None:
        with self._put(self.pruned / "model.safetensors.index.json", data):
            self._inspect(self.pruned)

    def config(self, data: bytes) -> None:
        folder = self.pruned if b'"secateur"' in data else self.model
        with self._put(folder / "config.json", data):
            self._inspect(folder)

    def _inspect(self, folder: Path) -> None:
        import torch

        from secateur.checkpoint import open_checkpoint
        from secateur.cli.look import inspect
        from secateur.streaming import Stream

        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
            inspect(str(folder))
        stream = Stream(open_checkpoint(folder))
        tokens = torch.arange(16).reshape(2, 8)
        stream.head(stream.forward(tokens), tokens, lambda *_: None)

    def tokenizer(self, data: bytes) -> None:
        from gguf import GGUFWriter

        from secateur.calibration import check_vocabulary, encode
        from secateur.checkpoint import open_checkpoint
        from secateur.outputs.gguf_tokenizer import add_tokenizer

        name = "tokenizer_config.json" if data[:1] == b" " else "tokenizer.json"
        with self._put(self.model / name, data):

            def cuts() -> None:
                tokenizer = open_checkpoint(self.model).tokenizer
                check_vocabulary(tokenizer, 300)
                encode(tokenizer, "one text, and another")

            tried(cuts, lambda: add_tokenizer(GGUFWriter(None, "llama"), self.model, 300) and None)

    def gguf(self, data: bytes) -> None:
        from secateur.checkpoint import open_checkpoint

        path = self.root / "hostile.gguf"
        with self._put(path, data):
            opened = open_checkpoint(path)
            tried(*[lambda name=name: opened.read(name) for name in list(opened.tensors)[:4]])
            self._inspect(path)


def tried(*works: Callable[[], Any]) -> None:
    """Do all of these; raise what the last of them that was refused has said."""
    refused = None
    for work in works:
        try:
            work()
        except SecateurError as error:
            refused = error
    if refused is not None:
        raise refused


# ---- what must hold ------------------------------------------------------------------------------


class Guard:
    """Notes what a reader of a file must not do, while it is on.

    Code that is run, processes, connections, pickles, and files that are opened outside of the
    folder of the model and of the installation.
    """

    NEVER = re.compile(
        r"os\.(system|exec|fork|posix_spawn)|subprocess\.Popen|socket\.(connect|getaddrinfo)"
        r"|pickle\.find_class"
    )

    def __init__(self, root: Path) -> None:
        self._root = root
        ours = Path(__file__).parents[1]
        fixed = ("/proc", "/sys", "/dev", "/usr", "/etc/ssl")
        inside = (root, Path(sys.prefix), Path(sys.base_prefix), ours, *map(Path, fixed))
        self._inside = tuple(f"{os.path.realpath(path)}/" for path in inside)
        self._on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if self.NEVER.match(event):
            self.seen.append(f"{event} {arguments!r}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self._inside) or path == str(self._root / "model" / "evil.py"):
                self.seen.append(f"open {path}")
        elif event == "exec" and "<template>" in str(arguments[0].co_filename):
            self.seen.append("a template was run")

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        self.seen.clear()
        self._on = True
        try:
            yield
        finally:
            self._on = False
        assert not self.seen, self.seen
        assert not (self._root / "ran").exists(), "code of the file was run"


def judged(target: Target, data: bytes, guard: Guard) -> bool:
    """Whether the input was read; an error of ours, of one clean line, is the other good answer."""
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = True
    with guard.on():
        try:
            target.open(data)
        except SecateurError as error:
            read = False
            line, _ = one_line(error)
            assert line.isprintable(), line
            assert len(line) < 5000, len(line)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MOST_MEMORY, f"an input took {grown} bytes"
    assert time.monotonic() - began < SLOW, "an input took too long"
    return read
