"""Running sums against numpy, and the hooks that feed them."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur import statistics
from secateur.anatomy import describe
from secateur.solvers.gram import cholesky
from secateur.solvers.ladder import FLOAT64, listening
from secateur.statistics import (
    PANEL,
    TOKENS_PER_CHUNK,
    Channels,
    Moments,
    gather,
    gather_moments,
    relative_to,
)

CPU = torch.device("cpu")


def numpy_moments(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray, int]:
    flat = x.detach().double().numpy().reshape(-1, x.shape[-1])
    return flat.T @ flat / len(flat), flat.mean(0), len(flat)


def check(moments: Moments, x: torch.Tensor, rtol: float = 1e-6) -> None:
    covariance, mean, tokens = numpy_moments(x)
    assert moments.tokens == tokens
    assert moments.covariance.dtype == moments.mean.dtype == torch.float64
    size = float(np.sqrt(np.mean(np.diag(covariance))))
    np.testing.assert_allclose(moments.covariance, covariance, rtol=rtol, atol=rtol * size**2)
    np.testing.assert_allclose(moments.mean, mean, rtol=rtol, atol=rtol * size)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(0, 2**16),
)
def test_moments_of_batches(shapes: list[tuple[int, int]], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batches = [torch.as_tensor(rng.normal(0.3, 2, (*s, width))).float() for s in shapes]
    batches.append(torch.ones(1, 1, width))
    moments = Moments.empty(width, CPU)
    for batch in batches:
        moments.add(batch)
    check(moments, torch.cat([b.reshape(-1, width) for b in batches]))


@pytest.mark.parametrize("width", [PANEL, PANEL + 1, 2 * PANEL + 30])
def test_more_inputs_than_a_panel(width: int) -> None:
    x = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(0)) + 1
    moments = Moments.empty(width, CPU)
    moments.add(x)
    check(moments, x)
    assert torch.equal(moments.second, moments.second.T)


@pytest.mark.parametrize("extra", [0, 1, TOKENS_PER_CHUNK + 7])
def test_more_tokens_than_a_chunk(extra: int) -> None:
    x = torch.randn(TOKENS_PER_CHUNK + extra, 8, generator=torch.Generator().manual_seed(0)) + 1
    moments = Moments.empty(8, CPU)
    moments.add(x)
    check(moments, x)


def test_chunks_join_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    # A large token and then many small ones: a float32 total would lose the small ones.
    monkeypatch.setattr(statistics, "TOKENS_PER_CHUNK", 1)
    x = torch.full((2001, 1), 1.0)
    x[0] = 2.0**13
    moments = Moments.empty(1, CPU)
    moments.add(x)
    assert moments.second.item() == 2.0**26 + 2000
    assert moments.total.item() == 2.0**13 + 2000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_types(dtype: torch.dtype) -> None:
    x = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    moments = Moments.empty(6, CPU)
    moments.add(x)
    check(moments, x)


def test_inputs_that_need_gradients_leave_no_graph() -> None:
    moments = Moments.empty(3, CPU)
    moments.add(torch.ones(4, 3, requires_grad=True))
    assert not moments.second.requires_grad
    assert not moments.total.requires_grad


def test_statistics_of_no_tokens_cannot_be_used() -> None:
    with pytest.raises(ArithmeticError):
        cholesky(Moments.empty(3, CPU).covariance, 0.01)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen3", "opt"])
def test_layers_that_read_one_signal_see_the_same(name: str) -> None:
    model = tiny.make_model(name, layers=2)
    anatomy = describe(model)
    block = model.get_submodule(anatomy.family.blocks)[1]
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}

    def remember(path: str) -> None:
        layer = block.get_submodule(path)
        layer.register_forward_pre_hook(lambda _, args: seen.__setitem__(path, args[0]))

    for path in anatomy.denses:
        remember(path)
    with (
        gather_moments(block, {path: path for path in anatomy.denses}) as (found, _),
        torch.no_grad(),
    ):
        model(tokens)
    assert found.keys() == anatomy.denses.keys()
    for path, x in seen.items():
        check(found[path], x)
    for paths in anatomy.by_signal.values():
        for path in paths[1:]:
            assert torch.equal(found[path].second, found[paths[0]].second)
            assert torch.equal(found[path].total, found[paths[0]].total)


def test_every_run_of_the_block_adds_up_until_the_hooks_go() -> None:
    layer = torch.nn.Linear(3, 2)
    block = torch.nn.Sequential(layer)
    one, two = torch.randn(4, 3), torch.randn(2, 5, 3)
    with gather_moments(block, {"signal": "0"}) as (found, _):
        block(one)
        block(two)
    block(one)
    assert not layer._forward_pre_hooks
    check(found["signal"], torch.cat([one, two.reshape(-1, 3)]))


def test_hooks_go_when_the_block_fails() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with pytest.raises(RuntimeError), gather_moments(block, {"signal": "0"}):
        block(torch.ones(2, 4))
    assert not block[0]._forward_pre_hooks


def test_nothing_is_gathered_where_nothing_is_asked() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with gather_moments(block, {}) as (found, _):
        block(torch.ones(2, 3))
    assert found == {}


def test_the_last_tokens_apart() -> None:
    """All tokens are in the first moments, those from a place on also in the second."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(5, 3))
    x = torch.randn(4, 6, 5)
    with gather_moments(block, {"signal": "0"}, apart=15) as (found, late), torch.no_grad():
        for batch in x.split(2):
            block(batch)
    flat = x.reshape(-1, 5).double()
    assert (found["signal"].tokens, late["signal"].tokens) == (24, 9)
    torch.testing.assert_close(found["signal"].second, flat.T @ flat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(late["signal"].second, flat[15:].T @ flat[15:], rtol=1e-5, atol=1e-5)
    rest = found["signal"].less(late["signal"])
    assert rest.tokens == 15
    torch.testing.assert_close(rest.total, flat[:15].sum(0), rtol=1e-5, atol=1e-5)


# ---- channels on their own -------------------------------------------------------------------


def check_channels(channels: Channels, x: torch.Tensor, rtol: float = 1e-6) -> None:
    flat = x.double().numpy().reshape(-1, x.shape[-1])
    assert channels.tokens == len(flat)
    assert channels.mean.dtype == channels.variance.dtype == channels.norm.dtype == torch.float64
    np.testing.assert_allclose(channels.mean, flat.mean(0), rtol=rtol, atol=1e-9)
    np.testing.assert_allclose(channels.norm, np.linalg.norm(flat, axis=0), rtol=rtol)
    if len(flat) > 1:
        variance = flat.var(0, ddof=1)
        np.testing.assert_allclose(channels.variance, variance, rtol=rtol, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(0, 2**16),
)
def test_channels_of_batches(shapes: list[tuple[int, int]], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batches = [torch.as_tensor(rng.normal(0.3, 2, (*s, width))).float() for s in shapes]
    batches.append(torch.ones(1, 1, width))
    channels = Channels.empty(width, CPU)
    for batch in batches:
        channels.add(batch)
    check_channels(channels, torch.cat([b.reshape(-1, width) for b in batches]), rtol=1e-5)


def test_a_large_channel_that_hardly_moves_keeps_its_variance() -> None:
    """Sums of squares less the square of the sum would be all rounding here."""
    generator = torch.Generator().manual_seed(0)
    x = 3000 + torch.randn(3 * TOKENS_PER_CHUNK, 4, generator=generator) / 8
    channels = Channels.empty(4, CPU)
    channels.add(x)
    check_channels(channels, x)


@pytest.mark.parametrize("apart", [None, 15])
def test_gathering_channels(apart: int | None) -> None:
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(5, 3))
    x = torch.randn(4, 6, 5)
    with gather(block, {"signal": "0"}, Channels, apart) as (found, late), torch.no_grad():
        for batch in x.split(2):
            block(batch)
    check_channels(found["signal"], x)
    if apart is not None:
        check_channels(late["signal"], x.reshape(-1, 5)[apart:])
    largest = max(t.numel() for t in (found["signal"].mean, found["signal"].squares))
    assert largest == 5  # nothing of q x q


def test_channels_of_one_token_have_no_variance() -> None:
    channels = Channels.empty(2, CPU)
    channels.add(torch.tensor([[1.0, 2.0]]))
    assert channels.variance.tolist() == [0.0, 0.0]


def test_tokens_weigh_by_the_size_of_their_hidden_state() -> None:
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    hidden[1, 2] *= 1000  # a massive activation
    weights = relative_to(hidden).double().square()[:, 0]
    power = hidden.reshape(10, 4).double().square().mean(-1)
    torch.testing.assert_close(weights * power, torch.ones_like(power), rtol=1e-6, atol=0)
    for extreme in (torch.zeros(1, 3, 4), hidden * 1e18):
        assert bool(torch.isfinite(relative_to(extreme)).all())


def test_relative_signals_weigh_by_what_the_block_puts_out() -> None:
    block = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))
    with gather(block, {"a": "0", "b": "1"}, Moments, apart=8, relative={"b", "c"}) as both:
        for window in x:  # the second call goes on where the first left off
            block(window[None])
    found, late = both
    inner = block[0](x.reshape(12, 3)).detach()
    weighted = inner * relative_to(block(x).detach())
    for signal, rows in (("a", x.reshape(12, 3)), ("b", weighted)):
        for part, wanted in ((found, rows.double()), (late, rows[8:].double())):
            torch.testing.assert_close(part[signal].second, wanted.T @ wanted, rtol=1e-5, atol=1e-5)
        assert found[signal].tokens == 12


@pytest.mark.parametrize("size", [1.0, 1e18, 1e25])
def test_inner_products_of_tokens(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "INPUTS_PER_CHUNK", 4)
    x = torch.randn(6, 11, generator=torch.Generator().manual_seed(2)) * size
    with listening() as steps:
        found = statistics.inner_products(x)
    exact = x.double() @ x.T.double()
    torch.testing.assert_close(found / size**2, exact / size**2, rtol=1e-5, atol=1e-5)
    assert bool(steps) == (size > 1e19)


def test_a_product_that_float32_does_not_hold() -> None:
    a, b = torch.full((2, 3), 1e20), torch.full((3, 2), 1e20)
    with listening() as steps:
        torch.testing.assert_close(statistics.product(a, b), a.double() @ b.double())
        assert [step.step for step in steps] == [FLOAT64]
    with listening() as steps:
        found = statistics.product(a / 1e20, b)
    assert found.dtype == torch.float64
    assert not steps
