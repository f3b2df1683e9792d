"""Reading a model lazily and writing one atomically; nothing here knows about pruning.

:func:`open_checkpoint` takes what a user may call a model (a Hugging Face folder, a hub id, a GGUF
file) and returns a :class:`Checkpoint`: names, shapes and types at once, values one tensor at a
time. :mod:`~secateur.checkpoint.writer` holds the other direction: shards, the journal, the lock.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from secateur.checkpoint.base import Checkpoint, TensorInfo
from secateur.errors import SourceError

__all__ = ["Checkpoint", "TensorInfo", "local_path", "open_checkpoint"]

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def open_checkpoint(source: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open ``source`` without reading any weight.

    Args:
        source: folder with ``config.json`` and safetensors files, a ``.gguf`` file, or a hub id
            such as ``HuggingFaceTB/SmolLM2-135M`` (fetched through huggingface_hub).
        trust_remote_code: let transformers run Python code that lies in the checkpoint.

    Raises:
        SourceError: nothing there, a damaged file, pickled weights, or code that was not allowed.
    """
    text = str(source)
    path = local_path(source)
    if path.is_dir():
        return _open_folder(path, text, trust_remote_code)
    if path.is_file():
        if path.suffix == ".gguf":
            from secateur.checkpoint.exported_gguf import open_gguf

            return open_gguf(path)
        if path.suffix == ".safetensors":
            raise SourceError(
                f"source {text} is a single weight file: name the folder that also holds its "
                f"config.json, for example {path.parent}"
            )
        raise SourceError(
            f"source {text} is a file of type {path.suffix or '(none)'}: allowed are a folder "
            "with config.json and *.safetensors, a .gguf file, or a hub id such as org/name"
        )
    if _looks_like_hub_id(text):
        from secateur.checkpoint.hub import fetch

        return _open_folder(fetch(text, trust_remote_code), text, trust_remote_code)
    raise SourceError(
        f"source {text} does not exist: give a folder with config.json and *.safetensors, "
        "a .gguf file, or a hub id such as org/name"
    )


def local_path(name: str | Path) -> Path:
    """``name`` as a path, with ``~`` for the home folder; ``~name`` stays if there is none."""
    path = Path(name)
    with suppress(RuntimeError):
        path = path.expanduser()
    return path


def _looks_like_hub_id(text: str) -> bool:
    import re

    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text))


def _open_folder(folder: Path, source: str, trust_remote_code: bool) -> Checkpoint:
    from secateur.checkpoint.safetensors_folder import SafetensorsCheckpoint

    if not any(folder.iterdir()):
        raise SourceError(
            f"source {source} is an empty folder: it should hold config.json and *.safetensors"
        )
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        if ggufs:
            raise SourceError(
                f"source {source} has no config.json but a GGUF file: name the file, {ggufs[0]}"
            )
        raise SourceError(
            f"source {source} has no config.json: it should hold config.json and *.safetensors, "
            "as save_pretrained writes them"
        )
    if not any(folder.glob("*.safetensors*")):
        pickled = sorted(p.name for pattern in PICKLED for p in folder.glob(pattern))
        if pickled:
            raise SourceError(
                f"source {source} holds only pickled weights ({pickled[0]}), which can run code "
                "when they are opened: convert them once, where you trust them, with "
                'python -c "from transformers import AutoModelForCausalLM as M; '
                f"M.from_pretrained('{source}').save_pretrained('{folder.name}-safetensors')\" "
                "and give the new folder"
            )
        raise SourceError(f"source {source} has a config.json but no *.safetensors file")
    return SafetensorsCheckpoint(folder, source=source, trust_remote_code=trust_remote_code)
