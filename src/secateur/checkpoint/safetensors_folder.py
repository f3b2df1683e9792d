"""A Hugging Face folder: ``config.json`` and one or several safetensors files.

The headers are checked here before safetensors itself sees the file, because a user with a
half-downloaded model needs to hear which file it is and what is wrong with it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint.base import Checkpoint, TensorInfo, linked_away, read_bytes
from secateur.checkpoint.packed import PACKED_TYPE, PARTS, TYPE_KEY, packed_shape, unpack
from secateur.errors import SourceError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATING = {name for name, dtype in DTYPES.items() if dtype.is_floating_point}
#: safetensors refuses longer headers too; without a limit a forged length asks for all memory.
MAX_HEADER = 100_000_000
#: Config, index, tokenizer, template, code: besides weights, what decides a run's result.
WATCHED = (".json", ".model", ".txt", ".jinja", ".py")


class SafetensorsCheckpoint(Checkpoint):
    """See :class:`~secateur.checkpoint.base.Checkpoint`."""

    def __init__(self, folder: Path, *, source: str, trust_remote_code: bool) -> None:
        self.folder = folder
        self.source = source
        self.trust_remote_code = trust_remote_code
        self.config = load_config(folder, source, trust_remote_code)
        self.tensors = {}
        for path, names in _weight_files(folder).items():
            # Weights may lie on another disk; of any other file, not a byte is read.
            if linked_away(path, folder) and path.resolve().suffix != ".safetensors":
                raise SourceError(
                    f"{path} is a link to {path.resolve()}, outside of the model's folder and no "
                    "safetensors file: put the file itself in its place if it belongs to the model"
                )
            header = read_header(path)
            missing = sorted(names - header.keys()) if names else []
            if missing:
                raise SourceError(
                    f"the index names tensor {missing[0]} in {path.name}, which does not hold it: "
                    "index and shards are of different versions; fetch them again together"
                )
            self.tensors.update(
                {name: info for name, info in header.items() if not names or name in names}
            )
        self._parts: dict[str, TensorInfo] = {}
        self._packed = self._find_packed()
        if getattr(self.config, "quantization_config", None) and self._kinds() - FLOATING:
            raise self._quantised(self._kinds())

    def _find_packed(self) -> set[str]:
        """Names of matrices that are stored packed; they stand among the tensors as if plain."""
        names = {n.removesuffix(".bitmask") for n in self.tensors if n.endswith(".bitmask")}
        names = {n for n in names if all(f"{n}.{part}" in self.tensors for part in PARTS)}
        for name in sorted(names):
            mask, values, _ = (self.tensors[f"{name}.{part}"] for part in PARTS)
            shape = tuple(int(side) for side in self._stored(f"{name}.shape").flatten()[:3])
            packed_shape(name, mask.shape, shape, values.shape)
            self._parts |= {f"{name}.{part}": self.tensors.pop(f"{name}.{part}") for part in PARTS}
            size = mask.nbytes + values.nbytes
            self.tensors[name] = TensorInfo(name, shape, values.dtype, size, values.file)
        return names

    def _kinds(self) -> set[str]:
        return {info.dtype for info in self.tensors.values()}

    def _quantised(self, kinds: set[str]) -> SourceError:
        return SourceError(
            f"source {self.source} holds no plain floating weights (types: "
            f"{', '.join(sorted(kinds))}): quantised safetensors cannot be pruned; give the "
            "unquantised model, or a GGUF file"
        )

    def _load(self, name: str) -> torch.Tensor:
        if name not in self._packed:
            return self._stored(name)
        rows, width = self.tensors[name].shape
        return unpack(name, {p: self._stored(f"{name}.{p}") for p in PARTS[:2]}, (rows, width))

    def _stored(self, name: str) -> torch.Tensor:
        """The values of one tensor of the file."""
        info = self.tensors.get(name) or self._parts[name]
        if info.dtype not in DTYPES:
            raise self._quantised({info.dtype})
        tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        if info.nbytes:
            read_bytes(info.file, info.begin, tensor.reshape(-1).view(torch.uint8).numpy())
        return tensor

    def _watched(self) -> list[Path]:
        small = [path for path in self.folder.iterdir() if path.suffix in WATCHED]
        return sorted({*self.files, *(path for path in small if path.is_file())})

    @property
    def dtype(self) -> torch.dtype:
        counts: dict[str, int] = {}
        for info in self.tensors.values():
            counts[info.dtype] = counts.get(info.dtype, 0) + info.numel
        floating = {d: n for d, n in counts.items() if d in FLOATING}
        if not floating:
            raise self._quantised(set(counts))
        return DTYPES[max(floating, key=lambda d: floating[d])]

    def skeleton_names(self, names: Iterable[str], skeleton: Any) -> dict[str, str]:
        # Older checkpoints were saved from the base model and lack its prefix ("decoder.layers.0"
        # for "model.decoder.layers.0"); from_pretrained accepts them, so we do.
        prefix = f"{skeleton.base_model_prefix}."
        found: dict[str, str] = {}
        for name in names:
            short = name.removeprefix(prefix)
            for candidate in (name, short, prefix + name):
                if candidate in self.tensors:
                    found[name] = candidate
                    break
        wanted = skeleton.state_dict()
        for name, stored in found.items():
            kind = self.tensors[stored].dtype
            if wanted[name].is_floating_point() and kind not in FLOATING:
                raise self._quantised({kind})
        return found


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Weight files and the tensors that are wanted of each (an empty set: all of them)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            items = [(str(k), str(v)) for k, v in weight_map.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SourceError(f"{index} is no safetensors index: {error}") from error
        if not items:
            raise SourceError(f"{index} names no tensor")
        files: dict[Path, set[str]] = {}
        for name, shard in items:
            if Path(shard).name != shard or len(shard.encode(errors="replace")) > 255:
                raise SourceError(
                    f"{index} names shard {shard!r}: a shard must lie in the folder itself"
                )
            files.setdefault(folder / shard, set()).add(name)
        for path in files:
            if not path.is_file():
                raise SourceError(
                    f"shard {path.name} is named in {index.name} but is not in {folder}: "
                    "the download is not complete; fetch the folder again"
                )
        return files
    single = folder / "model.safetensors"
    if single.is_file():
        return {single: set()}
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return {others[0]: set()}
    raise SourceError(
        f"{folder} holds {len(others)} safetensors files but neither model.safetensors nor "
        "model.safetensors.index.json: fetch the index file too"
    )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file.

    Raises:
        SourceError: the file is cut short, the header is not what its length says, offsets
            overlap or leave the file, or a shape and its bytes disagree.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            if len(first) < 8:
                raise SourceError(f"{path} is cut short: {size} bytes, not even a header")
            (length,) = struct.unpack("<Q", first)
            if length > min(size - 8, MAX_HEADER):
                raise SourceError(
                    f"{path} is damaged: its header claims {length} bytes, the file has {size}; "
                    "fetch it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    entries: list[tuple[str, str, list[int], int, int]] = []
    try:
        for name, entry in json.loads(raw).items():
            if name != "__metadata__":
                begin, end = (int(offset) for offset in entry["data_offsets"])
                shape = [int(side) for side in entry["shape"]]
                entries.append((str(name), str(entry["dtype"]), shape, begin, end))
    except (
        ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        raise SourceError(
            f"{path} is damaged: its header is not valid ({error}); fetch it again"
        ) from error
    found: dict[str, TensorInfo] = {}
    end_of_last = 0
    for name, dtype, shape, begin, end in sorted(entries, key=lambda e: (e[3], e[4])):
        if begin < end_of_last:
            raise SourceError(
                f"{path} is damaged: tensor {name} overlaps the one before it "
                f"(starts at {begin}, the other ends at {end_of_last}); fetch it again"
            )
        if 8 + length + end > size:
            raise SourceError(
                f"{path} is cut short: tensor {name} ends at byte {8 + length + end}, the file "
                f"has {size}; fetch it again"
            )
        info = TensorInfo(name, tuple(shape), dtype, end - begin, path, 8 + length + begin)
        if any(side < 0 for side in shape) or end < begin:
            raise SourceError(f"{path} is damaged: tensor {name} has shape {shape}; fetch it again")
        if dtype in DTYPES and info.numel * DTYPES[dtype].itemsize != info.nbytes:
            raise SourceError(
                f"{path} is damaged: tensor {name} of shape {shape} and type {dtype} cannot have "
                f"{info.nbytes} bytes; fetch it again"
            )
        end_of_last = end
        found[name] = info
    if 8 + length + end_of_last < size:
        raise SourceError(
            f"{path} is damaged: its tensors end at byte {8 + length + end_of_last}, the file has "
            f"{size}; fetch it again"
        )
    return found


def load_config(folder: Path, source: str, trust_remote_code: bool) -> Any:
    """The transformers config, without running any code of the checkpoint unless allowed."""
    from transformers import CONFIG_MAPPING, AutoConfig

    from secateur.modules import MODEL_TYPE_PREFIX, pruned_config

    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise SourceError(f"{path} does not say model_type: it is not a model's config")
    packed = raw["model_type"] == PACKED_TYPE
    if packed:  # nothing else opens these
        raw["model_type"] = raw.pop(TYPE_KEY, "")
    model_type = str(raw["model_type"])
    if model_type.startswith(MODEL_TYPE_PREFIX):
        # One of our own outputs: the classes are built here, the file beside it is not run.
        return pruned_config(raw)
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        if raw.get("auto_map"):
            raise SourceError(
                f"source {source} (model_type {model_type}) needs Python code of its own: read "
                "that code, and if you trust it repeat the command with --trust-remote-code"
            )
        raise SourceError(
            f"source {source} has model_type {model_type}, which the installed transformers does "
            "not know: try pip install -U transformers"
        )
    try:
        if packed:
            return CONFIG_MAPPING[model_type].from_dict(raw)
        return AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code and model_type not in CONFIG_MAPPING
        )
    except Exception as error:  # transformers raises many kinds for a bad config
        raise SourceError(f"{path} cannot be used: {error}") from error
