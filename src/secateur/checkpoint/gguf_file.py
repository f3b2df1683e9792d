"""A GGUF file, dequantised tensor by tensor with transformers' own name and layout tables."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from secateur.checkpoint.base import Checkpoint, TensorInfo, first_line, read_bytes
from secateur.checkpoint.gguf_header import check_header
from secateur.errors import SourceError

#: Rows of a matrix that are dequantised in one call.
ROWS_AT_ONCE = 4096
#: File beside the made config and tokenizer, with what Hugging Face files have no place for.
TOKENIZER_KEYS = "gguf_tokenizer.json"


class GgufCheckpoint(Checkpoint):
    """See :class:`~secateur.checkpoint.base.Checkpoint`.

    Config and tokenizer are read once through transformers and kept as ordinary files in the
    user's cache folder, since parsing a vocabulary out of GGUF takes seconds.
    """

    overhead = 170 * 2**20  # the vocabulary, as the reader's many small arrays

    def __init__(self, path: Path, reader: Any = None) -> None:
        self.source = str(path)
        self.path = path
        reader = open_reader(path) if reader is None else reader
        self._architecture = str(_value(path, reader, "general.architecture"))
        # The reader itself is not kept: its vocabulary is a hundred megabytes of small objects.
        self._entries = {entry.name: entry for entry in reader.tensors}
        self.tensors = {
            name: TensorInfo(
                name,
                tuple(int(side) for side in reversed(entry.shape.tolist())),
                entry.tensor_type.name,
                int(entry.n_bytes),
                path,
            )
            for name, entry in self._entries.items()
        }
        self._open_metadata(reader)

    def _open_metadata(self, reader: Any) -> None:
        """Config and tokenizer."""
        from transformers import AutoConfig

        def made() -> tuple[Any, Any]:
            from transformers import AutoTokenizer

            config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
            config._name_or_path = ""
            return config, AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)

        self.folder = metadata_folder(self.path, tokenizer_keys(self.path, reader), made)
        self.config = AutoConfig.from_pretrained(self.folder)

    @cached_property
    def _processor(self) -> Any:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        kind = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)
        return kind(config=self.config.to_dict())

    def _rows(self, name: str, shape: tuple[int, ...], first: int, count: int) -> Any:
        """Some rows of a stored tensor, dequantised, float32."""
        from gguf import dequantize

        entry = self._entries[name]
        try:
            # A piece at a time: at once, a vocabulary of floats would exist three times over.
            values = np.empty((count, *shape[1:]), dtype=np.float32)
            for start in range(0, count, ROWS_AT_ONCE):
                end = min(count, start + ROWS_AT_ONCE)
                data = np.empty((end - start, *entry.data.shape[1:]), dtype=entry.data.dtype)
                begin = entry.data_offset + (first + start) * entry.data.strides[0]
                read_bytes(self.path, int(begin), data.reshape(-1).view(np.uint8))
                values[start:end] = dequantize(data, entry.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise SourceError(
                f"tensor {name} in {self.path} is of type {entry.tensor_type.name}, which cannot "
                "be dequantised: give an f16, q8_0, q4_0, q4_1 or K-quant file"
            ) from error
        return values

    def _load(self, name: str) -> torch.Tensor:
        shape = self.tensors[name].shape
        rows = self._rows(name, shape, 0, shape[0])
        try:
            done = self._processor.process(
                weights=rows, name=name, tensor_key_mapping={}, parsed_parameters={}
            )
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise SourceError(
                f"tensor {name} of shape {list(shape)} in {self.path} does not fit the file's own "
                f"keys ({first_line(error)}): fetch it again"
            ) from error
        return torch.from_numpy(np.ascontiguousarray(done.weights))

    @property
    def dtype(self) -> torch.dtype:
        # Scales of quantised blocks are float16, so float16 loses least of what the file says.
        kinds = {info.dtype for info in self.tensors.values() if len(info.shape) > 1}
        if kinds <= {"F32"}:
            return torch.float32
        return torch.bfloat16 if "BF16" in kinds else torch.float16

    def skeleton_names(self, names: Iterable[str], skeleton: Any) -> dict[str, str]:
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        # Without its submodules, for each of which the function builds the whole table again.
        flat = SimpleNamespace(
            config=skeleton.config, state_dict=skeleton.state_dict, named_children=dict
        )
        stored = {hf: g for g, hf in get_gguf_hf_weights_map(flat, self._processor).items()}
        return {n: stored[n] for n in names if stored.get(n) in self.tensors}


def open_reader(path: Path) -> Any:
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
    try:
        check_header(path)
        reader = GGUFReader(path)
    except Exception as error:  # the reader trusts its input; anything may come out of bad bytes
        raise SourceError(
            f"{path} is truncated or damaged, or of a GGUF type that gguf does not know "
            f"({first_line(error)}): fetch it again"
        ) from error
    size = path.stat().st_size
    for entry in reader.tensors:
        if entry.data_offset + entry.n_bytes > size:
            raise SourceError(
                f"{path} is truncated: tensor {entry.name} ends at byte "
                f"{entry.data_offset + entry.n_bytes}, the file has {size}; fetch it again"
            )
    if "general.architecture" not in reader.fields or not reader.tensors:
        raise SourceError(f"{path} holds no model: no architecture or no tensors in it")
    return reader


def tokenizer_keys(path: Path, reader: Any) -> dict[str, Any]:
    """How llama.cpp is told to tokenize; transformers' files keep only a part of it."""
    names = ("model", "pre", "add_bos_token", "add_space_prefix")
    there = [name for name in names if f"tokenizer.ggml.{name}" in reader.fields]
    return {name: _value(path, reader, f"tokenizer.ggml.{name}") for name in there}


def _value(path: Path, reader: Any, key: str) -> Any:
    """The value of a key; the reader decodes it only now.

    Raises:
        SourceError: it is none.
    """
    try:
        return reader.fields[key].contents()
    except (ValueError, LookupError, TypeError) as error:
        raise SourceError(
            f"{path} has a damaged entry {key} ({first_line(error)}): fetch it again"
        ) from error


def metadata_folder(path: Path, keys: dict[str, Any], made: Callable[[], tuple[Any, Any]]) -> Path:
    """Config and tokenizer of the file as ordinary files, made once per file and version.

    Args:
        keys: kept beside them, for whoever writes a GGUF file again.
        made: makes config and tokenizer.
    """
    import transformers

    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{transformers.__version__}|2"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "secateur" / "gguf" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if folder.is_dir():
        return folder
    try:
        config, tokenizer = made()
    except Exception as error:  # unknown architectures, tokenizers and keys all end here
        raise SourceError(
            f"{path} is a GGUF file of a type that transformers cannot open "
            f"({first_line(error)}): give the Hugging Face folder of the model instead"
        ) from error
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(
            f"config and tokenizer of {path} cannot be kept in {folder.parent} "
            f"({error.strerror}): let XDG_CACHE_HOME name a folder that can be written"
        ) from error
    try:
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _drop_invented_tokens(partial / "tokenizer.json", int(config.vocab_size))
        (partial / TOKENIZER_KEYS).write_text(json.dumps(keys), encoding="utf-8")
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise  # a full disk is told as such
        raise SourceError(
            f"config and tokenizer of {path} cannot be kept ({first_line(error)}): give the "
            "Hugging Face folder of the model instead"
        ) from error
    try:
        partial.rename(folder)
    except OSError:  # another process was faster; its files are the same
        shutil.rmtree(partial)
    return folder


def _drop_invented_tokens(path: Path, rows: int) -> None:
    """Take out added tokens that the embedding has no row for.

    transformers gives every byte-level vocabulary the token ``<|endoftext|>``, as a new one where
    the file has none (Llama 3); its id would be the first behind the embedding.
    """
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < rows]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
