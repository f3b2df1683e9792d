"""A GGUF file for llama.cpp from an opened model, a piece of a tensor at a time.

Header, keys and the table of tensors are written first; then every tensor is read, brought into
llama.cpp's order of rows, converted and written, before the next is read. Nothing of the model
stays in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import secateur
from secateur.checkpoint.exported_gguf import CONFIG_KEY, HEALED_KEY, TABLE_KEY, interleave
from secateur.checkpoint.writer import sync_folder
from secateur.errors import OutputError
from secateur.outputs import gguf_arch
from secateur.outputs.gguf_arch import Entry
from secateur.outputs.gguf_tokenizer import add_tokenizer
from secateur.outputs.record import healed, record_of, zeros_of
from secateur.plans import Widths
from secateur.streaming import Stream

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

#: Types that are encoded here. The others (K-quants) llama.cpp's own quantiser makes.
OWN_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
#: Values in a block of a simple quantised type; a row must consist of whole blocks.
QUANT_BLOCK = 32
#: Values that are converted in one go.
VALUES_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Exported:
    """A written file.

    Attributes:
        path: the file.
        architecture: llama.cpp's name of what is in it.
        bytes: its size.
        notes: what a user should know, a line each.
    """

    path: Path
    architecture: str
    bytes: int
    notes: list[str] = field(default_factory=list)


def check_type(kind: str) -> str:
    """A type of weights that can be written.

    Raises:
        OutputError: it is not known, or needs a package that is not there.
    """
    from secateur.outputs.llama_cpp import QUANT_TYPES, require

    name = kind.lower()
    if name in OWN_TYPES:
        return name
    if name in QUANT_TYPES:
        require(f"the type {name}")
        return name
    raise OutputError(
        f"type is {kind!r}: allowed are {', '.join(OWN_TYPES)}, and through llama.cpp's quantiser "
        f"{', '.join(n for n in QUANT_TYPES if n not in OWN_TYPES)}"
    )


def check_model(stream: Stream, *, uniform: bool, all_blocks: bool) -> None:
    """Refuse a model that could not be written once it is pruned, before that work is done.

    All of a file but its tensors is made of the model as it is, and thrown away.

    Args:
        uniform: whether all blocks will have one width.
        all_blocks: whether all of them stay.

    Raises:
        OutputError: llama.cpp has no architecture, tokenizer or type for this model.
    """
    from gguf import GGUFWriter

    config = stream.checkpoint.config
    blocks = gguf_arch.block_widths(stream)
    biased = gguf_arch.is_biased(stream)
    arch = gguf_arch.choose(config, blocks, stream.anatomy.head_size, biased=biased)
    if not uniform:
        arch = gguf_arch.home_of(config.model_type).per_layer or arch
    if arch == "smollm3" and not all_blocks:
        raise OutputError(
            "llama.cpp's architecture smollm3 leaves positions out in every fourth block, which "
            "removing whole blocks would move: use --layers 0, or give --out a folder name"
        )
    _describe(GGUFWriter(None, arch), arch, stream, blocks)


def export(
    stream: Stream,
    path: Path,
    *,
    kind: str = "f16",
    name: str | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write the model of ``stream`` to ``path``, beside it first, then renamed.

    Args:
        stream: a model, dense or pruned, of any layout that llama.cpp can hold.
        kind: type of the matrices; vectors are always float32.
        name: what the file calls the model; by default its folder's name.
        step: called with each tensor's name when it stands.

    Raises:
        OutputError: llama.cpp has no architecture, tokenizer or type for this model.
    """
    kind = check_type(kind)
    if "rotation" in getattr(stream.checkpoint.config, "secateur", {}):
        raise OutputError(
            f"a GGUF file cannot hold {stream.checkpoint.source}: its hidden width was sliced, and "
            "llama.cpp has no tensor for the shortcut matrices of its residuals; run it in "
            "transformers, or prune with another --method"
        )
    beside = path.with_name(f".{path.name}.tmp")
    try:
        if kind in OWN_TYPES:
            arch, notes = _write(stream, beside, kind, name, step)
        else:
            whole = path.with_name(f".{path.name}.f32.tmp")
            try:
                arch, notes = _write(stream, whole, "f32", name, step)
                notes += _quantized(whole, beside, path, kind)
            finally:
                whole.unlink(missing_ok=True)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
        notes += _on_zeros(stream.checkpoint.folder)
        size = beside.stat().st_size
        os.replace(beside, path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)
    return Exported(path, arch, size, notes)


def _on_zeros(folder: Path) -> list[str]:
    """That zeros gain nothing here, where the folder's record says that there are any."""
    zeros = zeros_of(record_of(folder))
    if not zeros:
        return []
    return [
        f"its {zeros:,} zeros are stored like all other weights: llama.cpp knows no sparse type, "
        "so the file is as large and as fast as without them"
    ]


def _quantized(whole: Path, beside: Path, path: Path, kind: str) -> list[str]:
    """Let llama.cpp make ``beside``, which is to become ``path``, of ``whole``; return notes."""
    from secateur.outputs.llama_cpp import quantize

    try:
        return quantize(whole, beside, kind)
    except OutputError as error:
        reason = str(error).replace(str(whole), str(path))  # the user has never heard of ``whole``
        raise OutputError(
            f"{reason}; try another --type, or prune with --round-to {QUANT_BLOCK}"
        ) from error


def _write(
    stream: Stream, path: Path, kind: str, name: str | None, step: Callable[[str], None]
) -> tuple[str, list[str]]:
    from gguf import GGUFWriter

    config, size = stream.checkpoint.config, stream.anatomy.head_size
    blocks = gguf_arch.block_widths(stream)
    arch = gguf_arch.choose(config, blocks, size, biased=gguf_arch.is_biased(stream))
    writer = GGUFWriter(path, arch)
    writer.add_type("model")
    writer.add_name((name or Path(stream.checkpoint.source).name).removesuffix(".gguf"))
    table, notes = _describe(writer, arch, stream, blocks)
    writer.add_string("secateur.version", secateur.__version__)
    writer.add_string(CONFIG_KEY, json.dumps(config_values(stream), sort_keys=True))
    writer.add_string(TABLE_KEY, json.dumps([_origin(stream, entry) for entry in table]))
    if training := healed(stream.checkpoint):
        writer.add_string(HEALED_KEY, training)
    types = {entry.name: _type_of(entry, kind) for entry in table}
    notes += _fallbacks(table, types, kind)
    _add_file_type(writer, kind)
    factors = gguf_arch.rope_factors(config, size)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype("float32"),
                               4 * len(factors))  # fmt: skip
    for entry in table:
        _announce(writer, entry, types[entry.name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        if factors is not None:
            file.write(factors.numpy().tobytes())
            writer.write_padding(file, file.tell())
        for entry in table:
            # Mapped, not looped over: a loop's variable would hold a piece, and so the tensor it
            # is a piece of, while the next tensor is read.
            encode = partial(_encode, kind=types[entry.name], entry=entry)
            file.writelines(map(encode, _pieces(stream, entry)))
            writer.write_padding(file, file.tell())
            step(entry.name)
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()
    return arch, notes


def _describe(
    writer: GGUFWriter, arch: str, stream: Stream, blocks: list[Widths]
) -> tuple[list[Entry], list[str]]:
    """Add the keys of model and tokenizer; return the tensors to be, and notes for the user."""
    notes = gguf_arch.add_model_fields(writer, arch, stream, blocks)
    notes += add_tokenizer(
        writer, stream.checkpoint.folder, int(stream.checkpoint.config.vocab_size)
    )
    return list(gguf_arch.entries(stream, arch, blocks)), notes


def config_values(stream: Stream) -> dict[str, Any]:
    """The transformers config as JSON values, without what only its folder needs."""
    values: dict[str, Any] = json.loads(json.dumps(stream.checkpoint.config.to_dict(), default=str))
    for key in ("auto_map", "_name_or_path", "quantization_config", "transformers_version"):
        values.pop(key, None)
    return values


def _origin(stream: Stream, entry: Entry) -> list[Any]:
    """Where a tensor comes from, for reading it back: name, [part, rows], heads."""
    rows = stream.stored_parameters()
    return [entry.name, [[part, len(rows[part])] for part in entry.parts], entry.heads]


def _type_of(entry: Entry, kind: str) -> GGMLQuantizationType:
    """Type of one tensor: vectors float32, embedding and head at least q8_0, narrow rows f16."""
    from gguf import GGMLQuantizationType as Type

    if len(entry.shape) == 1:
        return Type.F32
    if kind in ("f32", "f16", "bf16"):
        return Type[kind.upper()]
    if entry.shape[-1] % QUANT_BLOCK:
        return Type.F16
    if entry.name in ("token_embd.weight", "output.weight"):
        return Type.Q8_0  # every token passes them; four bits there cost more than they save
    return Type[kind.upper()]


def _fallbacks(table: list[Entry], types: dict[str, GGMLQuantizationType], kind: str) -> list[str]:
    """A note for matrices that could not have the type that was asked for."""
    odd = [e for e in table if len(e.shape) > 1 and e.shape[-1] % QUANT_BLOCK]
    if kind in ("f32", "f16", "bf16") or not odd:
        return []
    widths = sorted({entry.shape[-1] for entry in odd})
    return [
        f"{len(odd)} matrices stay f16, since their rows of {', '.join(map(str, widths[:4]))} "
        f"values are no multiple of {QUANT_BLOCK}: prune with --round-to {QUANT_BLOCK} to have "
        f"them in {kind}"
    ]


def _add_file_type(writer: Any, kind: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_file_type(LlamaFileType[name])
    if kind.startswith("q"):
        writer.add_quantization_version(GGML_QUANT_VERSION)


def _announce(writer: Any, entry: Entry, kind: GGMLQuantizationType) -> None:
    """Name, shape and size of a tensor, before any is written."""
    from gguf import GGML_QUANT_SIZES

    values, size = GGML_QUANT_SIZES[kind]
    count = int(np.prod(entry.shape))
    writer.add_tensor_info(
        entry.name, entry.shape, np.dtype("float32"), count // values * size, raw_dtype=kind
    )


def _pieces(stream: Stream, entry: Entry) -> Iterator[torch.Tensor]:
    """The tensor in float32, some rows at a time, in llama.cpp's order."""
    for part in entry.parts:
        yield from _split(stream.read_tensor(part), entry.heads)


def _split(tensor: torch.Tensor, heads: int) -> Iterator[torch.Tensor]:
    if heads:
        tensor = interleave(tensor, heads)
    rows = max(1, VALUES_AT_ONCE // max(1, tensor[0].numel()))
    for piece in tensor.split(rows):
        yield piece.float()


def _encode(piece: torch.Tensor, kind: GGMLQuantizationType, entry: Entry) -> bytes:
    """Values as the bytes of the type.

    Raises:
        OutputError: they do not fit: float16 ends at 65504.
    """
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import quantize

    values = np.ascontiguousarray(piece.numpy())
    if kind not in (Type.F32, Type.BF16) and values.size and np.abs(values).max() > 65504:
        raise OutputError(
            f"tensor {entry.name} has weights too large for {kind.name.lower()}: write --type "
            "bf16 or f32"
        )
    encoded: bytes = quantize(values, kind).tobytes()
    return encoded
