"""Groups of columns with a scale and a zero point, and adapters that fold into the zero points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from secateur.recovery.groupwise import GroupedLinear, Groups, quantise, spread, stored_form
from secateur.recovery.settings import SCALING


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_with_adapter(bits: int = 4, size: int = 8, width: int = 20) -> GroupedLinear:
    """A layer of 6 rows whose last group is short, with an adapter that is not zero."""
    linear = nn.Linear(width, 6)
    with torch.no_grad():
        linear.weight.copy_(random(6, width))
        linear.bias.copy_(random(6, seed=1))
    made = GroupedLinear(
        linear, bits=bits, size=size, rank=3, generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        made.b.copy_(random(6, 3, seed=3))
    return made


def pooling(width: int, size: int) -> torch.Tensor:
    """P, (G, q) float64, by its definition."""
    groups = math.ceil(width / size)
    p = torch.zeros(groups, width, dtype=torch.float64)
    for column in range(width):
        p[column // size, column] = 1 / math.sqrt(size)
    return p


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_codes_are_those_of_a_loop_over_groups(bits: int) -> None:
    weight = random(5, 20)
    found = quantise(weight, bits=bits, size=8)
    top = 2**bits - 1
    for row in range(5):
        for group, start in enumerate((0, 8, 16)):
            part = weight[row, start : min(start + 8, 20)].numpy()
            scale = np.float32(np.float16((part.max() - part.min()) / np.float32(top)))
            zero = np.float32(np.float16(part.min()))
            codes = np.clip(np.round((part - zero) / scale), 0, top)
            assert found.scales[row, group] == scale
            assert found.zeros[row, group] == zero
            assert found.codes[row, start : start + 8].tolist() == codes.tolist()
    step = spread(found.scales, 8, 20)
    # Half a step of rounding, and what float16 takes from scale and zero point.
    assert bool(((found.weight() - weight).abs() <= 0.5 * step + 4e-3).all())
    assert found.codes.dtype == torch.uint8


def test_a_group_of_equal_values_stays_what_it_is() -> None:
    weight = torch.cat([torch.full((2, 8), 0.25), random(2, 8)], dim=1)
    found = quantise(weight, bits=4, size=8)
    assert torch.equal(found.weight()[:, :8], weight[:, :8])
    assert found.scales[:, 0].tolist() == [0.0, 0.0]


def test_values_that_are_quantised_already_are_kept() -> None:
    """Scales of few digits, so that every value is exact: quantising again changes nothing."""
    codes = torch.arange(32).remainder(16).view(1, 32)[:, torch.randperm(32)]
    weight = 0.125 * codes.float() - 1.0
    assert torch.equal(quantise(weight, bits=4, size=32).weight(), weight)


def test_an_untrained_adapter_changes_nothing() -> None:
    linear = nn.Linear(16, 4)
    plain = quantise(linear.weight.detach(), bits=4, size=8).weight()
    made = GroupedLinear(linear, bits=4, size=8, rank=2, generator=torch.Generator())
    x = random(3, 16)
    assert torch.equal(made(x), nn.functional.linear(x, plain, linear.bias))
    assert torch.equal(made.folded(), plain)


@pytest.mark.parametrize(("width", "size"), [(24, 8), (20, 8), (5, 8)])
def test_folding_is_exact(width: int, size: int) -> None:
    """W^ x + t B A P x against s c + z', in float64: equal for every x, so as matrices."""
    made = layer_with_adapter(size=size, width=width)
    a, b = made.a.detach().double(), made.b.detach().double()
    groups = made.groups
    adapted = groups.weight().double() + SCALING * b @ a @ pooling(width, size)
    zeros = groups.zeros.double() + SCALING * b @ a / math.sqrt(size)
    folded = spread(groups.scales.double(), size, width) * groups.codes.double() + spread(
        zeros, size, width
    )
    assert torch.allclose(adapted, folded, rtol=0, atol=1e-12)
    # And the layer computes the one, and folds into the other, in float32.
    x = random(4, 7, width, seed=5)
    y = nn.functional.linear(x.double(), folded, made.linear.bias.double())
    assert torch.allclose(made(x).double(), y, rtol=0, atol=1e-4)
    exact = groups.weight(groups.zeros + made.shift())
    assert torch.allclose(exact.double(), folded, rtol=0, atol=1e-5)
    # Written zero points are rounded to float16, once, and that is all that is lost.
    lost = (made.folded() - exact).abs()
    assert bool((lost <= spread((groups.zeros + made.shift()).abs(), size, width) * 2**-11).all())


def test_gradients_are_those_of_the_dense_formula() -> None:
    made = layer_with_adapter()
    x, out = random(7, 20, seed=6), random(7, 6, seed=7)
    made(x).backward(out)
    a = made.a.detach().double().requires_grad_()
    b = made.b.detach().double().requires_grad_()
    dense = made.groups.weight().double() + SCALING * b @ a @ pooling(20, 8)
    nn.functional.linear(x.double(), dense).backward(out.double())
    for got, wanted in ((made.a.grad, a.grad), (made.b.grad, b.grad)):
        assert got is not None
        assert wanted is not None
        assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert made.linear.weight.grad is None


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_1"), (5, "Q5_1")])
def test_llama_cpps_type_holds_the_folded_weights_exactly(bits: int, kind: str) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    made = layer_with_adapter(bits=bits, size=32, width=128)
    weight = made.folded().numpy()
    stored = GGMLQuantizationType[kind]
    assert np.array_equal(dequantize(quantize(weight, stored), stored), weight)
    # Written in narrower types they are only near: least values stay, largest are rounded.
    step = spread(made.groups.scales, 32, 128).numpy()
    for narrow, part in ((torch.float16, 0.02), (torch.bfloat16, 0.2)):
        rounded = torch.from_numpy(weight).to(narrow).float().numpy()
        assert not np.array_equal(rounded, weight)
        again = dequantize(quantize(rounded, stored), stored)
        assert (np.abs(again - weight) / step).max() < part


@pytest.mark.parametrize(
    ("bits", "size", "dtype", "text"),
    [
        (
            4,
            32,
            "auto",
            "same ones: `secateur export FOLDER --out model.gguf --type q4_1`",
        ),
        (5, 32, "float32", "--type q5_1`"),
        (4, 32, "float16", "`--type q4_1` comes near them"),
        (4, 64, "auto", "`--type q4_1` comes near them"),
        (8, 32, "auto", "`--type q8_0` comes near them"),
    ],
)
def test_the_card_says_which_file_holds_the_weights(
    bits: int, size: int, dtype: str, text: str
) -> None:
    said = stored_form(bits, size, dtype)
    assert text in said
    assert ("very\nsame" in said) == (size == 32 and bits != 8 and dtype != "float16")


def test_groups_hold_the_shift_as_float16() -> None:
    groups = Groups(torch.zeros(1, 4, dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1), 4)
    assert groups.shifted(torch.tensor([[1 / 3]])).item() == np.float16(1 / 3)
