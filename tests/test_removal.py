"""Removal of many weights at once, against problems that are solved row by row in ten lines."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.solvers import compensation
from secateur.solvers.compensation import all_at_once, one_by_one, solve_in_rows
from secateur.solvers.patterns import (
    lowest,
    lowest_in_groups,
    lowest_in_rows,
    removal_sets,
)
from secateur.solvers.removal import (
    Removal,
    inverse_factor,
    relative_error,
    remove,
    without_dead,
)
from secateur.solvers.sparse_fit import PULLS, best_pull, polish
from secateur.sparsity import Pattern, check_groups, parse_sparsity

DAMPING = 0.01
SS = Removal("S", "S", 16, DAMPING, shrinking=True)


def problem(rows: int = 12, width: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    x = torch.randn(300, width, generator=generator) @ mix
    second = (x.T @ x).double() / len(x)
    return torch.randn(rows, width, generator=generator), second


def damped(second: torch.Tensor) -> torch.Tensor:
    return second + DAMPING * second.diagonal().mean() * torch.eye(len(second)).double()


def best(weight: torch.Tensor, second: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The optimum for a mask: normal equations of the kept set, a row at a time."""
    h, out = damped(second), torch.zeros(weight.shape, dtype=torch.float64)
    for i, gone in enumerate(mask):
        kept = (~gone).nonzero()[:, 0]
        out[i, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ weight[i].double())
    return out


def cost(weight: torch.Tensor, new: torch.Tensor, second: torch.Tensor) -> float:
    change = (new - weight).double()
    return float((change @ damped(second)).mul(change).sum())


def sparsegpt(weight: torch.Tensor, second: torch.Tensor, block: int, share: float) -> torch.Tensor:
    """Algorithm 1 of SparseGPT with an explicit inverse that loses a column at a time."""
    w, h = weight.double().clone(), damped(second)
    width, gone = w.shape[1], 0
    for start in range(0, width, block):
        end = min(start + block, width)
        inverses = [torch.linalg.inv(h[j:, j:]) for j in range(start, end)]
        pivots = torch.stack([inverse[0, 0] for inverse in inverses])
        scores = (w[:, start:end].square() / pivots).flatten()
        wanted = round(share * w.shape[0] * w.shape[1] * end / width) - gone
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[scores.argsort()[:wanted]] = True
        mask = mask.view(-1, end - start)
        gone += wanted
        for j in range(start, end):
            inverse = inverses[j - start]
            error = (w[:, j] * mask[:, j - start]) / inverse[0, 0]
            w[:, j:] -= error[:, None] * inverse[0]
        w[:, start:end][mask] = 0
    return w


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_sparsegpt_is_its_algorithm(share: float) -> None:
    weight, second = problem()
    found = remove(weight, second, Pattern(share), round(share * weight.numel()), SS)
    wanted = sparsegpt(weight, second, 16, share)
    assert torch.equal(found.mask, wanted == 0)
    torch.testing.assert_close(found.weight.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_one_block_is_the_optimum_for_its_mask(share: float) -> None:
    weight, second = problem()
    how = Removal("S", "M", None, DAMPING)
    found = remove(weight, second, Pattern(share), round(share * weight.numel()), how)
    assert int(found.mask.sum()) == round(share * weight.numel())
    wanted = best(weight, second, found.mask)
    torch.testing.assert_close(found.weight.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_mask_by_single_removal_is_equation_14() -> None:
    weight, second = problem()
    found = remove(weight, second, Pattern(0.5), 192, Removal("S", "M", None, DAMPING))
    scores = weight.double().square() / torch.linalg.inv(damped(second)).diagonal()
    assert torch.equal(found.mask, lowest(scores, 192))


def test_the_loss_of_equation_12_is_the_measured_error() -> None:
    weight, second = problem()
    found = remove(weight, second, Pattern(0.5), 192, Removal("S", "M", None, DAMPING))
    inverse, loss = torch.linalg.inv(damped(second)), 0.0
    for w, gone in zip(weight.double(), found.mask, strict=True):
        p = gone.nonzero()[:, 0]
        loss += float(w[p] @ torch.linalg.solve(inverse[p][:, p], w[p]))
    assert cost(weight, found.weight, second) == pytest.approx(loss, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.integers(2, 40),
    block=st.sampled_from([3, 8, 16, None]),
    share=st.floats(0.05, 0.95),
    dead=st.integers(0, 3),
    rank=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_apt_is_never_behind_sparsegpt_on_its_mask(
    rows: int, width: int, block: int | None, share: float, dead: int, rank: int, seed: int
) -> None:
    """Any shape, inputs that never fire, H of any rank."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, width, generator=generator)
    x[:, : min(dead, width - 1)] = 0
    second = (x.T @ x).double()
    weight = torch.randn(rows, width, generator=generator)
    count = round(share * weight.numel())
    ours, h = without_dead(weight, second)
    upper = inverse_factor(h, DAMPING)[0].float()
    single = remove(weight, second, Pattern(share), count, Removal("S", "S", block, DAMPING))
    assert int(single.mask.sum()) == count
    assert bool((single.weight[single.mask] == 0).all())
    # The same mask with every column of a block at once, and then with all kept weights free.
    e = all_at_once(ours, single.mask, upper)
    joint = (ours - e @ upper).masked_fill(single.mask, 0)
    assert cost(ours, joint, h) <= cost(ours, single.weight, h) * (1 + 1e-3) + 1e-4
    freed = polish(single.weight, single.mask, ours, h, pull=DAMPING, steps=6)
    assert bool((freed[single.mask] == 0).all())
    assert cost(ours, freed, h) <= cost(ours, single.weight, h) * (1 + 1e-3) + 1e-4


def test_a_block_is_solved_whatever_share_goes() -> None:
    weight, second = problem()
    upper = inverse_factor(second, DAMPING)[0].float()
    inverse = (upper.T @ upper).double()
    for share in (0.2, 0.5, 0.51, 0.9):
        mask = lowest(torch.rand(weight.shape), round(share * weight.numel()))
        z = torch.zeros(weight.shape, dtype=torch.float64)
        for i, gone in enumerate(mask):
            p = gone.nonzero()[:, 0]
            z[i, p] = torch.linalg.solve(inverse[p][:, p], weight[i, p].double())
        found = all_at_once(weight, mask, upper)
        torch.testing.assert_close(found.double(), z @ upper.T.double(), rtol=1e-3, atol=1e-3)


def test_one_by_one_removes_what_the_mask_says() -> None:
    weight, second = problem()
    upper = inverse_factor(second, DAMPING)[0].float()
    mask = torch.rand(weight.shape) < 0.5
    left = weight - one_by_one(weight, mask, upper) @ upper
    assert float(left[mask].abs().max()) < 1e-4


def test_rows_of_different_sizes_are_solved_together() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(40, 20, generator=generator)
    matrix = a.T @ a
    sets = torch.rand(30, 20, generator=generator) < torch.linspace(0, 1, 30)[:, None]
    b = torch.randn(30, 20, generator=generator)
    found = solve_in_rows(matrix, sets, b)
    for i, own in enumerate(sets):
        p = own.nonzero()[:, 0]
        wanted = torch.zeros(20)
        wanted[p] = torch.linalg.solve(matrix[p][:, p], b[i, p])
        torch.testing.assert_close(found[i], wanted, rtol=1e-3, atol=1e-3)


def in_rounds(weight: torch.Tensor, second: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """Half of the weights in parts of 7, 5, 3 and 1 in 16, each scored on what is left by then.

    The inverse's diagonal in each row is that of the kept set (exact), or the one before times
    1 - r^2 for each weight that is gone.
    """
    h, mask = damped(second), torch.zeros(weight.shape, dtype=torch.bool)
    whole, part = torch.linalg.inv(h), weight.numel() // 32
    correlation = whole / torch.outer(whole.diagonal(), whole.diagonal()).sqrt()
    for taken in (7, 12, 15, 16):
        scores = torch.full(weight.shape, torch.inf, dtype=torch.float64)
        left = best(weight, second, mask)
        for i in range(len(weight)):
            kept, gone = (~mask[i]).nonzero()[:, 0], mask[i].nonzero()[:, 0]
            if exact:
                diagonal = torch.linalg.inv(h[kept][:, kept]).diagonal()
            else:
                others = 1 - correlation[kept][:, gone].square()
                diagonal = whole.diagonal()[kept] * others.prod(1)
            scores[i, kept] = left[i, kept].square() / diagonal
        mask |= lowest(scores, part * taken - int(mask.sum()))
    return mask


def test_rounds_see_what_earlier_ones_did() -> None:
    weight, second = problem(rows=6, width=16)
    found = remove(weight, second, Pattern(0.5), 48, Removal("M", "M", None, DAMPING, rounds=4))
    assert torch.equal(found.mask, in_rounds(weight, second, exact=False))
    once = remove(weight, second, Pattern(0.5), 48, Removal("S", "M", None, DAMPING))
    assert cost(weight, found.weight, second) < cost(weight, once.weight, second)


def test_rounds_lose_what_those_with_whole_inverses_do() -> None:
    weight, second = problem(rows=24, width=48)
    costs = [
        cost(weight, best(weight, second, mask).float(), second)
        for mask in (
            in_rounds(weight, second, exact=False),
            in_rounds(weight, second, exact=True),
            remove(weight, second, Pattern(0.5), 576, Removal("S", "M", None, DAMPING)).mask,
        )
    ]
    about, exact, once = costs
    assert about <= exact + 0.5 * (once - exact)  # these inputs are far more alike than real ones


def test_systems_that_steps_do_not_solve_are_factorised(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(40, 20, generator=generator, dtype=torch.float64)
    matrix = a.T @ a
    sets = torch.rand(30, 20, generator=generator) < 0.5
    b = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    wanted = solve_in_rows(matrix, sets, b)
    monkeypatch.setattr(compensation, "MOST_STEPS", 3)
    near = solve_in_rows(matrix, sets, b, start=wanted * 0.9)
    torch.testing.assert_close(near, wanted, rtol=1e-9, atol=1e-9)
    assert bool((near[~sets] == 0).all())
    with pytest.raises(ArithmeticError, match="not finite"):
        solve_in_rows(matrix * torch.nan, sets, b)


def test_systems_may_be_solved_in_part() -> None:
    """In the norm of the preconditioner a thousandth of b may be left, and no more is asked."""
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(200, 60, generator=generator, dtype=torch.float64)
    matrix, sets = a.T @ a, torch.rand(9, 60, generator=generator) < 0.5
    b = torch.randn(9, 60, generator=generator, dtype=torch.float64)
    shares = []
    for asked in (0.1, 1e-3, 0.0):
        found = solve_in_rows(matrix, sets, b, share=asked)
        inside = sets / matrix.diagonal().sqrt()
        left = ((b - found @ matrix) * inside).norm(dim=1) / (b * inside).norm(dim=1)
        shares.append(float(left.max()))
    assert 1e-3 < shares[0] <= 0.1
    assert 1e-6 < shares[1] <= 1e-3
    assert shares[2] <= 1e-12


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "3:4", "1:2"])
@pytest.mark.parametrize("mask_by", ["S", "M"])
@pytest.mark.parametrize("compensate_by", ["S", "M"])
@pytest.mark.parametrize("block", [10, 16, None])
def test_n_of_m_is_n_of_m_in_every_row(
    text: str, mask_by: str, compensate_by: str, block: int | None
) -> None:
    weight, second = problem()
    pattern = parse_sparsity(text)
    how = Removal(mask_by, compensate_by, block, DAMPING)  # type: ignore[arg-type]
    found = remove(weight, second, pattern, 0, how)
    groups = (found.weight != 0).unflatten(1, (-1, pattern.group)).sum(2)
    assert bool((groups == pattern.kept).all())
    assert torch.equal(found.weight == 0, found.mask)


def test_the_first_group_gets_the_pattern_of_least_loss() -> None:
    weight, second = problem()
    found = remove(weight, second, parse_sparsity("2:4"), 0, Removal("M", "M", 4, DAMPING))
    inverse = torch.linalg.inv(damped(second))
    for w, gone in zip(weight.double(), found.mask[:, :4], strict=True):
        losses = {}
        for p in itertools.combinations(range(4), 2):
            i = list(p)
            losses[p] = float(w[i] @ torch.linalg.solve(inverse[i][:, i], w[i]))
        assert tuple(gone.nonzero()[:, 0].tolist()) == min(losses, key=losses.__getitem__)


def test_multiple_removal_beats_single_on_groups() -> None:
    weight, second = problem(rows=48, width=96)
    pattern = parse_sparsity("2:4")
    single = remove(weight, second, pattern, 0, SS)
    multiple = remove(weight, second, pattern, 0, Removal("M", "M", 16, DAMPING))
    assert cost(weight, multiple.weight, second) < cost(weight, single.weight, second)


def test_polishing_comes_to_the_optimum() -> None:
    weight, second = problem()
    start = remove(weight, second, Pattern(0.5), 192, SS)
    wanted = cost(weight, best(weight, second, start.mask).float(), second)
    errors = [
        cost(
            weight,
            polish(start.weight, start.mask, weight, second, pull=DAMPING, steps=n),
            second,
        )
        for n in (0, 1, 2, 4, 8, 40)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(cost(weight, start.weight, second))
    assert errors[-1] == pytest.approx(wanted, rel=1e-3)


def test_the_pull_is_the_one_that_other_windows_ask_for() -> None:
    """Against exact fits with every pull, on few windows of a known covariance."""
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(24, 24, generator=generator)
    few, many = (torch.randn(n, 24, generator=generator) @ mix for n in (30, 4000))
    fitted, other = ((x.T @ x).double() / len(x) for x in (few, many))
    weight = torch.randn(40, 24, generator=generator)
    mask = lowest(torch.rand(40, 24, generator=generator), 480)
    found = best_pull(weight * ~mask, mask, weight, fitted, other)
    errors = {}
    for pull in PULLS:
        h = fitted + pull * fitted.diagonal().mean() * torch.eye(24).double()
        new = torch.zeros(40, 24, dtype=torch.float64)
        for i, gone in enumerate(mask):
            kept = (~gone).nonzero()[:, 0]
            new[i, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ weight[i].double())
        errors[pull] = relative_error(weight, new.float(), other)
    assert errors[found] <= min(errors.values()) * 1.03
    assert found > PULLS[0]  # thirty tokens cannot fit twenty-four weights as they are
    assert best_pull(weight * ~mask, mask, weight, other, other) == PULLS[0]


def test_dead_inputs_go_first_and_cost_nothing() -> None:
    weight, second = problem()
    second[:8] = 0
    second[:, :8] = 0
    for how in (SS, Removal("M", "M", None, DAMPING, rounds=4)):
        found = remove(weight, second, Pattern(0.25), 96, how)
        assert bool((found.weight[:, :8] == 0).all())
        if how.block is None:
            assert relative_error(weight, found.weight, second) == pytest.approx(0, abs=1e-9)


def test_what_is_not_finite_is_said() -> None:
    weight, second = problem()
    second[3, 3] = torch.inf
    with pytest.raises(ArithmeticError, match="the Gram matrix is not finite"):
        remove(weight, second, Pattern(0.5), 10, SS)


def test_relative_error_is_that_of_the_output() -> None:
    generator = torch.Generator().manual_seed(5)
    x, w = torch.randn(200, 10, generator=generator), torch.randn(4, 10, generator=generator)
    new = w * (torch.rand(4, 10, generator=generator) > 0.5)
    second = (x.T @ x).double() / 200
    wanted = float((x @ (new - w).T).square().sum() / (x @ w.T).square().sum())
    assert relative_error(w, new, second) == pytest.approx(wanted, rel=1e-5)
    assert relative_error(w * 0, w * 0, second) == 0


# ---- masks -----------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 6), width=st.integers(1, 20), share=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_masks_have_the_number_that_was_asked(
    rows: int, width: int, share: float, seed: int
) -> None:
    """Many ties too."""
    scores = torch.randint(0, 4, (rows, width), generator=torch.Generator().manual_seed(seed))
    count = int(share * rows * width)
    whole, each = lowest(scores.double(), count), lowest_in_rows(scores.double(), count)
    assert int(whole.sum()) == int(each.sum()) == count
    first = scores.flatten().argsort(stable=True)[:count]  # ties go by place
    assert whole.flatten().nonzero()[:, 0].tolist() == sorted(first.tolist())
    if 0 < count < rows * width:
        assert scores[whole].max() <= scores[~whole].min()
    counts = each.sum(1)
    assert int(counts.max() - counts.min()) <= 1
    for row, mask in zip(scores, each, strict=True):
        if 0 < int(mask.sum()) < width:
            assert row[mask].max() <= row[~mask].min()


def test_the_highest_of_each_group_stay() -> None:
    scores = torch.tensor([[1.0, 5, 3, 4, 9, 9, 9, 0]])
    assert lowest_in_groups(scores, 2, 4).tolist() == [
        [True, False, True, False, True, False, False, True]
    ]


def test_every_removal_set_is_there_once() -> None:
    assert len(removal_sets(2, 4)) == 6
    assert len(removal_sets(4, 8)) == 70
    assert {tuple(s) for s in removal_sets(1, 4).tolist()} == {
        (0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)
    }  # fmt: skip


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        removal_sets(8, 16)
    assert str(caught.value) == (
        "sparsity 8:16 has 12,870 patterns a group, of which a mask by multiple removal compares "
        "each; allowed are up to 1,000: use --solution SM, or a smaller group such as 4:8"
    )


@pytest.mark.parametrize(
    ("text", "share", "kept", "group"),
    [("50%", 0.5, 0, 0), (" 12.5 %", 0.125, 0, 0), ("2:4", 0.5, 2, 4), ("1 : 4", 0.75, 1, 4)],
)
def test_sparsities(text: str, share: float, kept: int, group: int) -> None:
    assert parse_sparsity(text) == Pattern(share, kept, group)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4:4", "N:M keeps N of every M inputs, so N must be from 1 to M - 1, such as 2:4"),
        ("0:4", "N:M keeps N of every M inputs, so N must be from 1 to M - 1, such as 2:4"),
        (
            "0.5",
            "write the share of zeros with a percent sign, such as 50%, or how many of consecutive "
            "inputs are kept, such as 2:4",
        ),
        ("0%", "the share must be above 0% and below 100%"),
        ("100%", "the share must be above 0% and below 100%"),
    ],
)
def test_sparsities_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_sparsity(text)
    assert str(caught.value) == f"sparsity is {text!r}: {said}"


def test_groups_must_fit() -> None:
    check_groups(Pattern(0.5), "fc1", 7)
    check_groups(parse_sparsity("2:4"), "fc1", 8)
    with pytest.raises(RecipeError) as caught:
        check_groups(parse_sparsity("2:4"), "fc1", 10)
    assert str(caught.value) == (
        "sparsity 2:4 wants inputs in groups of 4, but fc1 has 10: leave it out with --set "
        "leave='[fc1]', or choose a group that divides it"
    )
