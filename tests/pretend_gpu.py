"""A GPU that is pretended: tensors that say they are on another device, with their values here.

    python tests/pretend_gpu.py MODEL FOLDER < cases

Operations of tensors on two devices are refused as CUDA refuses them, everything else is done on
the CPU. Each line of stdin is a case, ``{"name": .., "recipe": {..}}``, or with ``"task"``
``evaluate`` or ``heal`` in place of ``recipe``; it runs on both devices, and a line says what came
of it. The device is registered for the whole process, so that this is a program of its own.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_setup_privateuseone_for_python_backend(NAME)
#: Operations that take tensors of both devices: copies, and indices that are on the CPU.
COPIES = {"copy_", "_to_copy"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU, and holds one of the same shape on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGPU:
        out: OnGPU = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        out.held = held
        return out

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})

    # What torch does outside of its dispatcher, or would refuse to a subclass.

    def tolist(self) -> Any:
        return self.held.tolist()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.Tensor.__getitem__(self, _with_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        torch.Tensor.__setitem__(self, _with_tensors(index), value)


def _with_tensors(index: Any) -> Any:
    """An index in which lists are tensors on the CPU; torch would make them on the device."""
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(map(_with_tensors, index)) if isinstance(index, tuple) else index


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on what tensors hold, its results where a GPU would put them.

    Raises:
        RuntimeError: tensors of more than one number are on two devices.
    """
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, OnGPU)]
    together = [x for x in tensors if x.dim() > 0]
    if name in INDEXING and isinstance(args[0], OnGPU):
        together = [x for x in (args[0], *args[2:3]) if x.dim() > 0]  # indices may be anywhere
    if name not in COPIES and len({isinstance(x, OnGPU) for x in together}) > 1:
        shapes = [tuple(x.shape) for x in tensors]
        raise RuntimeError(f"{func} of tensors on the GPU and on the CPU: {shapes}")
    asked = kwargs.get("device")
    on_gpu = bool(here) if asked is None else torch.device(asked).type == NAME
    if asked is not None and on_gpu:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, OnGPU) else x, (args, kwargs))
    found = func(*args, **kwargs)
    if not on_gpu:
        return found
    known = {id(x.held): x for x in here}  # in place: the same tensor again

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else OnGPU(x)

    return tree_map(wrapped, found)


class _Everywhere(TorchDispatchMode):
    """Also operations that have no tensor yet, or are told to which device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def pretended() -> Iterator[None]:
    """The device ``pretend`` exists, and a user may name it."""
    import secateur.evaluation.perplexity
    import secateur.opening
    import secateur.recovery.healing

    on_cpu = torch.tensor

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        found = on_cpu(data, **kwargs)  # torch.tensor goes around the mode
        return found if device is None else found.to(device)

    checks = []
    for module in (secateur.opening, secateur.evaluation.perplexity, secateur.recovery.healing):
        checks.append((module, module.check_device))
        module.check_device = lambda name: name  # type: ignore[attr-defined]
    torch.tensor = tensor  # type: ignore[assignment]
    try:
        with _Everywhere():
            yield
    finally:
        torch.tensor = on_cpu
        for module, check in checks:
            module.check_device = check  # type: ignore[attr-defined]


def pruned(source: str, out: Path, recipe: dict[str, Any], device: str) -> dict[str, Any]:
    """What stays of each block, and where zeros are."""
    from safetensors import safe_open

    from secateur.pruning import prune
    from secateur.recipe import make_recipe

    result = prune(source, out, make_recipe(**recipe), verify=False, device=device)
    found: dict[str, Any] = {}
    for cut in getattr(result.plan, "blocks", []):
        kept = {**cut.inputs, **{f"rows of {name}": rows for name, rows in cut.rows.items()}}
        found[str(cut.source)] = {name: part.tolist() for name, part in kept.items()}
    zeros: dict[str, int] = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, a file is no mapping
                zeros[name] = int((file.get_tensor(name) == 0).sum())
    return {"kept": found, "zeros": zeros}


def done(case: dict[str, Any], source: str, out: Path, device: str) -> Any:
    """What a case gives."""
    if "recipe" in case:
        return pruned(source, out, case["recipe"], device)
    if case["task"] == "evaluate":
        from secateur.evaluation import evaluate

        return {"perplexity": evaluate(source, length=64, windows=2, device=device).value}
    from secateur.recovery.healing import heal
    from secateur.recovery.settings import make_settings

    healed = heal(source, out, make_settings(**case["settings"]), device=device, verify=False)
    return {"before": healed.before, "after": healed.after}


def main() -> None:
    source, folder = sys.argv[1], Path(sys.argv[2])
    for line in sys.stdin:
        case = json.loads(line)
        name = case["name"]
        answer: dict[str, Any] = {"name": name, "error": None}
        answer["cpu"] = done(case, source, folder / f"{name}-cpu", "cpu")
        try:
            with pretended():
                answer["gpu"] = done(case, source, folder / f"{name}-gpu", NAME)
        except Exception as error:
            where = [
                f for f in traceback.extract_tb(error.__traceback__) if "secateur" in f.filename
            ]
            last = where[-1] if where else None
            answer["error"] = f"{type(error).__name__}: {error} ({last})"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
