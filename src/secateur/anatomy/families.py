"""The table of families. To add one, add an entry to :data:`FAMILIES`; no code is needed.

Paths are those of the transformers classes. Every path is checked against the model itself when it
is opened, so an entry that does not fit says so at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Dense:
    """One linear layer of a block.

    Attributes:
        path: path inside the block, such as ``self_attn.q_proj``.
        reads: name of the signal it reads. Layers that read the same signal share its statistics:
            ``attention`` and ``ffn`` are the normed residual stream, ``heads`` is the joined
            output of the attention heads, ``neurons`` the activations inside the FFN.
    """

    path: str
    reads: Literal["attention", "heads", "ffn", "neurons"]


@dataclass(frozen=True)
class Coupling:
    """Rows of some layers that exist only to feed the inputs of another.

    Attributes:
        consumer: the layer whose inputs they feed.
        producers: the layers whose rows do.
        kind: ``neurons``: input j is made by row j of every producer, and by nothing else.
            ``values``: input j = (query head h, dimension d) is made by row (group of h, d) of the
            value projection; the row is needed while any query head of its group is read there.
        queries, keys: with ``values``, the layers whose rows go when a whole KV group goes: those
            of its query heads, and those of the group itself.
    """

    consumer: str
    producers: tuple[str, ...]
    kind: Literal["neurons", "values"]
    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer that a cut of whole units touches."""
        return (*self.queries, *self.keys, *self.producers, self.consumer)


@dataclass(frozen=True)
class Stage:
    """One addition to the residual stream inside a block: x + f(norm(x)).

    Attributes:
        norm: path of the norm, inside the block.
        reads: signals that the normed stream is, as in :attr:`Dense.reads`.
        writes: signals whose readers put out what is added.
        branches: what is added, each a chain of modules of the block; several branches where
            attention and FFN stand side by side.
    """

    norm: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    branches: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Residual:
    """Where the residual stream of a pre-norm decoder begins, is added to, and ends.

    Paths outside blocks are alternatives, of which the first that the model has counts.

    Attributes:
        sources: what the stream is the sum of in front of the first block.
        stages: the additions of one block, in order.
        attention: module of the block that is handed masks, positions and the cache.
        norm: the norm behind the last block.
        reader: the linear layer that reads what that norm puts out.
    """

    sources: tuple[tuple[str, ...], ...]
    stages: tuple[Stage, ...]
    norm: str
    reader: tuple[str, ...]
    attention: str = "self_attn"


@dataclass(frozen=True)
class Family:
    """Names of the parts of one family of decoders.

    Attributes:
        name: for messages.
        model_types: the ``model_type`` values that it describes.
        blocks: path of the list of blocks inside the ``...ForCausalLM`` class.
        denses: the linear layers of a block, in the order in which data passes them.
        couplings: rows that die with the inputs they feed.
        ffn_width: config key of the FFN width.
        heads, kv_heads: config keys of the numbers of query heads and of KV groups.
        head_size: config key that frees the head size from hidden width / heads; None where the
            class has no such key, so that the number of heads cannot change in the stock class.
        per_layer: config keys that hold a list with one entry a block.
        residual: the residual stream, where its width can be cut.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    denses: tuple[Dense, ...]
    couplings: tuple[Coupling, ...]
    ffn_width: str = "intermediate_size"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_size: str | None = "head_dim"
    per_layer: tuple[str, ...] = ("layer_types",)
    residual: Residual | None = None


FAMILIES: tuple[Family, ...] = (
    Family(
        name="LLaMA",  # pre-norm, gated FFN; grouped query heads; Qwen adds biases or QK-norm
        model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"),
        blocks="model.layers",
        denses=(
            Dense("self_attn.q_proj", "attention"),
            Dense("self_attn.k_proj", "attention"),
            Dense("self_attn.v_proj", "attention"),
            Dense("self_attn.o_proj", "heads"),
            Dense("mlp.gate_proj", "ffn"),
            Dense("mlp.up_proj", "ffn"),
            Dense("mlp.down_proj", "neurons"),
        ),
        couplings=(
            Coupling(
                "self_attn.o_proj",
                ("self_attn.v_proj",),
                "values",
                queries=("self_attn.q_proj",),
                keys=("self_attn.k_proj",),
            ),
            Coupling("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj"), "neurons"),
        ),
        per_layer=("layer_types", "no_rope_layers"),
        residual=Residual(
            sources=(("model.embed_tokens",),),
            stages=(
                Stage("input_layernorm", ("attention",), ("heads",), (("self_attn",),)),
                Stage("post_attention_layernorm", ("ffn",), ("neurons",), (("mlp",),)),
            ),
            norm="model.norm",
            reader=("lm_head",),
        ),
    ),
    Family(
        name="OPT",  # LayerNorm, biases everywhere, plain ReLU FFN, learned positions
        model_types=("opt",),
        blocks="model.decoder.layers",
        denses=(
            Dense("self_attn.q_proj", "attention"),
            Dense("self_attn.k_proj", "attention"),
            Dense("self_attn.v_proj", "attention"),
            Dense("self_attn.out_proj", "heads"),
            Dense("fc1", "ffn"),
            Dense("fc2", "neurons"),
        ),
        couplings=(
            Coupling(
                "self_attn.out_proj",
                ("self_attn.v_proj",),
                "values",
                queries=("self_attn.q_proj",),
                keys=("self_attn.k_proj",),
            ),
            Coupling("fc2", ("fc1",), "neurons"),
        ),
        ffn_width="ffn_dim",
        kv_heads="num_attention_heads",
        head_size=None,
        per_layer=(),
        residual=Residual(
            sources=(
                ("model.decoder.project_in", "model.decoder.embed_tokens"),
                ("model.decoder.embed_positions",),
            ),
            stages=(
                Stage("self_attn_layer_norm", ("attention",), ("heads",), (("self_attn",),)),
                Stage(
                    "final_layer_norm", ("ffn",), ("neurons",), (("fc1", "activation_fn", "fc2"),)
                ),
            ),
            norm="model.decoder.final_layer_norm",
            reader=("model.decoder.project_out", "lm_head"),
        ),
    ),
)
