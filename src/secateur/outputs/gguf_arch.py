"""Which llama.cpp architecture can hold a model, under which names and keys.

llama.cpp has no notion of "LLaMA with other widths in each block", but two of its architectures
read widths per block: ``deci`` (any LLaMA, Mistral or Qwen2 shape) and ``openelm`` (Qwen3 shapes,
head tied to the embedding). A model whose blocks are all alike goes under its own name. What
llama.cpp would refuse, or worse, compute otherwise, is refused here with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from secateur.errors import OutputError
from secateur.modules import MODEL_TYPE_PREFIX, SlicedLinear
from secateur.plans import Widths

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from secateur.streaming import Stream


@dataclass(frozen=True)
class Home:
    """Architectures of one model type: with one width for all blocks, and with many."""

    uniform: str
    per_layer: str | None


HOMES = {
    "llama": Home("llama", "deci"),
    "mistral": Home("llama", "deci"),
    "qwen2": Home("qwen2", "deci"),
    "qwen3": Home("qwen3", "openelm"),
    "smollm3": Home("smollm3", None),
    "granite": Home("granite", None),
}
#: Architectures that rotate neighboring rows of a head, where transformers rotates its two halves.
INTERLEAVED = {"llama", "deci", "smollm3", "granite"}
#: Architectures that take a bias in every layer; others none, or only of queries, keys and values.
BIASED = {"llama", "deci", "granite"}
#: Architectures that read a divisor for each rotary frequency, as the scaling llama3 needs.
FREQUENCY_FACTORS = {"llama", "deci", "granite"}
#: What llama.cpp takes for settings of the rotary scaling yarn that a file has no place for.
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: in the file.
        parts: names in the transformers model; the rows of several are stacked.
        shape: rows and columns, or the length of a vector.
        heads: number of heads whose rows go into the interleaved order; 0: as they are.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    heads: int = 0


def block_widths(stream: Stream) -> list[Widths]:
    """Heads and neurons of every block of an opened model.

    Raises:
        OutputError: a layer reads or writes through an index, as ``--structure inputs`` leaves it.
    """
    anatomy = stream.anatomy
    attention, ffn = (anatomy.coupling(kind) for kind in ("values", "neurons"))
    found = []
    blocks = stream.model.get_submodule(anatomy.family.blocks)
    for number, block in enumerate(blocks):
        for name in anatomy.denses:
            layer = block.get_submodule(name)
            if isinstance(layer, SlicedLinear):
                raise OutputError(
                    f"block {number} cannot be held by llama.cpp: its {name} reads or writes "
                    f"through an index ({layer.extra_repr()}); prune the original with "
                    "--structure coupled, which removes whole neurons and KV groups"
                )
        rows = {name: block.get_submodule(name).weight.shape[0] for name in anatomy.denses}
        found.append(
            Widths(
                rows[attention.queries[0]] // anatomy.head_size,
                rows[attention.keys[0]] // anatomy.head_size,
                rows[ffn.producers[0]],
            )
        )
    return found


def choose(config: Any, blocks: Sequence[Widths], head_size: int, *, biased: bool = False) -> str:
    """The architecture that holds these blocks.

    Args:
        config: of the model in transformers.
        biased: whether layers besides queries, keys and values have a bias.

    Raises:
        OutputError: there is none; the line says what is in the way and which flag removes it.
    """
    base = str(config.model_type).removeprefix(MODEL_TYPE_PREFIX)
    home = home_of(base)
    if len(set(blocks)) == 1:
        # qwen2 derives the size of a head from the hidden width, and reads no frequency factors
        # and no other biases.
        plain = blocks[0].query_heads * head_size == config.hidden_size and not biased
        if home.uniform == "qwen2" and not (plain and _rope_type(config) != "llama3"):
            return "deci"
        return home.uniform
    what = _differences(blocks)
    if home.per_layer is None:
        raise OutputError(
            f"llama.cpp cannot hold this model: {what}, but its architecture {home.uniform} for "
            f"{base} has one width for all blocks; prune the original with --layout uniform"
        )
    if home.per_layer == "openelm" and not config.tie_word_embeddings:
        raise OutputError(
            f"llama.cpp cannot hold this model: {what}, and openelm, its only architecture for "
            f"{base} blocks of different widths, has no head of its own, which this model has; "
            "prune the original with --layout uniform"
        )
    return home.per_layer


def home_of(model_type: str) -> Home:
    """The architectures of a model type.

    Raises:
        OutputError: llama.cpp has none that we write.
    """
    if model_type not in HOMES:
        why = (
            "llama.cpp has no architecture for OPT (learned positions, ReLU, LayerNorm)"
            if model_type == "opt"
            else f"no llama.cpp architecture is known here for model type {model_type}"
        )
        raise OutputError(
            f"{why}: GGUF can be written of {', '.join(HOMES)}; for this model give --out a folder "
            "name, which transformers opens"
        )
    return HOMES[model_type]


def without_new_biases(model_type: str, *, per_layer: bool) -> str:
    """The architecture of this layout if it has no place for biases in all layers, else nothing."""
    home = home_of(model_type)
    arch = home.per_layer if per_layer else home.uniform
    arch = "deci" if arch == "qwen2" else arch
    return "" if arch is None or arch in BIASED else arch


def is_biased(stream: Stream) -> bool:
    """Whether layers besides queries, keys and values have a bias."""
    attention = stream.anatomy.coupling("values")
    usual = (*attention.queries, *attention.keys, *attention.producers)
    names = [name.removesuffix(".bias") for name in stream.stored_parameters() if ".bias" in name]
    return any(not name.endswith(usual) for name in names)


def _differences(blocks: Sequence[Widths]) -> str:
    def span(values: list[int]) -> str:
        return f"{min(values)} to {max(values)}"

    found = []
    if len({w.ffn for w in blocks}) > 1:
        found.append(f"FFN widths of {span([w.ffn for w in blocks])}")
    if len({w.kv_groups for w in blocks}) > 1:
        found.append(f"{span([w.kv_groups for w in blocks])} KV groups")
    return "its blocks have " + " and ".join(found or ["different numbers of query heads"])


def entries(stream: Stream, arch: str, blocks: Sequence[Widths]) -> Iterator[Entry]:
    """Every tensor of the file, in the order in which it is written.

    Raises:
        OutputError: the model has a tensor that this architecture has no place for.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(k for k, name in MODEL_ARCH_NAMES.items() if name == arch)
    table = get_tensor_name_map(MODEL_ARCH(kind), len(blocks))
    anatomy = stream.anatomy
    attention = anatomy.coupling("values")
    query, key, value = attention.queries[0], attention.keys[0], attention.producers[0]
    prefix = anatomy.family.blocks + "."
    shapes = {name: tuple(p.shape) for name, p in stream.stored_parameters().items()}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        heads = 0
        if name.startswith(prefix):
            number, _, inner = path.removeprefix(prefix).partition(".")
            fused = arch == "openelm" and inner in (query, key, value)
            if leaf == "bias" and (
                fused or (arch not in BIASED and inner not in (query, key, value))
            ):
                raise _no_place(arch, name)
            if fused:
                if inner == query:
                    parts = tuple(f"{prefix}{number}.{n}.weight" for n in (query, key, value))
                    rows = sum(shapes[part][0] for part in parts)
                    yield Entry(f"blk.{number}.attn_qkv.weight", parts, (rows, shape[1]))
                continue
            width = blocks[int(number)]
            _check_rows(name, shape, _expected_rows(stream, inner, width))
            if arch in INTERLEAVED and inner in (query, key):
                heads = width.query_heads if inner == query else width.kv_groups
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise _no_place(arch, name)
        yield Entry(stored, (name,), shape, heads)


def _expected_rows(stream: Stream, inner: str, width: Widths) -> int | None:
    anatomy = stream.anatomy
    attention, ffn = anatomy.coupling("values"), anatomy.coupling("neurons")
    if inner in attention.queries:
        return width.query_heads * anatomy.head_size
    if inner in (*attention.keys, *attention.producers):
        return width.kv_groups * anatomy.head_size
    return width.ffn if inner in ffn.producers else None


def _check_rows(name: str, shape: tuple[int, ...], rows: int | None) -> None:
    if rows is not None and shape[0] != rows:
        raise OutputError(f"tensor {name} has {shape[0]} rows, the widths of its block say {rows}")


def _no_place(arch: str, name: str) -> OutputError:
    return OutputError(
        f"llama.cpp's architecture {arch} has no place for tensor {name}: write a Hugging Face "
        "folder instead"
    )


def add_model_fields(
    writer: GGUFWriter, arch: str, stream: Stream, blocks: Sequence[Widths]
) -> list[str]:
    """Write the keys that describe the model; return notes for the user.

    Raises:
        OutputError: the config asks for something that the architecture cannot do.
    """
    config, size = stream.checkpoint.config, stream.anatomy.head_size
    notes = []
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise OutputError(
            f"llama.cpp's architecture {arch} computes silu in its FFN, this model {activation}: "
            "write a Hugging Face folder instead"
        )
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < context:
        notes.append(
            f"llama.cpp's architecture {arch} knows no sliding window: the context ends at the "
            f"window's {window} tokens, up to which both are the same"
        )
        context = int(window)
    writer.add_context_length(context)
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(len(blocks))
    one = len(set(blocks)) == 1 and arch != "openelm"  # which wants arrays always
    writer.add_feed_forward_length(blocks[0].ffn if one else [w.ffn for w in blocks])
    writer.add_head_count(blocks[0].query_heads if one else [w.query_heads for w in blocks])
    writer.add_head_count_kv(blocks[0].kv_groups if one else [w.kv_groups for w in blocks])
    # Never left to be derived: hidden width / heads is no head size once heads have gone.
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(int(config.vocab_size))
    _add_rope(writer, arch, config, size)
    if arch == "granite":
        writer.add_attention_scale(float(config.attention_multiplier))
        writer.add_residual_scale(float(config.residual_multiplier))
        writer.add_embedding_scale(float(config.embedding_multiplier))
        writer.add_logit_scale(float(config.logits_scaling))
    if arch == "smollm3":
        places = [i for i, rope in enumerate(config.no_rope_layers) if not rope]
        if places != [i for i in range(len(blocks)) if (i + 1) % 4 == 0]:
            raise OutputError(
                "llama.cpp's architecture smollm3 leaves positions out in every fourth block, "
                f"this model in blocks {', '.join(map(str, places)) or '(none)'}: if removing "
                "whole blocks moved them, prune the original with --layers 0, else write a Hugging "
                "Face folder instead"
            )
    return notes


def _add_rope(writer: GGUFWriter, arch: str, config: Any, size: int) -> None:
    from gguf import RopeScalingType

    rope, kind = dict(config.rope_parameters), _rope_type(config)
    share = float(rope.get("partial_rotary_factor") or 1.0)
    if share != 1.0:
        raise OutputError(
            f"llama.cpp's architecture {arch} rotates whole heads, this model {share:g} of each "
            "(partial_rotary_factor): write a Hugging Face folder instead"
        )
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        factor = float(rope["factor"])
        usual = {**YARN, "attention_factor": 0.1 * math.log(factor) + 1}
        odd = [name for name in usual if rope.get(name) not in (None, usual[name])]
        if odd:
            raise OutputError(
                f"rotary scaling yarn with {', '.join(f'{n} {rope[n]}' for n in odd)} cannot be "
                "written to GGUF, which has no place for that: write a Hugging Face folder instead"
            )
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
    elif kind == "llama3" and arch not in FREQUENCY_FACTORS:
        raise OutputError(
            f"llama.cpp's architecture {arch} ignores the rotary scaling llama3, which this model "
            "has: write a Hugging Face folder instead"
        )
    elif kind not in ("default", "llama3"):
        raise OutputError(
            f"rotary scaling {kind} cannot be written to GGUF: allowed are default, linear, "
            "llama3 and yarn; write a Hugging Face folder instead"
        )


def _rope_type(config: Any) -> str:
    return str(config.rope_parameters.get("rope_type", "default"))


def rope_factors(config: Any, head_size: int) -> torch.Tensor | None:
    """Divisors of the rotary frequencies (head size / 2,), for scalings that have one each."""
    if _rope_type(config) != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    theta = float(config.rope_parameters["rope_theta"])
    places = torch.arange(0, head_size, 2, dtype=torch.float64)
    plain = torch.exp(-math.log(theta) * places / head_size)
    return (plain / scaled.double()).float()
