"""Magnitude compensation against a model whose front is scaled up in place of its back down."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_scored import LLAMA, OPT, blocks_of, whole, windows_of
from transformers import AutoModelForCausalLM

from secateur.magnitude import factors, growth, said
from secateur.methods.shortgpt import ShortGpt
from secateur.pruning import prune
from secateur.recipe import make_recipe

Folder = Callable[[str], Path]
SHORT = {"samples": 4, "length": 24}


def test_growth_is_a_median_over_tokens() -> None:
    inputs = torch.ones(1, 5, 3)
    outputs = inputs * torch.tensor([2.0, 3.0, 1000.0, 0.5, 1.5])[:, None]
    assert growth(inputs, outputs) == pytest.approx(2.0)
    assert growth(inputs, -outputs) == pytest.approx(2.0)


def test_blocks_behind_all_that_went_add_less_by_each() -> None:
    assert factors([0, 2, 3, 5], {4: 2.0, 1: 1.25}) == {0: 1, 2: 0.8, 3: 0.8, 5: 0.4}
    assert factors([0, 1], {}) == {0: 1, 1: 1}


def test_what_is_said_of_it() -> None:
    assert said([{}, {"error": {}}]) == ""
    assert said([{}, {"adds": 0.5}, {"adds": 0.91234}]) == (
        "Blocks behind removed ones add 0.500 to 0.912 times what they did to the hidden state, "
        "which the removed ones made grow."
    )


def scaled_in_front(model: Any, gone: int, grown: float, paths: tuple[str, str]) -> Any:
    """The model without a block, its state brought to the size that it had behind it."""
    model = copy.deepcopy(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied
    with torch.no_grad():
        for embedding in (m for m in model.modules() if isinstance(m, torch.nn.Embedding)):
            embedding.weight.mul_(grown)
        for block in list(blocks_of(model))[:gone]:
            for path in paths:
                layer = block.get_submodule(path)
                layer.weight.mul_(grown)
                if layer.bias is not None:
                    layer.bias.mul_(grown)
    del blocks_of(model)[gone]
    return model


@pytest.mark.parametrize(
    ("name", "paths"), [("llama-gqa-tied", LLAMA), ("llama-biases", LLAMA), ("opt", OPT)]
)
def test_the_same_as_a_larger_state_in_front(
    name: str,
    paths: tuple[str, str],
    model_folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ShortGpt, "candidates", lambda *_: [1])
    recipe = make_recipe(
        method="shortgpt", remove="25%", of="decoder", calibration=SHORT,
        options={"compensate": True},
    )  # fmt: skip
    result = prune(model_folder(name), tmp_path / "out", recipe)
    model = whole(model_folder(name))
    seen: list[torch.Tensor] = []
    blocks_of(model)[1].register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    windows = windows_of(model_folder(name))
    with torch.no_grad():
        model(windows, use_cache=False)
    front, behind = (x[0] if isinstance(x, tuple) else x for x in seen[:2])
    grown = float((behind.norm(dim=-1) / front.norm(dim=-1)).median())
    adds = [cut.notes.get("adds", 1.0) for cut in result.plan.blocks]
    assert [cut.source for cut in result.plan.blocks] == [0, 2, 3]
    assert adds == pytest.approx([1, 1 / grown, 1 / grown])
    assert abs(grown - 1) > 0.05
    line = f"Blocks behind removed ones add {1 / grown:.3f} times what they did"
    for page in ("README.md", "report.html"):
        assert line in (tmp_path / "out" / page).read_text()

    blocks_of(model)[1]._forward_hooks.clear()
    wanted = scaled_in_front(model, 1, grown, paths)
    for number, block in enumerate(blocks_of(wanted)):
        attention = getattr(block, "self_attn", None)
        if attention is not None:
            attention.layer_idx = number
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        found = small(windows, use_cache=False).logits
        expected = wanted(windows, use_cache=False).logits
        plain = scaled_in_front(model, 1, 1.0, paths)(windows, use_cache=False).logits
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-2)
