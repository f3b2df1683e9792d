"""The table of families. To add one, add an entry to :data:`FAMILIES`; no code is needed.

Paths are those of the transformers classes. Every path is checked against the model itself when it
is opened, so an entry that does not fit says so at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

#: How rows of a tensor follow one another: one for each input of the consumer, one for each unit
#: (a head of several inputs), and rows that hang on neither.
Span = Literal["inputs", "units", "rest"]


@dataclass(frozen=True)
class Dense:
    """One linear layer of a block.

    Attributes:
        path: path inside the block, such as ``self_attn.q_proj``.
        reads: name of the signal it reads. Layers that read the same signal share its statistics:
            ``attention``, ``ffn`` and ``mixer`` are the normed residual stream, ``heads`` is the
            joined output of the heads, ``neurons`` the activations inside the FFN or the gated
            inner channels of a Mamba mixer, ``scan`` these channels in front of the scan, ``steps``
            what its time steps are made of.
        behind: where the class multiplies by the weight without calling the layer, so that
            nothing passes its entry: the layer whose first outputs are its inputs.
    """

    path: str
    reads: Literal["attention", "heads", "ffn", "neurons", "mixer", "scan", "steps"]
    behind: str | None = None


@dataclass(frozen=True)
class Coupling:
    """Rows of some layers that exist only to feed the inputs of another.

    Attributes:
        consumer: the layer whose inputs they feed.
        producers: the layers whose rows do.
        kind: ``neurons``: input j is made by row j of every producer, and by nothing else.
            ``values``: input j = (query head h, dimension d) is made by row (group of h, d) of the
            value projection; the row is needed while any query head of its group is read there.
            ``steps``: as ``neurons``, of what is too little to be a unit of its own.
        queries, keys: with ``values``, the layers whose rows go when a whole KV group goes: those
            of its query heads, and those of the group itself.
        readers: other layers that read what the producers make; rows are dead only where these
            lose the same inputs.
        tensors: tensors that belong to no linear layer and whose rows go along, where the model
            has them.
        layout: how the rows of a producer or of one of ``tensors`` follow one another, where it is
            not one row for each input.
        norm: the one of ``tensors`` that is the weight of a norm over all inputs at once. It mixes
            them, so rows die with whole units alone; and it takes the mean of squares over fewer,
            which its weight and its epsilon have to make up for.
    """

    consumer: str
    producers: tuple[str, ...]
    kind: Literal["neurons", "values", "steps"]
    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    layout: Mapping[str, tuple[Span, ...]] = field(default_factory=dict, hash=False)
    norm: str | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Every linear layer that a cut of whole units touches."""
        return (*self.queries, *self.keys, *self.producers, *self.readers, self.consumer)

    @property
    def fed(self) -> tuple[str, ...]:
        """The layers whose inputs the units are."""
        return (self.consumer, *self.readers)


@dataclass(frozen=True)
class Count:
    """A number that a module of the block has noted, and that changes with its tensors.

    Attributes:
        path: of the attribute, inside the block.
        tensor, dim: the tensor that is as long as this in that dimension.
    """

    path: str
    tensor: str
    dim: int = 0


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
        ffn_width: config key of the FFN width, or of the number of inner channels; None where the
            class has no such key.
        heads, kv_heads: config keys of the numbers of query heads and of KV groups; heads of None:
            there are none.
        scan_groups: config key of the number of groups in which heads of a mixer share B and C;
            heads go one by one only where it is 1.
        counts: what modules of a block note of their own sizes.
        states: the tensor with a number for each state that a scan keeps of every token.
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
    ffn_width: str | None = "intermediate_size"
    heads: str | None = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    scan_groups: str | None = None
    counts: tuple[Count, ...] = ()
    states: str | None = None
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
    Family(
        name="Mamba",  # no attention and no FFN: a convolution and a selective scan (2312.00752)
        model_types=("mamba",),
        blocks="backbone.layers",
        denses=(
            Dense("mixer.in_proj", "mixer"),
            Dense("mixer.x_proj", "scan"),
            Dense("mixer.dt_proj", "steps", behind="mixer.x_proj"),
            Dense("mixer.out_proj", "neurons"),
        ),
        couplings=(
            Coupling(
                "mixer.out_proj",
                ("mixer.in_proj", "mixer.dt_proj"),
                "neurons",
                readers=("mixer.x_proj",),
                tensors=("mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.A_log", "mixer.D"),
                layout={"mixer.in_proj": ("inputs", "inputs")},  # what is scanned, and its gate
            ),
            Coupling(
                "mixer.dt_proj",
                ("mixer.x_proj",),
                "steps",
                layout={"mixer.x_proj": ("inputs", "rest")},  # time steps, then B and C
            ),
        ),
        heads=None,
        head_size=None,
        per_layer=(),
        counts=(
            Count("mixer.intermediate_size", "mixer.D"),
            Count("mixer.time_step_rank", "mixer.dt_proj.weight", dim=1),
        ),
        states="mixer.A_log",
    ),
    Family(
        name="Mamba-2",  # heads that share a decay, B and C; a norm behind the scan (2405.21060)
        model_types=("mamba2",),
        blocks="backbone.layers",
        denses=(Dense("mixer.in_proj", "mixer"), Dense("mixer.out_proj", "heads")),
        couplings=(
            Coupling(
                "mixer.out_proj",
                ("mixer.in_proj",),
                "values",
                tensors=(
                    "mixer.conv1d.weight",
                    "mixer.conv1d.bias",
                    "mixer.dt_bias",
                    "mixer.A_log",
                    "mixer.D",
                    "mixer.norm.weight",
                ),
                layout={
                    # Gate, what is scanned, B and C, time steps.
                    "mixer.in_proj": ("inputs", "inputs", "rest", "units"),
                    "mixer.conv1d.weight": ("inputs", "rest"),
                    "mixer.conv1d.bias": ("inputs", "rest"),
                    "mixer.dt_bias": ("units",),
                    "mixer.A_log": ("units",),
                    "mixer.D": ("units",),
                },
                norm="mixer.norm.weight",
            ),
        ),
        ffn_width=None,
        heads="num_heads",
        kv_heads="num_heads",
        head_size=None,
        scan_groups="n_groups",
        per_layer=(),
        counts=(
            Count("mixer.num_heads", "mixer.D"),
            Count("mixer.intermediate_size", "mixer.norm.weight"),
            Count("mixer.norm.group_size", "mixer.norm.weight"),
            Count("mixer.conv_dim", "mixer.conv1d.weight"),
        ),
    ),
)
