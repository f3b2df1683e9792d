"""The transformers model without values, and what gives it some: names, ties, buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur.checkpoint import Checkpoint
from secateur.errors import SourceError


def build_skeleton(checkpoint: Checkpoint) -> Any:
    """The transformers model of ``checkpoint`` on the meta device: shapes, no values.

    Raises:
        SourceError: transformers has no causal language model for this config.
    """
    from transformers import AutoModelForCausalLM

    from secateur.modules import MODEL_TYPE_PREFIX, pruned_classes

    config = checkpoint.config
    blocks = getattr(config, "num_hidden_layers", 0)
    if not isinstance(blocks, int) or blocks > len(checkpoint.tensors):
        # Each would be built before the first was missed.
        raise SourceError(
            f"config and weights of {checkpoint.source} disagree: the config asks for {blocks} "
            f"blocks, the files hold {len(checkpoint.tensors)} tensors in all"
        )
    with torch.device("meta"):
        try:
            if str(config.model_type).startswith(MODEL_TYPE_PREFIX):
                _, model_class = pruned_classes(
                    config.secateur["base_config"], config.secateur["base_model"]
                )
                model = model_class(config)
            else:
                model = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=checkpoint.trust_remote_code
                )
        except Exception as error:  # transformers checks little; any value may fail anywhere
            text = (str(error).strip().splitlines() or [repr(error)])[0]
            text = repr(error) if isinstance(error, KeyError) else text
            raise SourceError(
                f"source {checkpoint.source} (model_type {config.model_type}) cannot be built as a "
                f"causal language model: {text}"
            ) from error
    return model.eval()


def fill_skeleton(checkpoint: Checkpoint, model: Any, dtype: torch.dtype) -> None:
    """Give every tensor of a skeleton its values: the whole model in memory."""
    names = bind(checkpoint, model)
    state = {name: checkpoint.read(stored, dtype) for name, stored in names.items()}
    model.load_state_dict(state, strict=False, assign=True)
    tie(model, state)
    fill_buffers(model, torch.device("cpu"))


def tie(model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Let tied names share the parameter that was read."""
    for target, origin in model.all_tied_weights_keys.items():
        if target not in state and origin in state:
            owner, _, leaf = target.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(origin))


def fill_buffers(model: Any, device: torch.device) -> None:
    """Give buffers that no file holds (rotary frequencies) their values on the device."""
    for module in model.modules():
        absent = [
            name
            for name, buffer in module.named_buffers(recurse=False)
            if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set
        ]
        for name in absent:
            empty = torch.empty_like(module.get_buffer(name), device=device)
            module.register_buffer(name, empty, persistent=False)
        if absent:
            model._init_weights(module)


def bind(checkpoint: Checkpoint, skeleton: Any) -> dict[str, str]:
    """Name in the model -> name in the file, checked for presence and shape."""
    wanted = dict(skeleton.named_parameters())  # tied parameters appear once, under one name
    persistent = set(skeleton.state_dict())
    wanted |= {n: b for n, b in skeleton.named_buffers() if n in persistent}
    tied = skeleton.all_tied_weights_keys
    names = checkpoint.skeleton_names([*wanted, *tied], skeleton)
    for target, origin in tied.items():
        if origin not in names and target in names:  # stored under its other name
            names[origin] = names[target]
        names.pop(target, None)
        wanted.pop(target, None)
    for name, parameter in wanted.items():
        if name not in names:
            raise SourceError(
                f"config and weights of {checkpoint.source} disagree: the config asks for a tensor "
                f"{name} of shape {list(parameter.shape)}, which no file holds"
            )
        stored = checkpoint.tensors[names[name]]
        if tuple(parameter.shape) != stored.shape:
            raise SourceError(
                f"config and weights of {checkpoint.source} disagree: tensor {names[name]} has "
                f"shape {list(stored.shape)}, the config asks for {list(parameter.shape)}"
            )
    return names


def drop_weights(module: nn.Module, recurse: bool = True) -> None:
    """Put parameters and stored buffers back on the meta device."""
    for child in module.modules() if recurse else [module]:
        for name, parameter in child.named_parameters(recurse=False):
            setattr(child, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                setattr(child, name, buffer.to("meta"))
