"""A Hugging Face folder from a plan: stock classes where shapes allow it, else a modelling file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.anatomy import Anatomy
from secateur.checkpoint import Checkpoint
from secateur.checkpoint.base import linked_away
from secateur.checkpoint.writer import write_bytes, write_json, write_tensors
from secateur.errors import OutputError
from secateur.finite import all_finite
from secateur.modules import MODELING_FILE, kind_of, modeling_file, pruned_type
from secateur.plans import BlockCut, Plan, Tensors
from secateur.slicing import slice_block

INDEX = "model.safetensors.index.json"
RECORD = "secateur.json"
PLAN_TENSORS = "secateur_plan.safetensors"
#: Files of the source that travel unchanged, besides those that are made anew.
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "gguf_tokenizer.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt",
)  # fmt: skip


def shard_name(number: int, blocks: int) -> str:
    """File of the ``number``-th remaining block; number ``blocks`` holds what is outside them."""
    return f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"


def write_block(
    folder: Path, plan: Plan, cut: BlockCut, state: Tensors, *, number: int, blocks: int,
    dtype: torch.dtype,
) -> str:  # fmt: skip
    """Write one block as its own shard; return the SHA-256 of the file."""
    sliced = slice_block(state, plan, cut, dtype)
    return write_shard(folder, plan, cut, sliced, number=number, blocks=blocks, dtype=dtype)


def write_shard(
    folder: Path, plan: Plan, cut: BlockCut, tensors: Tensors, *, number: int, blocks: int,
    dtype: torch.dtype,
) -> str:  # fmt: skip
    """Write the tensors of one finished block as they are; return the SHA-256 of the file."""
    prefix = f"{plan.anatomy.family.blocks}.{number}."
    check_range(tensors, dtype, f"block {cut.source}")
    return write_tensors(
        folder / shard_name(number, blocks), {prefix + k: v for k, v in tensors.items()}
    )


class StoredWeights(Mapping[str, torch.Tensor]):
    """New weights of a block, read from its shard when they are asked for, one at a time.

    A plan that held them would hold a good part of the model.

    Args:
        folder: of the written model.
        shard: file in it.
        prefix: of the block's tensors.
        names: linear layers with new weights.
    """

    def __init__(self, folder: Path, shard: str, prefix: str, names: Iterable[str]) -> None:
        self._file = folder / shard
        self._prefix = prefix
        self._names = list(names)

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._file, framework="pt") as shard:
            return shard.get_tensor(f"{self._prefix}{name}.weight").float()


def stored_weights(
    folder: Path, plan: Plan, number: int, blocks: int, names: Iterable[str]
) -> StoredWeights:
    """The new weights of the ``number``-th remaining block, where it has been written."""
    prefix = f"{plan.anatomy.family.blocks}.{number}."
    return StoredWeights(folder, shard_name(number, blocks), prefix, names)


def write_outside(folder: Path, tensors: Tensors, *, blocks: int, dtype: torch.dtype) -> None:
    """Write embeddings, final norm and head, and the index over all shards."""
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    check_range(cast, dtype, "the embedding or head")
    write_tensors(folder / shard_name(blocks, blocks), cast)
    from secateur.checkpoint.safetensors_folder import read_header

    weight_map: dict[str, str] = {}
    total = 0
    for number in range(blocks + 1):
        path = folder / shard_name(number, blocks)
        for name, info in read_header(path).items():
            weight_map[name] = path.name
            total += info.nbytes
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def check_range(tensors: Tensors, dtype: torch.dtype, where: str, *, or_else: str = "") -> None:
    """Refuse weights that do not fit the written type: float16 ends at 65504.

    Args:
        or_else: what else the user may do about it.

    Raises:
        OutputError: names the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            short = str(dtype).removeprefix("torch.")
            raise OutputError(
                f"{name} of {where} has weights too large for {short}: repeat the command with "
                f"--dtype bfloat16 or float32{or_else}"
            )


def write_config(folder: Path, checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype) -> None:
    """Write ``config.json`` and, where stock classes cannot hold the plan, the modelling file."""
    config = make_config(checkpoint, plan, dtype)
    write_json(folder / "config.json", config)
    if "secateur" in config:
        base_config, base_model = base_classes(checkpoint)
        source = modeling_file(base_config, base_model, kind_of(config["secateur"]))
        write_bytes(folder / MODELING_FILE, source.encode())


def base_classes(checkpoint: Checkpoint) -> tuple[str, str]:
    """Names of the transformers classes of the source: ``LlamaConfig``, ``LlamaForCausalLM``."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = checkpoint.config
    return type(config).__name__, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])


def make_config(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """The config of the pruned model as JSON values."""
    family = plan.anatomy.family
    config = json.loads(json.dumps(checkpoint.config.to_dict(), default=str))
    for key in ("quantization_config", "_name_or_path", "auto_map"):
        config.pop(key, None)
    kept = plan.kept_layers
    config["num_hidden_layers"] = len(kept)
    for key in family.per_layer:
        if isinstance(config.get(key), list):
            config[key] = [config[key][i] for i in kept]
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["torch_dtype"] = config["dtype"]  # the older spelling, for older readers
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        # transformers 4 reads only these two keys, and without them silently takes theta 10000.
        config["rope_theta"] = rope["rope_theta"]
        plain = rope.get("rope_type", "default") == "default"
        if not plain:
            config["rope_scaling"] = rope
    base_config, base_model = base_classes(checkpoint)
    stock = stock_keys(checkpoint, plan)
    if stock is not None:
        config |= stock
        config["architectures"] = [base_model]
        return config
    config["model_type"] = pruned_type(base_config)
    config["architectures"] = [f"Secateur{base_model}"]
    config["auto_map"] = _auto_map(base_config, base_model)
    config["secateur"] = {
        "base_config": base_config,
        "base_model": base_model,
        "blocks_path": family.blocks,
        **plan.run_time(),
    }
    return config | plan.config_keys()


def _auto_map(base_config: str, base_model: str) -> dict[str, str]:
    module = MODELING_FILE.removesuffix(".py")
    return {
        "AutoConfig": f"{module}.Secateur{base_config}",
        "AutoModelForCausalLM": f"{module}.Secateur{base_model}",
    }


def holds_only_our_code(folder: Path) -> bool:
    """Whether a pruned folder's Python code is what :func:`write_config` puts there, to the byte.

    Such a folder may have come from anywhere; opening it in transformers runs what it holds.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config["secateur"]["base_config"], config["secateur"]["base_model"]
    source = modeling_file(*names, kind_of(config["secateur"]))
    return (
        config.get("auto_map") == _auto_map(*names)
        and [path.name for path in folder.rglob("*.py")] == [MODELING_FILE]
        and (folder / MODELING_FILE).read_bytes() == source.encode()
    )


def stock_keys(checkpoint: Checkpoint, plan: Plan) -> dict[str, int] | None:
    """The config keys with which the stock class holds this plan, or None where it cannot."""
    widths = plan.uniform
    if any(plan.new_biases(cut) for cut in plan.blocks):
        return None
    if widths is None or widths.kv_groups not in stock_groups(checkpoint, plan.anatomy):
        return None
    width = plan.anatomy.family.ffn_width
    return {
        **({width: widths.ffn} if width is not None else {}),
        **_group_keys(plan.anatomy, widths.kv_groups),
    }


def _group_keys(anatomy: Anatomy, groups: int) -> dict[str, int]:
    """Config keys for fewer KV groups of the same head size; none where nothing changes."""
    family = anatomy.family
    if groups == anatomy.kv_heads or family.head_size is None or family.heads is None:
        return {}
    return {
        family.heads: groups * anatomy.heads_per_group,
        family.kv_heads: groups,
        family.head_size: anatomy.head_size,
    }


def stock_groups(checkpoint: Checkpoint, anatomy: Anatomy) -> tuple[int, ...]:
    """Numbers of KV groups that the model's own class accepts, rising.

    Asked of the class itself: LLaMA's, for one, wants a hidden width that is a multiple of the
    number of query heads, Mistral's does not.
    """
    if anatomy.family.head_size is None:
        return (anatomy.kv_heads,)
    kind, values = type(checkpoint.config), checkpoint.config.to_dict()
    legal = []
    for groups in range(1, anatomy.kv_heads):
        try:
            kind(**{**values, **_group_keys(anatomy, groups)})
        except Exception:  # of several kinds, all of which mean no
            continue
        legal.append(groups)
    return (*legal, anatomy.kv_heads)


def check_own(path: Path, folder: Path) -> None:
    """Refuse to copy what a link in a model's folder points to: the folder may be anybody's.

    Raises:
        OutputError: the link leaves the folder.
    """
    if linked_away(path, folder):
        raise OutputError(
            f"{path} is a link to {path.resolve()}, which would be copied into the output: put a "
            "copy of the file in its place if it belongs to the model, or remove the link"
        )


def copy_companions(folder: Path, checkpoint: Checkpoint) -> None:
    """Tokenizer, chat template, generation config and licence, as they are in the source."""
    for name in COPIED:
        path = checkpoint.folder / name
        if path.is_file():
            check_own(path, checkpoint.folder)
            write_bytes(folder / name, path.read_bytes())
    if not (checkpoint.folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        made = GenerationConfig.from_model_config(checkpoint.config)
        write_bytes(folder / "generation_config.json", made.to_json_string().encode())
