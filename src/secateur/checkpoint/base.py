"""What every opened model offers: names, shapes, types, and values one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from secateur.errors import SourceError
from secateur.finite import all_finite

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: shape, type on disk, bytes, the file it is in and its first byte there."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    begin: int = 0

    @property
    def numel(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count


class Checkpoint(ABC):
    """An opened model. Subclasses say where the bytes are; nobody else needs to know.

    Attributes:
        source: what the user typed.
        folder: local folder with the config and tokenizer files.
        config: the transformers config.
        tensors: every stored tensor by its stored name.
    """

    source: str
    folder: Path
    config: PretrainedConfig
    tensors: dict[str, TensorInfo]
    trust_remote_code: bool = False
    #: How the model was healed, in the words of a file that holds no record; None: it does not say.
    healed: str | None = None
    #: Bytes of memory that opening takes besides the weights.
    overhead: int = 0

    @abstractmethod
    def _load(self, name: str) -> torch.Tensor:
        """The values of one tensor as they are stored."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating type to write a derived model in when the user names none."""

    @abstractmethod
    def skeleton_names(self, names: Iterable[str], skeleton: Any) -> dict[str, str]:
        """For each parameter name of the transformers model, the stored name, where there is one.

        Args:
            names: parameter and persistent buffer names of the model.
            skeleton: the model itself, on the meta device.
        """

    def prefetch(self, names: Iterable[str]) -> None:
        """Let the system read the bytes of these tensors from disk before they are asked for."""
        for name in names:
            info = self.tensors[name]
            if not info.begin or not hasattr(os, "posix_fadvise"):
                continue  # no place in a file of its own, or no such system call
            with suppress(OSError), info.file.open("rb") as file:
                os.posix_fadvise(file.fileno(), info.begin, info.nbytes, os.POSIX_FADV_WILLNEED)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor. Floating values must be finite and are cast to ``dtype`` if given.

        Raises:
            SourceError: the value cannot be read, or holds NaN or infinity.
        """
        tensor = self._load(name)
        if tensor.is_floating_point():
            if not all_finite(tensor):
                bad = int((~torch.isfinite(tensor)).sum())
                raise SourceError(
                    f"tensor {name} in {self.tensors[name].file.name} holds {bad} NaN or infinite "
                    "values: the checkpoint is damaged; fetch or export it again"
                )
            if dtype is not None:
                tensor = tensor.to(dtype)
        return tensor

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of this model.

        Raises:
            SourceError: there is none, or it cannot be opened.
        """
        from transformers import AutoTokenizer

        try:
            # With the config given, it is not read again, nor is a modelling file beside it run.
            opened = AutoTokenizer.from_pretrained(
                self.folder, config=self.config, trust_remote_code=self.trust_remote_code
            )
            opened("a", verbose=False)  # its settings are believed until they are needed
            return opened
        except BaseException as error:  # of many kinds; tokenizers itself raises plain Exception
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            if "trust_remote_code" in str(error):
                raise SourceError(
                    f"source {self.source} has a tokenizer that needs Python code of its own: "
                    "read that code, and if you trust it repeat the command with "
                    "--trust-remote-code"
                ) from error
            raise SourceError(
                f"source {self.source} has no tokenizer that opens ({first_line(error)}): put its "
                "tokenizer.json and tokenizer_config.json beside config.json"
            ) from error

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the config and over name, shape, type and size of every tensor.

        It names the model cheaply; it does not read the values. :meth:`state` notices files that
        change during a run.
        """
        table = [
            [info.name, list(info.shape), info.dtype, info.nbytes]
            for info in sorted(self.tensors.values(), key=lambda info: info.name)
        ]
        config = {
            key: value
            for key, value in self.config.to_dict().items()
            if key not in {"_name_or_path", "transformers_version"}
        }
        text = json.dumps([config, table], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def state(self) -> list[list[Any]]:
        """Name, size and modification time of each file of the source that a run reads.

        Raises:
            OSError: one of them is gone.
        """
        stats = [(path.name, path.stat()) for path in self._watched()]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def _watched(self) -> list[Path]:
        """Files whose change under a run would make its blocks those of two models."""
        return self.files


def read_bytes(path: Path, begin: int, target: np.ndarray[Any, Any]) -> None:
    """Fill ``target``, uint8, with the bytes of a file from ``begin`` on.

    Read, not mapped: of a mapped file, a disk that fails and a file that somebody cuts short end
    the process with SIGBUS, about which nothing can be said any more.

    Raises:
        SourceError: the file cannot be read, or is shorter.
    """
    view = target.data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            done = 0
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise SourceError(
                        f"{path} was cut short while it was read: it ends at byte {begin + done}; "
                        "fetch it again"
                    )
                done += got
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read ({error.strerror}): see to the disk, or fetch the file again"
        ) from error


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust met what it did not expect; that is no Exception in Python."""
    return type(error).__name__ == "PanicException"


def linked_away(path: Path, folder: Path) -> bool:
    """Whether a file of a model's folder is a link to somewhere else.

    Files of the hub's cache are, but their bytes lie in a ``blobs`` of that cache.
    """
    root, target = folder.resolve(), path.resolve()
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return not cached and root not in target.parents


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
