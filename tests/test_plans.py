"""Plans: what is counted, sliced and masked must be one and the same."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import repeat_kv

from secateur.anatomy import FAMILIES, Anatomy, describe
from secateur.anatomy.describe import DenseShape
from secateur.coupled import with_readers
from secateur.modules import SlicedLinear, resize_blocks
from secateur.plans import (
    BlockCut,
    Plan,
    Sizes,
    Tensors,
    block_removed,
    live_rows,
    removed_by_counts,
)
from secateur.slicing import mask_block, slice_block

LAYERS = 2
INDEX_BUFFERS = (".in_index", ".out_index")


@lru_cache
def model_of(name: str) -> tuple[Any, Anatomy]:
    model = tiny.make_model(name, layers=LAYERS)
    return model, describe(model)


def blocks_of(model: Any, anatomy: Anatomy) -> list[torch.nn.Module]:
    return list(model.get_submodule(anatomy.family.blocks))


def some(total: int, count: int, rng: np.random.Generator) -> torch.Tensor:
    return torch.as_tensor(np.sort(rng.choice(total, count, replace=False)))


@st.composite
def cuts(draw: st.DrawFn, anatomy: Anatomy, source: int) -> BlockCut:
    """Any inputs of any layers, one or more of each that is named; with or without scales."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cut = BlockCut(source)
    for name in draw(st.sets(st.sampled_from(sorted(anatomy.denses)))):
        count = draw(st.integers(1, anatomy.denses[name].inputs))
        cut.inputs[name] = some(anatomy.denses[name].inputs, count, rng)
        if draw(st.booleans()):
            cut.scales[name] = torch.as_tensor(rng.normal(1, 0.5, count)).float()
    if draw(st.booleans()):  # whole units, also where more than one layer reads them
        cut.inputs = with_readers(anatomy, cut.inputs)
        cut.scales = {n: s for n, s in cut.scales.items() if len(s) == len(cut.inputs[n])}
    cut.rows = live_rows(anatomy, cut.inputs)
    return cut


def numel(tensors: Tensors) -> int:
    return sum(t.numel() for name, t in tensors.items() if not name.endswith(INDEX_BUFFERS))


# ---- live rows -------------------------------------------------------------------------------


def attention_anatomy(heads: int, groups: int, head_size: int) -> Anatomy:
    wide, narrow = heads * head_size, groups * head_size
    shapes = {
        "self_attn.v_proj": DenseShape("self_attn.v_proj", "attention", narrow, 5, False),
        "self_attn.o_proj": DenseShape("self_attn.o_proj", "heads", 5, wide, False),
        "mlp.gate_proj": DenseShape("mlp.gate_proj", "ffn", 9, 5, False),
        "mlp.up_proj": DenseShape("mlp.up_proj", "ffn", 9, 5, False),
        "mlp.down_proj": DenseShape("mlp.down_proj", "neurons", 5, 9, False),
    }
    return Anatomy(FAMILIES[0], "llama", shapes, 1, 0, 0, {}, heads, groups, head_size)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.data())
def test_value_rows_live_while_any_head_of_their_group_is_read(
    per_group: int, groups: int, head_size: int, data: st.DataObject
) -> None:
    heads = per_group * groups
    anatomy = attention_anatomy(heads, groups, head_size)
    kept = data.draw(st.sets(st.integers(0, heads * head_size - 1), min_size=1))
    # transformers itself says which value row each input of the output projection comes from.
    numbers = torch.arange(groups * head_size).view(1, groups, 1, head_size)
    source = repeat_kv(numbers, per_group).transpose(1, 2).flatten().tolist()
    expected = sorted({source[j] for j in kept})
    rows = live_rows(anatomy, {"self_attn.o_proj": torch.tensor(sorted(kept))})
    if len(expected) == groups * head_size:
        assert rows == {}
    else:
        assert rows.keys() == {"self_attn.v_proj"}
        assert rows["self_attn.v_proj"].tolist() == expected


def test_neuron_rows_live_with_their_inputs() -> None:
    kept = torch.tensor([0, 3, 8])
    rows = live_rows(attention_anatomy(2, 1, 2), {"mlp.down_proj": kept})
    assert rows.keys() == {"mlp.gate_proj", "mlp.up_proj"}
    assert all(r.tolist() == kept.tolist() for r in rows.values())


def test_inputs_that_nobody_makes_cost_no_rows() -> None:
    anatomy = attention_anatomy(2, 1, 2)
    assert live_rows(anatomy, {"mlp.gate_proj": torch.tensor([1])}) == {}
    assert live_rows(anatomy, {"self_attn.v_proj": torch.tensor([1])}) == {}
    assert live_rows(anatomy, {"mlp.down_proj": torch.arange(9)}) == {}
    assert live_rows(anatomy, {}) == {}


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-biases", "qwen3", "opt"])
def test_dead_value_rows_change_nothing_in_a_real_block(name: str) -> None:
    """Garbage in the rows that are not live never reaches the output; in live ones it does."""
    model, anatomy = model_of(name)
    consumer = next(c.consumer for c in anatomy.family.couplings if c.kind == "values")
    kept = some(anatomy.denses[consumer].inputs, 9, np.random.default_rng(0))
    rows = live_rows(anatomy, {consumer: kept})["self_attn.v_proj"]
    dead = sorted(set(range(anatomy.denses["self_attn.v_proj"].rows)) - set(rows.tolist()))
    assert dead
    tokens = torch.arange(3, 13)[None]

    def logits(spoiled: list[int]) -> torch.Tensor:
        other = copy.deepcopy(model)
        block = blocks_of(other, anatomy)[0]
        state = mask_block(block.state_dict(), BlockCut(0, {consumer: kept}), torch.float32)
        state["self_attn.v_proj.weight"][spoiled] += 1
        block.load_state_dict(state)
        with torch.no_grad():
            return other(tokens).logits

    assert torch.equal(logits([]), logits(dead))
    for row in rows.tolist():
        assert not torch.equal(logits([]), logits([row]))


# ---- slices and masks ------------------------------------------------------------------------


def run(model: Any, anatomy: Anatomy, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Output of every block, and the logits."""
    found: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in blocks_of(model, anatomy)
    ]
    with torch.no_grad():
        logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    return [*found, logits]


@pytest.mark.parametrize("name", list(tiny.MODELS))
def test_sliced_blocks_equal_masked_blocks(name: str) -> None:
    model, anatomy = model_of(name)
    states = [block.state_dict() for block in blocks_of(model, anatomy)]

    @settings(max_examples=14, deadline=None)
    @given(st.data(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
    def check(data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
        plan = Plan(anatomy, [data.draw(cuts(anatomy, i)) for i in range(LAYERS)])
        sliced, masked = copy.deepcopy(model), copy.deepcopy(model)
        resize_blocks(sliced, anatomy.family.blocks, **plan.run_time())
        for i, cut in enumerate(plan.blocks):
            tensors = slice_block(states[i], plan, cut, dtype)
            # What is counted is what is there.
            gone = numel(states[i]) - numel(tensors)
            assert gone == block_removed(anatomy, cut)
            assert gone == removed_by_counts(
                anatomy,
                {n: len(k) for n, k in cut.inputs.items()},
                {n: len(k) for n, k in cut.rows.items()},
            )
            blocks_of(sliced, anatomy)[i].load_state_dict(tensors)
            blocks_of(masked, anatomy)[i].load_state_dict(mask_block(states[i], cut, dtype))
        assert sum(p.numel() for p in sliced.parameters()) == plan.sizes().parameters
        rng = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, tiny.VOCABULARY, (2, 12), generator=rng)
        pairs = zip(run(sliced, anatomy, tokens), run(masked, anatomy, tokens), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    check()


def test_masks_are_zeros_and_scales_in_place() -> None:
    model, anatomy = model_of("llama-biases")
    state = blocks_of(model, anatomy)[0].state_dict()
    kept = torch.tensor([0, 7, 30])
    cut = BlockCut(0, {"mlp.down_proj": kept}, {"mlp.down_proj": torch.tensor([2.0, 0.5, -1.0])})
    cut.rows = live_rows(anatomy, cut.inputs)
    found = mask_block(state, cut, torch.float32)
    expected = {k: v.clone() for k, v in state.items()}
    mask = torch.zeros(48)
    mask[kept] = cut.scales["mlp.down_proj"]
    expected["mlp.down_proj.weight"] *= mask
    for producer in ("mlp.gate_proj", "mlp.up_proj"):
        expected[f"{producer}.weight"] *= (mask != 0)[:, None]
        expected[f"{producer}.bias"] *= mask != 0
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_an_empty_cut_changes_nothing() -> None:
    model, anatomy = model_of("qwen2")
    state = blocks_of(model, anatomy)[0].state_dict()
    cut = BlockCut(0)
    for found in (
        slice_block(state, Plan(anatomy, [cut]), cut, torch.float32),
        mask_block(state, cut, torch.float32),
    ):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[k], v) for k, v in state.items())


def test_slicing_leaves_the_original_alone() -> None:
    model, anatomy = model_of("opt")
    state = blocks_of(model, anatomy)[0].state_dict()
    before = {k: v.clone() for k, v in state.items()}
    cut = BlockCut(0, {"fc2": torch.tensor([1, 2])}, {"fc2": torch.tensor([3.0, 4.0])})
    cut.rows = live_rows(anatomy, cut.inputs)
    slice_block(state, Plan(anatomy, [cut]), cut, torch.bfloat16)
    mask_block(state, cut, torch.bfloat16)
    assert all(torch.equal(before[k], v) for k, v in state.items())


def test_shapes_say_which_layers_gather_and_scatter() -> None:
    _, anatomy = model_of("llama-gqa-tied")
    cut = BlockCut(
        0,
        {
            "self_attn.q_proj": torch.arange(5),
            "self_attn.o_proj": torch.tensor([0, 1, 8]),
            "mlp.up_proj": torch.arange(6),
            "mlp.down_proj": torch.arange(7),
        },
    )
    cut.rows = live_rows(anatomy, cut.inputs)
    assert Plan(anatomy, [cut]).shapes(cut) == {
        "self_attn.q_proj": [5, 32, 32, 32],
        "self_attn.v_proj": [32, 32, 2, 16],  # heads 0 and 1 are one group; 8 is 0 of head 1
        "self_attn.o_proj": [3, 32, 32, 32],
        "mlp.gate_proj": [32, 32, 7, 7],
        "mlp.up_proj": [6, 32, 7, 7],
        "mlp.down_proj": [7, 7, 32, 32],
    }


def test_resize_blocks_uses_stock_layers_where_they_do() -> None:
    model, anatomy = model_of("llama-gqa-tied")
    cut = BlockCut(0, {"mlp.down_proj": torch.arange(7), "self_attn.k_proj": torch.arange(3)})
    cut.rows = live_rows(anatomy, cut.inputs)
    plan = Plan(anatomy, [cut, BlockCut(1)])
    other = copy.deepcopy(model)
    resize_blocks(other, anatomy.family.blocks, [plan.shapes(c) for c in plan.blocks])
    first, second = blocks_of(other, anatomy)
    for path in ("mlp.down_proj", "mlp.gate_proj", "self_attn.v_proj"):
        assert type(first.get_submodule(path)) is torch.nn.Linear
    assert isinstance(first.get_submodule("self_attn.k_proj"), SlicedLinear)
    assert not any(isinstance(m, SlicedLinear) for m in second.modules())
    with pytest.raises(ValueError, match="1 blocks, the model has 2"):
        resize_blocks(other, anatomy.family.blocks, [{}])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.booleans(), st.integers(0, 2**16))
@example(7, 6, True, 0)
def test_sliced_linear_is_a_masked_linear(
    kept_in: int, kept_out: int, bias: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    full = torch.nn.Linear(7, 6, bias=bias)
    inputs, rows = some(7, kept_in, rng), some(6, kept_out, rng)
    layer = SlicedLinear(kept_in, 7, kept_out, 6, bias)
    state = {"weight": full.weight.detach()[rows][:, inputs]}
    if bias:
        state["bias"] = full.bias.detach()[rows]
    if kept_in != 7:
        state["in_index"] = inputs
    if kept_out != 6:
        state["out_index"] = rows
    layer.load_state_dict(state)
    x = torch.as_tensor(rng.standard_normal((2, 3, 7))).float()
    masked = torch.zeros_like(x)
    masked[..., inputs] = x[..., inputs]
    expected = torch.zeros(2, 3, 6)
    expected[..., rows] = full(masked)[..., rows].detach()
    torch.testing.assert_close(layer(x).detach(), expected)


# ---- records ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(["llama-gqa-tied", "opt"]))
def test_cuts_come_back_from_their_tensors(data: st.DataObject, name: str) -> None:
    _, anatomy = model_of(name)
    cut = data.draw(cuts(anatomy, 3))
    cut.notes = {"threshold": 0.5}
    flat = cut.tensors()
    pointers = [t.data_ptr() for t in flat.values()]
    assert len(set(pointers)) == len(pointers)  # safetensors refuses tensors that share memory
    again = BlockCut.of(3, flat, cut.notes)
    assert (again.source, again.notes) == (cut.source, cut.notes)
    for kind in ("inputs", "scales", "rows"):
        one, other = getattr(cut, kind), getattr(again, kind)
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert torch.equal(tensor, other[key])
            assert tensor.dtype == other[key].dtype


def ffn(source: int, width: int, **more: torch.Tensor) -> BlockCut:
    _, anatomy = model_of("llama-gqa-tied")
    names = {"o": "self_attn.o_proj", "q": "self_attn.q_proj", "gate": "mlp.gate_proj"}
    cut = BlockCut(source, {"mlp.down_proj": torch.arange(width)})
    cut.inputs.update({names[key]: kept for key, kept in more.items()})
    cut.rows = live_rows(anatomy, cut.inputs)
    return cut


@pytest.mark.parametrize(
    ("blocks", "width"),
    [
        ([BlockCut(0), BlockCut(1)], 48),
        ([BlockCut(1)], 48),
        ([ffn(0, 20), ffn(1, 20)], 20),
        ([ffn(1, 20)], 20),
        ([ffn(0, 20), ffn(1, 21)], None),
        ([ffn(0, 20), BlockCut(1)], None),
        ([ffn(0, 48), BlockCut(1)], 48),
        ([ffn(0, 20), ffn(1, 20, o=torch.arange(31))], None),
        ([ffn(0, 20), ffn(1, 20, o=torch.arange(32))], 20),
        ([ffn(0, 20), ffn(1, 20, q=torch.arange(31))], None),
        ([ffn(0, 20), ffn(1, 20, q=torch.arange(32))], 20),
        ([ffn(0, 20), ffn(1, 20, gate=torch.arange(31))], None),
        ([BlockCut(0, {"self_attn.q_proj": torch.arange(9)}), BlockCut(1)], None),
        ([BlockCut(0, {"self_attn.q_proj": torch.arange(32)}), BlockCut(1)], 48),
    ],
)
def test_uniform_widths(blocks: list[BlockCut], width: int | None) -> None:
    _, anatomy = model_of("llama-gqa-tied")
    found = Plan(anatomy, blocks).uniform
    assert (found.ffn if found else None) == width


def test_uniform_width_means_that_stock_classes_hold_it() -> None:
    model, anatomy = model_of("llama-gqa-tied")
    plan = Plan(anatomy, [ffn(0, 20), ffn(1, 20)])
    config = copy.deepcopy(model.config)
    config.intermediate_size = plan.uniform.ffn
    stock = type(model)(config)
    for block, cut in zip(blocks_of(stock, anatomy), plan.blocks, strict=True):
        state = blocks_of(model, anatomy)[cut.source].state_dict()
        block.load_state_dict(slice_block(state, plan, cut, torch.float32))


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(sorted(tiny.MODELS)))
def test_summary_is_json_and_its_numbers_are_those_of_the_plan(
    data: st.DataObject, name: str
) -> None:
    model, anatomy = model_of(name)
    kept = data.draw(st.sampled_from([[0, 1], [0], [1]]))
    plan = Plan(anatomy, [data.draw(cuts(anatomy, i)) for i in kept])
    plan.blocks[0].notes = {"threshold": 0.25, "error": {"fc2": 0.1}}
    summary = json.loads(json.dumps(plan.summary(), allow_nan=False))
    before = sum(p.numel() for p in model.parameters())
    left = before
    for cut, entry in zip(plan.blocks, summary["blocks"], strict=True):
        state = blocks_of(model, anatomy)[cut.source].state_dict()
        gone = numel(state) - numel(slice_block(state, plan, cut, torch.float32))
        left -= gone
        assert entry["source"] == cut.source
        assert entry["share_removed"] == pytest.approx(gone / numel(state), abs=1e-6)
        assert entry["shapes"] == plan.shapes(cut)
    removed = sorted({0, 1} - set(kept))
    left -= len(removed) * anatomy.block_parameters
    assert summary["removed_layers"] == removed
    assert summary["parameters"] == {"before": before, "after": left}
    assert summary["share_removed"] == pytest.approx(1 - left / before, abs=1e-6)
    outside = before - anatomy.decoder_parameters
    assert summary["decoder_parameters"]["after"] == left - outside
    assert summary["blocks"][0]["notes"]["threshold"] == 0.25
    assert plan.kept_layers == kept


def test_shares_of_a_model_without_blocks() -> None:
    assert Sizes(10, 0).decoder_share_removed(Sizes(10, 0)) == 0
    assert Sizes(5, 1).share_removed(Sizes(10, 4)) == 0.5
    assert Sizes(5, 1).decoder_share_removed(Sizes(10, 4)) == 0.75
