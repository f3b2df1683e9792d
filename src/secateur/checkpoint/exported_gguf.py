"""A GGUF file that Secateur wrote, read back as the torch model that it came from.

transformers opens the common architectures only, and with one width for all blocks. Our files say
themselves what they are: the config, and for every tensor its parts and the order of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint.base import Checkpoint, TensorInfo
from secateur.checkpoint.gguf_file import (
    GgufCheckpoint,
    metadata_folder,
    open_reader,
    tokenizer_keys,
)
from secateur.errors import SourceError, printable

#: Keys of our files: the transformers config, and where each tensor comes from.
CONFIG_KEY = "secateur.config"
TABLE_KEY = "secateur.tensors"
#: How the model was healed; files of models that were not have no such key.
HEALED_KEY = "secateur.healed"
#: Stands in a file for a list of no merges, which llama.cpp does not take: these signs are no
#: bytes, so no text of bytes has them.
NO_MERGES = "▁ ▁"


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file of ours, or of anybody else."""
    reader = open_reader(path)
    ours = CONFIG_KEY in reader.fields and TABLE_KEY in reader.fields
    return ExportedGguf(path, reader) if ours else GgufCheckpoint(path, reader)


class ExportedGguf(GgufCheckpoint):
    """See :class:`~secateur.checkpoint.base.Checkpoint`; tensors go by their transformers names."""

    def _open_metadata(self, reader: Any) -> None:
        from secateur.modules import MODEL_TYPE_PREFIX, pruned_config

        def made() -> tuple[Any, Any]:
            from transformers import AutoConfig

            if str(raw.get("model_type", "")).startswith(MODEL_TYPE_PREFIX):
                config = pruned_config(raw)
            else:
                config = AutoConfig.for_model(**raw)
            return config, _tokenizer_of(self.path, reader)

        try:
            raw = json.loads(reader.fields[CONFIG_KEY].contents())
            table = json.loads(reader.fields[TABLE_KEY].contents())
            if not isinstance(raw, dict):
                raise TypeError("the config is no object")
            self._places = dict(self._each_part(table))
            if HEALED_KEY in reader.fields:
                self.healed = printable(str(reader.fields[HEALED_KEY].contents()))
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            raise SourceError(
                f"{self.path} has damaged entries {CONFIG_KEY} or {TABLE_KEY} ({error!r}): export "
                "it again"
            ) from error
        self.folder = metadata_folder(self.path, tokenizer_keys(self.path, reader), made)
        self.config = _config_of(self.folder)
        stored = dict(self.tensors)
        self.tensors = {
            part: TensorInfo(
                part,
                (rows, *stored[name].shape[1:]),
                stored[name].dtype,
                stored[name].nbytes * rows // stored[name].shape[0],
                self.path,
            )
            for part, (name, _, rows, _) in self._places.items()
        }
        self._shapes = {name: info.shape for name, info in stored.items()}

    def _each_part(self, table: Any) -> Iterable[tuple[str, tuple[str, int, int, int]]]:
        """Name in the model -> name in the file, first row, rows, heads in interleaved order."""
        for name, parts, heads in table:
            first = 0
            for part, rows in parts:
                if rows < 1 or heads < 0 or (heads and rows % (2 * heads)):
                    raise ValueError(f"rows of {part}")
                yield str(part), (str(name), first, int(rows), int(heads))
                first += int(rows)
            if first != self.tensors[str(name)].shape[0]:
                raise ValueError(f"rows of {name}")

    def _load(self, name: str) -> torch.Tensor:
        stored, first, rows, heads = self._places[name]
        values = torch.from_numpy(self._rows(stored, self._shapes[stored], first, rows))
        return separate(values, heads) if heads else values

    def skeleton_names(self, names: Iterable[str], skeleton: Any) -> dict[str, str]:
        return {name: name for name in names if name in self.tensors}


def _tokenizer_of(path: Path, reader: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    merges = reader.fields.get("tokenizer.ggml.merges")
    if merges is None or merges.contents() != [NO_MERGES]:
        return PreTrainedTokenizerFast(gguf_file=path.name, name_or_path=str(path.parent))
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, parts, settings = get_gguf_tokenizer(str(path))
    made, more = convert_gguf_tokenizer(architecture, {**parts, "merges": []})
    return PreTrainedTokenizerFast(tokenizer_object=made, **settings, **more)


def _config_of(folder: Path) -> Any:
    from secateur.checkpoint.safetensors_folder import load_config

    return load_config(folder, str(folder), trust_remote_code=False)


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from two halves (transformers) to neighbors (llama.cpp).

    Args:
        tensor: (heads * size, ...).
    """
    size = len(tensor) // heads
    split = tensor.reshape(heads, 2, size // 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def separate(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The reverse of :func:`interleave`."""
    size = len(tensor) // heads
    split = tensor.reshape(heads, size // 2, 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)
