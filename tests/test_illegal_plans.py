"""Plans that no model can be are refused, word by word."""

from __future__ import annotations

import pytest
import tiny
import torch

from secateur.anatomy import Anatomy, describe
from secateur.errors import PlanError
from secateur.plans import BlockCut, Plan, group_inputs, live_rows

O_PROJ, DOWN = "self_attn.o_proj", "mlp.down_proj"


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    """Four query heads of size 8 in two KV groups, 48 neurons."""
    return describe(tiny.make_model("llama-gqa-tied"))


def whole(anatomy: Anatomy, groups: list[int], neurons: list[int]) -> BlockCut:
    """A legal cut of whole units."""
    kept = torch.tensor(groups)
    inputs = {O_PROJ: group_inputs(anatomy, kept), DOWN: torch.tensor(neurons)}
    return BlockCut(2, inputs, rows=live_rows(anatomy, inputs, kept), groups=kept)


def refused(anatomy: Anatomy, cut: BlockCut) -> str:
    with pytest.raises(PlanError) as caught:
        Plan(anatomy, [BlockCut(0), cut]).check()
    return str(caught.value)


def test_legal_plans_pass(anatomy: Anatomy) -> None:
    cuts = [
        BlockCut(0),
        whole(anatomy, [1], [3, 5]),
        whole(anatomy, [0, 1], list(range(48))),
        BlockCut(3, {"self_attn.q_proj": torch.tensor([0, 4])}),
    ]
    Plan(anatomy, cuts).check()


def test_query_heads_without_a_group(anatomy: Anatomy) -> None:
    cut = whole(anatomy, [0], [1])
    cut.groups = torch.tensor([], dtype=torch.int64)
    assert refused(anatomy, cut) == (
        "the plan of block 2 keeps no KV group for its query heads: allowed are 1 to 2 groups; to "
        "do without a block's attention, remove the block"
    )


def test_no_neurons(anatomy: Anatomy) -> None:
    cut = BlockCut(2, {DOWN: torch.tensor([], dtype=torch.int64)})
    assert refused(anatomy, cut) == (
        "the plan of block 2: inputs of mlp.down_proj: none is kept; allowed are 1 to 48"
    )


@pytest.mark.parametrize("kept", [[0, 48], [-1, 3], [4, 4], [5, 2]])
def test_indices(anatomy: Anatomy, kept: list[int]) -> None:
    assert refused(anatomy, BlockCut(2, {DOWN: torch.tensor(kept)})) == (
        "the plan of block 2: inputs of mlp.down_proj: indices must rise, from 0 up to 47 at most"
    )


def test_groups_out_of_range(anatomy: Anatomy) -> None:
    cut = whole(anatomy, [1], [1])
    cut.groups = torch.tensor([2])
    assert refused(anatomy, cut).endswith("KV groups: indices must rise, from 0 up to 1 at most")


def test_heads_of_other_groups(anatomy: Anatomy) -> None:
    cut = whole(anatomy, [1], [1])
    cut.groups = torch.tensor([0])
    assert refused(anatomy, cut) == (
        "the plan of block 2 keeps 1 KV groups, but self_attn.o_proj does not keep the 16 inputs "
        "that their query heads make"
    )


def test_rows_that_do_not_feed_what_is_read(anatomy: Anatomy) -> None:
    cut = whole(anatomy, [1], [1, 2])
    cut.rows["mlp.up_proj"] = torch.tensor([1, 3])
    assert refused(anatomy, cut) == (
        "the plan of block 2: mlp.up_proj keeps other rows than mlp.down_proj reads (2)"
    )
    cut = whole(anatomy, [1], [1, 2])
    del cut.rows["self_attn.k_proj"]
    assert refused(anatomy, cut) == (
        "the plan of block 2: self_attn.k_proj keeps other rows than self_attn.o_proj reads (8)"
    )


def test_scales_of_another_length(anatomy: Anatomy) -> None:
    cut = BlockCut(
        2, {"self_attn.q_proj": torch.tensor([0, 4])}, {"self_attn.q_proj": torch.ones(3)}
    )
    assert refused(anatomy, cut) == (
        "the plan of block 2: self_attn.q_proj keeps 2 inputs but has 3 scales"
    )
