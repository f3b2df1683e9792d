"""Group-wise quantisation with adapters that fold into the zero points (our reading of SAAP).

Every weight matrix W (p, q) is cut into groups of L columns. Row i of group g has a scale s_ig and
a zero point z_ig, both float16, and codes c from 0 to 2^b - 1:

    W^_ij = s_ig c_ij + z_ig,    s_ig = (max - min) / (2^b - 1),  z_ig = min   (of row i, group g)

While it is trained the layer adds a low-rank adapter that sees one number per group, the sum of its
inputs over sqrt(L), as in QA-LoRA (Xu et al., ICLR 2024, where it is their mean):

    y = W^ x + t B A P x,    P (G, q),  P_gj = 1 / sqrt(L) if column j is in group g, else 0

(B A P)_ij = (B A)_{i,g(j)} / sqrt(L) is the same for all columns of a group, which is what a zero
point is. So the adapter disappears into them, exactly:

    z'_ig = z_ig + t (B A)_ig / sqrt(L),    W'_ij = s_ig c_ij + z'_ig
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.anatomy import Anatomy
from secateur.recovery.linears import open_linears, put
from secateur.recovery.settings import SCALING, HealSettings
from secateur.streaming import Stream

#: Columns of a block in llama.cpp's simple types, and those that hold a scale and a least value.
GGUF_BLOCK = 32
EXACT = {4: "q4_1", 5: "q5_1"}


@dataclass(frozen=True)
class Groups:
    """A quantised matrix. The last group is shorter where L does not divide q.

    Attributes:
        codes: (p, q) uint8.
        scales, zeros: (p, G) float32, with values that float16 holds.
        size: columns of a group, L.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    size: int

    def shifted(self, shift: torch.Tensor) -> torch.Tensor:
        """Zero points that have moved by ``shift`` (p, G), float16 values again."""
        return _held_by_half(self.zeros + shift)

    def weight(self, zeros: torch.Tensor | None = None) -> torch.Tensor:
        """The matrix that this stands for, (p, q) float32."""
        width = self.codes.shape[1]
        zeros = self.zeros if zeros is None else zeros
        scales, zeros = (spread(t, self.size, width) for t in (self.scales, zeros))
        return scales * self.codes.float() + zeros


def quantise(weight: torch.Tensor, *, bits: int, size: int) -> Groups:
    """Min-max quantisation of each row of each group of ``size`` columns; weight (p, q)."""
    rows, width = weight.shape
    groups = -(-width // size)
    # The last value fills up a short group: it changes neither its largest nor its least value.
    padded = nn.functional.pad(weight.float()[None], (0, groups * size - width), mode="replicate")
    parts = padded[0].view(rows, groups, size)
    least, largest = parts.amin(-1), parts.amax(-1)
    top = 2**bits - 1
    scales, zeros = _held_by_half((largest - least) / top), _held_by_half(least)
    # A group whose values are all one has the scale 0, and nothing to divide.
    divisors = spread(torch.where(scales == 0, 1.0, scales), size, width)
    codes = ((weight.float() - spread(zeros, size, width)) / divisors).round().clamp(0, top)
    return Groups(codes.to(torch.uint8), scales, zeros, size)


def spread(values: torch.Tensor, size: int, width: int) -> torch.Tensor:
    """(p, G) to (p, q): each value for all columns of its group."""
    return values.repeat_interleave(size, dim=1)[:, :width]


def _held_by_half(values: torch.Tensor) -> torch.Tensor:
    return values.half().float()


class GroupedLinear(nn.Module):
    """A quantised linear layer with an adapter on the sums of its groups of inputs.

    Args:
        linear: the layer; its weight is replaced by the quantised one.
        bits, size: of the groups.
        rank: of the adapter.
        generator: draws A; B is zero.
    """

    def __init__(
        self, linear: nn.Linear, *, bits: int, size: int, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.groups = quantise(linear.weight.detach().cpu(), bits=bits, size=size)
        device, dtype = linear.weight.device, linear.weight.dtype
        linear.weight = nn.Parameter(self.groups.weight().to(device, dtype), requires_grad=False)
        self.linear = linear
        rows, groups = self.groups.scales.shape
        a = torch.empty(rank, groups)
        # As LoRA's A: variance 1 / (3 G), with G inputs.
        a.uniform_(-1 / math.sqrt(groups), 1 / math.sqrt(groups), generator=generator)
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y + SCALING * (self.pooled(x) @ self.a.T @ self.b.T).to(y.dtype)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """P x: (..., q) to (..., G) float32."""
        size, groups = self.groups.size, self.a.shape[1]
        full = nn.functional.pad(x.float(), (0, groups * size - x.shape[-1]))
        return full.unflatten(-1, (groups, size)).sum(-1) / math.sqrt(size)

    def shift(self) -> torch.Tensor:
        """What the adapter moves each zero point by, (p, G) float32."""
        moved = SCALING * (self.b @ self.a) / math.sqrt(self.groups.size)
        return moved.detach().cpu()

    def folded(self) -> torch.Tensor:
        """The plain quantised matrix with the adapter in its zero points, (p, q) float32."""
        return self.groups.weight(self.groups.shifted(self.shift()))


class Groupwise:
    """Grouped layers in the place of the decoder's linear layers.

    See :class:`~secateur.recovery.healing.Adapters`.
    """

    def __init__(self, model: Any, anatomy: Anatomy, settings: HealSettings) -> None:
        assert settings.bits is not None
        assert settings.group is not None
        blocks = model.get_submodule(anatomy.family.blocks)
        generator = torch.Generator().manual_seed(settings.seed)
        self._layers: dict[str, GroupedLinear] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, linear in open_linears(model, anatomy).items():
            layer = GroupedLinear(
                linear,
                bits=settings.bits,
                size=settings.group,
                rank=settings.rank,
                generator=generator,
            )
            put(blocks, name, layer)
            self._layers[name] = layer
            self.parameters |= {f"{name}.a": layer.a, f"{name}.b": layer.b}

    def merged(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """s c + z' in float32, (p, q); what was stored is in the codes already."""
        return self._layers[name].folded()

    @property
    def names(self) -> list[str]:
        return list(self._layers)


def stored_form(bits: int | None, size: int | None, dtype: str = "auto") -> str:
    """How a file holds these weights with so many bits, for the card; empty where none does.

    Args:
        dtype: that was asked for; in float32, which auto is, no digit is lost.
    """
    if bits is None:
        return ""
    kind = EXACT.get(bits)
    if kind is not None and size == GGUF_BLOCK and dtype in ("auto", "float32"):
        return f"""
Its decoder weights are {bits}-bit numbers written out, so that a file of that size holds the very
same ones: `secateur export FOLDER --out model.gguf --type {kind}`
"""
    return f"""
Its decoder weights are {bits}-bit numbers written out: `secateur export` with
`--type {kind or "q8_0"}` comes near them, but is not the same.
"""


def poor_rows(stream: Stream) -> list[str]:
    """A note on layers whose rows a quantised file cannot hold in whole blocks."""
    anatomy = stream.anatomy
    names = {f".{path}.weight" for path in anatomy.denses}
    widths = [
        parameter.shape[1]
        for name, parameter in stream.stored_parameters().items()
        if name.startswith(anatomy.family.blocks + ".")
        and any(name.endswith(ending) for ending in names)
    ]
    odd = sorted({width for width in widths if width % GGUF_BLOCK})
    if not odd:
        return []
    count = sum(width in odd for width in widths)
    return [
        f"{count} of {len(widths)} layers have rows of {', '.join(map(str, odd[:4]))} weights, "
        f"no multiple of {GGUF_BLOCK}: a GGUF file holds those as f16; prune with --round-to "
        f"{GGUF_BLOCK} to have them quantised there too"
    ]
