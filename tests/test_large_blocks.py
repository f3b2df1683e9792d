"""Large blocks: read again instead of kept while they are cut, and off the C library's heap."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from secateur import rereading, streaming
from secateur.block_worker import BlockWorker
from secateur.checkpoint import open_checkpoint
from secateur.checkpoint.base import Checkpoint
from secateur.methods.base import Block
from secateur.methods.comp import Comp
from secateur.pruning import prune
from secateur.recipe import make_recipe
from secateur.streaming import Stream

Folder = Callable[[str], Path]
CALIBRATION = {"samples": 4, "length": 16}
ALL = {"exempt_first": 0, "exempt_last": 0}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[None]]:
    """From its call on every block counts as large; tells how often the heap was spoken to."""

    def begin() -> list[None]:
        asked: list[None] = []
        monkeypatch.setattr(rereading, "LARGE_BLOCK", 1)
        monkeypatch.setattr(streaming, "map_large_tensors", lambda: asked.append(None))
        return asked

    return begin


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "report.html"
    }


CASES: list[tuple[str, dict[str, Any]]] = [
    ("comp", {"options": {"layers": 0, **ALL}}),
    ("comp", {"options": {"layers": 1, "inputs": "sequential", **ALL}}),
    ("obs", {"options": {"layers": 0, "copies": 1, "written": 0, **ALL}}),
    ("flap", {}),
    ("wanda-sp", {}),
    ("random", {}),
    ("apt", {"remove": None, "sparsity": "50%", "options": {"scope": "layer"}}),
    ("apt", {"remove": None, "sparsity": "2:4", "options": {"scope": "block"}}),
]


@pytest.mark.parametrize(("method", "settings"), CASES)
@pytest.mark.parametrize("model", ["llama-gqa-tied", "opt"])
def test_the_same_bytes(
    method: str,
    settings: dict[str, Any],
    model: str,
    large: Callable[[], list[None]],
    model_folder: Folder,
    tmp_path: Path,
) -> None:
    values = {"remove": "25%", "calibration": CALIBRATION, **settings}
    recipe = make_recipe(method=method, **{k: v for k, v in values.items() if v is not None})
    source = model_folder(model)
    prune(source, tmp_path / "kept", recipe, verify=False)
    large()
    prune(source, tmp_path / "read", recipe, verify=False)
    assert digests(tmp_path / "kept") == digests(tmp_path / "read")


def test_workers_make_the_same_bytes(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is in this process, so that it sees blocks as large too."""
    recipe = make_recipe(
        method="comp", remove="25%", options={"layers": 0, **ALL}, calibration=CALIBRATION
    )
    source, out = model_folder("llama-gqa-tied"), []
    for size in (rereading.LARGE_BLOCK, 1):
        monkeypatch.setattr(rereading, "LARGE_BLOCK", size)
        monkeypatch.setattr(streaming, "map_large_tensors", lambda: None)
        folder = tmp_path / str(size)
        (folder / "model").mkdir(parents=True)
        worker = BlockWorker()
        try:
            layers = list(range(Stream(open_checkpoint(source)).anatomy.layers))
            worker.open(
                str(source),
                recipe.model_dump(mode="json"),
                ["hf", None],  # type: ignore[list-item]
                "cpu",
                False,
                layers,
                str(folder),
                torch.get_num_threads(),
            )
            stream = worker._run.stream
            inputs = folder / "inputs.safetensors"
            tokens = torch.arange(64).reshape(4, 16) % 100
            save_file({"hidden": stream.embed(tokens)}, inputs)
            worker.look(1, str(inputs), 0, {"parameters": 3000})
            assert worker.cut(3000) > 0
            worker.write()
        finally:
            worker.end()
        out.append(digests(folder / "model"))
        assert out[-1]
    assert out[0] == out[1]


def test_a_block_is_gone_while_it_is_cut(
    large: Callable[[], list[None]], model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.pipeline import make_plan

    asked = large()
    seen: list[Stream] = []
    read: list[str] = []
    init, cut, load = Stream.__init__, Comp.cut, Checkpoint.read

    def opened(self: Stream, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        seen.append(self)

    def cutting(self: Comp, block: Block, quota: int) -> Any:
        if quota:
            (stream,) = seen
            module = stream._blocks[block.source]
            assert all(p.is_meta for p in module.parameters())
            read.clear()
            wanted = stream.read_block(block.source)
            for name, weight in block.weights.items():
                assert torch.equal(weight, wanted[f"{name}.weight"])
            assert len(read) == len(wanted) + len(block.weights)  # each when it was asked for
            assert "nothing" not in block.weights
            with pytest.raises(KeyError):
                block.weights["nothing"]
        return cut(self, block, quota)

    def reading(self: Checkpoint, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        read.append(name)
        return load(self, name, dtype)

    monkeypatch.setattr(Stream, "__init__", opened)
    monkeypatch.setattr(Comp, "cut", cutting)
    monkeypatch.setattr(Checkpoint, "read", reading)
    recipe = make_recipe(
        method="comp", remove="25%", options={"layers": 0, **ALL}, calibration=CALIBRATION
    )
    assert make_plan(model_folder("llama-gqa-tied"), recipe).plan.gone > 0
    assert read
    assert len(asked) == 1


def test_small_blocks_are_kept(model_folder: Folder) -> None:
    stream = Stream(open_checkpoint(model_folder("llama-gqa-tied")))
    assert 4 * stream.anatomy.block_parameters < rereading.LARGE_BLOCK
    assert not stream.large


HOLES = """
import sys, torch
from secateur.progress import map_large_tensors, process_memory
if sys.argv[1] == "mapped":
    map_large_tensors()
torch.ones(7 * 2**20)  # 28 MiB: from what is freed the C library learns what is large
before = process_memory()
tensors = [torch.ones(3 * 2**20) for _ in range(20)]  # 12 MiB each
last = tensors.pop()
held = process_memory()
del tensors
print(held - before, process_memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another")
@pytest.mark.parametrize("way", ["mapped", "learned"])
def test_freed_tensors_leave_holes_or_not(way: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLES, way], capture_output=True, text=True, check=True
    )
    held, left = (int(part) / 2**20 for part in done.stdout.split())
    assert 235 < held < 260  # twenty of 12 MiB
    if way == "mapped":
        assert left < 20
    else:  # else nothing would have to be done
        assert left > 200
