"""The residual stream of one model: what writes into it, what reads it, through which norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secateur.anatomy.describe import Anatomy
from secateur.errors import FamilyError


@dataclass(frozen=True)
class StreamStage:
    """One addition to the stream, with the linear layers that the family's signals stand for.

    Attributes:
        norm: path inside the block.
        readers: linear layers that read the normed stream.
        writers: linear layers whose outputs are added to the stream.
        branches: chains of modules between the two.
    """

    norm: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    branches: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ResidualStream:
    """The stream of one model and all that hangs on its width.

    Attributes:
        width: d, of the original.
        stages: additions of one block, in order.
        attention: module of the block that takes masks, positions and the cache.
        sources: what the stream starts as the sum of, by path: rows of an embedding (V, d), or
            inputs of a linear layer without bias (d, e); in both cases the number beside d.
        embeddings: those sources that are embeddings.
        norm: the norm behind the last block.
        reader: the linear layer behind that norm; ``reader_rows`` of them, ``reader_bias``.
        centred: whether the norms take the mean off (LayerNorm); what they read may then be kept
            free of it.
        norm_weight, norm_bias: whether the norms have these.
        tied: the source whose weight is also the reader's, if one is.
    """

    width: int
    stages: tuple[StreamStage, ...]
    attention: str
    sources: dict[str, int]
    embeddings: frozenset[str]
    norm: str
    reader: str
    reader_rows: int
    reader_bias: bool
    centred: bool
    norm_weight: bool
    norm_bias: bool
    tied: str | None


def describe_residual(model: Any, anatomy: Anatomy) -> ResidualStream:
    """Read the stream's parts off ``model``, which may be on the meta device.

    Raises:
        FamilyError: the family's table has no stream, or this model's norms stand behind what they
            belong to, so that nothing can be folded into what follows them.
    """
    from torch import nn

    family, config = anatomy.family, model.config
    named = f"model type {anatomy.model_type}"
    if family.residual is None:
        raise FamilyError(
            f"{named} has no residual stream described, which slicing the hidden width needs: fill "
            "its entry residual in secateur/anatomy/families.py, or use another --method"
        )
    table = family.residual
    norm = _first(model, (table.norm,))
    if norm is None or not reads_normed(config):
        raise FamilyError(
            f"this {anatomy.model_type} model has its norms behind attention and FFN, or none at "
            "its end, so that the stream between them cannot be rotated: use another --method"
        )
    last = model.get_submodule(norm)
    sources = [path for choice in table.sources if (path := _first(model, choice)) is not None]
    reader = _first(model, table.reader)
    assert reader is not None
    ends: dict[str, Any] = {path: model.get_submodule(path) for path in (*sources, reader)}
    weights = {path: end.weight for path, end in ends.items()}
    embeddings = {path for path in sources if isinstance(ends[path], nn.Embedding)}
    tied = [{target, origin} for target, origin in model.all_tied_weights_keys.items()]
    return ResidualStream(
        width=int(config.hidden_size),
        stages=tuple(
            StreamStage(
                stage.norm,
                tuple(n for n, d in anatomy.denses.items() if d.reads in stage.reads),
                tuple(n for n, d in anatomy.denses.items() if d.reads in stage.writes),
                stage.branches,
            )
            for stage in table.stages
        ),
        attention=table.attention,
        sources={
            path: int(weights[path].shape[0 if path in embeddings else 1]) for path in sources
        },
        embeddings=frozenset(embeddings),
        norm=norm,
        reader=reader,
        reader_rows=int(weights[reader].shape[0]),
        reader_bias=ends[reader].bias is not None,
        centred=isinstance(last, nn.LayerNorm),
        norm_weight=getattr(last, "weight", None) is not None,
        norm_bias=getattr(last, "bias", None) is not None,
        tied=next((p for p in sources if {f"{p}.weight", f"{reader}.weight"} in tied), None),
    )


def reads_normed(config: Any) -> bool:
    """Whether everything that reads the hidden state divides it by its size first."""
    return bool(getattr(config, "do_layer_norm_before", True))


def _first(model: Any, paths: tuple[str, ...]) -> str | None:
    """The first of ``paths`` at which the model has a module."""
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        if getattr(model.get_submodule(parent), leaf, None) is not None:
            return path
    return None
