"""A matrix with many zeros as a bit for each value and the values that are not zero.

Three tensors stand in the file for NAME: ``NAME.bitmask`` (rows, inputs / 8 rounded up) uint8, the
lowest bit first; ``NAME.compressed``, the other values row by row; ``NAME.shape``, two int64. These
are the names and the order of bits of the sparse-bitmask format of compressed-tensors, which calls
it legacy and neither writes nor reads it any more (0.20); nothing else stores zeros either.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from secateur.errors import SourceError

PARTS = ("bitmask", "compressed", "shape")
#: Model type in a packed folder's config. transformers would open a known one with random weights
#: in the place of those that it does not find; this one it refuses.
PACKED_TYPE = "secateur-packed"
#: Where the config keeps the type that it is of.
TYPE_KEY = "packed_model_type"


def worth_packing(tensor: torch.Tensor) -> bool:
    """Whether the packed form takes fewer bytes."""
    if tensor.ndim != 2 or not tensor.is_floating_point():
        return False
    zeros = int((tensor == 0).sum())
    mask = tensor.shape[0] * -(-tensor.shape[1] // 8) + 16
    return zeros * tensor.element_size() > mask


def pack(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three tensors that stand for ``tensor``, (rows, inputs)."""
    kept = tensor != 0
    bits = np.packbits(kept.cpu().numpy(), axis=1, bitorder="little")
    return {
        f"{name}.bitmask": torch.from_numpy(bits),
        f"{name}.compressed": tensor[kept],
        f"{name}.shape": torch.tensor(tensor.shape),
    }


def unpack(name: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """The matrix of three tensors, by the last part of their names.

    Raises:
        SourceError: mask and values do not belong together.
    """
    bits = np.unpackbits(parts["bitmask"].numpy(), axis=1, count=shape[1], bitorder="little")
    kept = torch.from_numpy(bits).bool()
    values = parts["compressed"]
    if int(kept.sum()) != len(values):
        raise SourceError(
            f"tensor {name} is damaged: its mask keeps {int(kept.sum()):,} values, its file has "
            f"{len(values):,}; pack the model again"
        )
    full = torch.zeros(shape, dtype=values.dtype)
    full[kept] = values
    return full


def packed_shape(
    name: str, mask: tuple[int, ...], shape: tuple[int, ...], values: tuple[int, ...]
) -> None:
    """Whether the three parts can belong together, by their shapes alone.

    Args:
        mask, values: shapes of the stored mask and values.
        shape: of the matrix, as the file says.

    Raises:
        SourceError: they cannot, so that nothing is allocated by a forged shape.
    """
    fits = len(shape) == 2 and len(mask) == 2 and len(values) == 1 and min(shape) > 0
    if not fits or mask != (shape[0], -(-shape[1] // 8)) or values[0] > shape[0] * shape[1]:
        raise SourceError(
            f"tensor {name} is damaged: shape {list(shape)}, mask {list(mask)} and values "
            f"{list(values)} do not belong together; pack the model again"
        )
