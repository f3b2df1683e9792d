"""What a pruned model is made of at run time.

A block whose layers have lost inputs or rows still has to speak with its neighbors in the old
widths. :class:`SlicedLinear` does that: it gathers the inputs that were kept, multiplies by the
smaller matrix, and scatters its rows back where somebody counts on their old places.

Between the two marks below stands the code that is also shipped, word for word, as
``modeling_secateur.py`` in a folder that stock transformers classes cannot hold. It may import
torch and transformers only. :func:`modeling_file` writes that file from here, so that there is
one source for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

# [shipped]
import torch
from torch import nn


class SlicedLinear(nn.Module):
    """A linear layer that reads some of its inputs and may write some of its outputs.

    Args:
        kept_in, full_in: inputs that are left (q'), and inputs as they come (q). Where the two
            differ, ``in_index`` (q',) says which are read; the layer before may also have been
            cut to exactly those, then both are q'.
        kept_out, full_out: rows that are left (p') and rows as the next layer expects them (p).
            Where they differ, ``out_index`` (p',) says where they go; the others are zero.
        bias: whether there is a bias (p',).
    """

    def __init__(
        self, kept_in: int, full_in: int, kept_out: int, full_out: int, bias: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = full_in, full_out
        self.weight = nn.Parameter(torch.empty(kept_out, kept_in))
        self.bias = nn.Parameter(torch.empty(kept_out)) if bias else None
        # Built on the CPU even where the parameters are not: a file fills them in afterwards.
        self.in_index: torch.Tensor | None
        self.out_index: torch.Tensor | None
        self.register_buffer("in_index", _places(kept_in) if kept_in != full_in else None)
        self.register_buffer("out_index", _places(kept_out) if kept_out != full_out else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_index is not None:
            x = x.index_select(-1, self.in_index)
        y = nn.functional.linear(x, self.weight, self.bias)
        if self.out_index is not None:
            full = y.new_zeros(*y.shape[:-1], self.out_features)
            y = full.index_copy(-1, self.out_index, y)
        return y

    def extra_repr(self) -> str:
        p, q = self.weight.shape
        return f"in {q} of {self.in_features}, out {p} of {self.out_features}"


def _places(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


def resize_blocks(
    model: nn.Module,
    blocks_path: str,
    shapes: list[dict[str, list[int]]],
    biases: list[list[str]] | None = None,
    lengths: list[dict[str, int]] | None = None,
    counts: list[dict[str, tuple[str, int]]] | None = None,
) -> None:
    """Give every block of ``model`` the sizes in ``shapes``, and the biases that it lacks.

    ``shapes`` has one dictionary a block: layer name to [kept_in, full_in, kept_out, full_out];
    ``biases`` one list a block: names of layers; ``lengths`` the rows of parameters of other
    modules; ``counts`` the numbers that modules note of themselves: [tensor, dimension].
    """
    blocks = list(model.get_submodule(blocks_path).children())
    if len(blocks) != len(shapes):
        raise ValueError(f"config lists {len(shapes)} blocks, the model has {len(blocks)}")
    for i, (block, sizes) in enumerate(zip(blocks, shapes, strict=True)):
        for name in biases[i] if biases else ():
            weight = block.get_parameter(f"{name}.weight")
            block.get_submodule(name).bias = nn.Parameter(weight.new_empty(len(weight)))
        for name, (kept_in, full_in, kept_out, full_out) in sizes.items():
            parent, _, leaf = name.rpartition(".")
            owner = block.get_submodule(parent)
            old = getattr(owner, leaf)
            if (kept_in, kept_out) == (full_in, full_out):
                new: nn.Module = nn.Linear(
                    kept_in, kept_out, bias=old.bias is not None,
                    device=old.weight.device, dtype=old.weight.dtype,
                )  # fmt: skip
            else:
                new = SlicedLinear(kept_in, full_in, kept_out, full_out, old.bias is not None)
                new = new.to(old.weight.device, old.weight.dtype)
            setattr(owner, leaf, new)
        for name, count in (lengths[i] if lengths else {}).items():
            parent, _, leaf = name.rpartition(".")
            owner, whole = block.get_submodule(parent), block.get_parameter(name)
            setattr(owner, leaf, nn.Parameter(whole.new_empty(count, *whole.shape[1:])))
            if isinstance(owner, nn.Conv1d):
                owner.in_channels = owner.out_channels = owner.groups = count
            epsilon = getattr(owner, "variance_epsilon", None)
            if epsilon is not None:
                # The mean of squares over fewer is larger by this; so is the weight's square.
                owner.variance_epsilon = epsilon * len(whole) / count
        for name, (tensor, dimension) in (counts[i] if counts else {}).items():
            parent, _, leaf = name.rpartition(".")
            length = block.get_parameter(tensor).shape[dimension]
            setattr(block.get_submodule(parent), leaf, length)
        for part in block.modules():
            if hasattr(part, "q_proj") and hasattr(part, "num_heads") and hasattr(part, "head_dim"):
                # Some attention classes (OPT) count their heads instead of asking the shapes.
                rows = part.get_submodule("q_proj").out_features
                part.num_heads = rows // part.head_dim  # type: ignore[operator]


# [/shipped]

MODEL_TYPE_PREFIX = "secateur_"
MODELING_FILE = "modeling_secateur.py"

_HEADER = '''"""A language model with fewer weights than its family's class expects, made by
Secateur.

Open it with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True). The config key
"secateur" {says}.
"""

'''

_CLASSES = """

from transformers import {base_config}, {base_model}


class Secateur{base_config}({base_config}):
    model_type = "{model_type}"


class Secateur{base_model}({base_model}):
    config_class = Secateur{base_config}

    def __init__(self, config):
        super().__init__(config)
        sizes = config.secateur
        {reshape}(self, sizes["blocks_path"], sizes["{kind}"]{more})
"""

#: What a config's entry "secateur" may describe, and the function that gives a model those sizes.
KINDS = {"shapes": "resize_blocks", "rotation": "slice_stream"}
#: Further arguments of :func:`resize_blocks`, where the entry has them.
_MORE = ("biases", "lengths", "counts")
_SAYS = {
    "shapes": "lists, for every block and linear layer, how many inputs and rows are left",
    "rotation": "says how wide its hidden states are, and what reads and writes them",
}


def kind_of(entry: Mapping[str, Any]) -> str:
    """Which of :data:`KINDS` the config's entry "secateur" describes.

    Raises:
        KeyError: none.
    """
    for kind in KINDS:
        if kind in entry:
            return kind
    raise KeyError(" or ".join(KINDS))


def modeling_file(base_config: str, base_model: str, kind: str = "shapes") -> str:
    """Source of the modelling file for a model whose family uses these transformers classes.

    Args:
        base_config: for example ``LlamaConfig``.
        base_model: for example ``LlamaForCausalLM``.
        kind: of :data:`KINDS`.
    """
    from secateur.rotation import modules as rotated

    home = Path(__file__ if kind == "shapes" else str(rotated.__file__))
    shipped = home.read_text(encoding="utf-8").split("# [shipped]\n")[1]
    shipped = shipped.split("# [/shipped]\n")[0].rstrip() + "\n"
    classes = _CLASSES.format(
        base_config=base_config,
        base_model=base_model,
        model_type=pruned_type(base_config),
        reshape=KINDS[kind],
        more="".join(f', sizes.get("{more}")' for more in _MORE) if kind == "shapes" else "",
        kind=kind,
    )
    # Imports belong at the top of a file, also of a generated one.
    lines = classes.strip("\n").split("\n")
    head, body = lines[0], "\n".join(lines[1:]).lstrip("\n")
    first, rest = shipped.split("\nfrom torch import nn\n", 1)
    header = _HEADER.format(says=_SAYS[kind])
    return f"{header}{first}\nfrom torch import nn\n{head}\n{rest}\n\n{body}\n"


def pruned_type(base_config: str) -> str:
    """The ``model_type`` of a pruned model: ``secateur_llama`` for ``LlamaConfig``."""
    import transformers

    return MODEL_TYPE_PREFIX + str(getattr(transformers, base_config).model_type)


@lru_cache
def pruned_classes(base_config: str, base_model: str) -> tuple[Any, Any]:
    """The same two classes that the modelling file defines, for use inside this process."""
    import transformers

    from secateur.rotation import modules as rotated

    config_base = getattr(transformers, base_config)
    model_base = getattr(transformers, base_model)
    config_class = type(
        f"Secateur{base_config}", (config_base,), {"model_type": pruned_type(base_config)}
    )

    def __init__(self: Any, config: Any) -> None:
        model_base.__init__(self, config)
        entry = config.secateur
        kind = kind_of(entry)
        if kind == "shapes":
            more = [entry.get(name) for name in _MORE]
            resize_blocks(self, entry["blocks_path"], entry[kind], *more)
        else:
            rotated.slice_stream(self, entry["blocks_path"], entry[kind])

    model_class = type(
        f"Secateur{base_model}", (model_base,), {"config_class": config_class, "__init__": __init__}
    )
    return config_class, model_class


def pruned_config(raw: dict[str, Any]) -> Any:
    """The config of one of our own outputs, from its JSON, without running its modelling file.

    Raises:
        SourceError: the JSON does not name transformers classes and block sizes as we write them.
    """
    import transformers

    from secateur.errors import SourceError

    try:
        base_config, base_model = raw["secateur"]["base_config"], raw["secateur"]["base_model"]
        kind_of(raw["secateur"])
        if not (base_config.endswith("Config") and base_model.endswith("ForCausalLM")):
            raise KeyError(base_model)
        if not all(hasattr(transformers, name) for name in (base_config, base_model)):
            raise KeyError(base_model)
        config_class, _ = pruned_classes(base_config, base_model)
        return config_class.from_dict(raw)
    except Exception as error:  # transformers raises many kinds for a bad config
        raise SourceError(
            f"config.json says model_type {raw.get('model_type')} but its entry 'secateur' is "
            f"damaged ({error}): write the model again with secateur prune"
        ) from error
