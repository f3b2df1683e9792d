"""Bad matrices: every solver goes down one documented ladder and tells each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import bytes_of

from secateur.methods import Block, Method
from secateur.numerics import cut_by
from secateur.plans import BlockCut
from secateur.pruning import prune
from secateur.recipe import make_recipe
from secateur.report.pruning import PAGE
from secateur.solvers import ladder, removal, sparse_fit
from secateur.solvers.brain_surgeon import GreedyOrder
from secateur.solvers.gram import cholesky, gram, ordering
from secateur.solvers.inverses import WholeInverse
from secateur.solvers.mask_tuning import MaskCurve, guarded
from secateur.solvers.refit import refit
from secateur.sparsity import Pattern
from secateur.statistics import Channels, Moments

P, Q, TOKENS = 6, 16, 64


def second_moment(kind: str) -> torch.Tensor:
    """E[x x^T] of inputs with one fault, (Q, Q)."""
    x = torch.randn(TOKENS, Q, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if kind == "rank-deficient":
        x = x[:3]
    elif kind == "dead":
        x[:, 4:9] = 0
    elif kind == "all dead":
        x[:] = 0
    elif kind == "duplicate":
        x[:, 8:] = x[:, :8]
    elif kind == "huge":
        x *= 1e30
    elif kind == "tiny":
        x *= 1e-30
    elif kind == "one massive":
        x[7, 3] = 1e12
    return x.T @ x / len(x)


FAULTS = (
    "rank-deficient", "dead", "all dead", "duplicate", "huge", "tiny", "one massive",
)  # fmt: skip
weight = torch.randn(P, Q, generator=torch.Generator().manual_seed(1))
WAYS = {
    "sparsegpt": removal.Removal("S", "S", 4, 0.01, shrinking=True),
    "apt MM": removal.Removal("M", "M", 8, 0.1, rounds=2),
    "apt MM, no damping to speak of": removal.Removal("M", "M", None, 1e-14, rounds=3),
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.5, 2, 4)], ids=str)
def test_zeros_of_a_bad_matrix_are_finite(kind: str, way: str, pattern: Pattern) -> None:
    count = P * Q // 2
    found = removal.remove(weight, second_moment(kind), pattern, count, WAYS[way])
    assert bool(torch.isfinite(found.weight).all())
    assert int(found.mask.sum()) == count
    assert bool((found.weight[found.mask] == 0).all())


@pytest.mark.parametrize("kind", FAULTS)
def test_units_and_fits_of_a_bad_matrix_are_finite(kind: str) -> None:
    second = second_moment(kind)
    for unit in (1, 4):
        order = GreedyOrder(weight, WholeInverse(second, 1e-12), unit=unit)
        assert sorted(order.order.tolist()) == list(range(Q))
        kept = order.kept(8)
        for pull in (1e-14, 0.1):
            fitted = refit(weight, second, kept, pull)
            assert bool(torch.isfinite(fitted).all())
    curve = MaskCurve(ordering(gram(weight, second)), torch.arange(Q).double(), 1e-12)
    scales, _ = guarded(curve.tuned(8))
    assert bool(torch.isfinite(scales).all())
    polished = sparse_fit.polish(
        weight.masked_fill(weight < 0, 0), weight < 0, weight, second, pull=0.1, steps=5
    )
    assert bool(torch.isfinite(polished).all())


def steps(work: Callable[[], Any]) -> list[str]:
    with ladder.listening() as heard, ladder.solving_for("down"):
        work()
    return ladder.texts(heard)


def test_a_good_matrix_takes_no_step() -> None:
    second = second_moment("good")
    assert steps(lambda: cholesky(second, 0.01)) == []
    assert steps(lambda: removal.remove(weight, second, Pattern(0.5), 48, WAYS["apt MM"])) == []
    assert steps(lambda: GreedyOrder(weight, WholeInverse(second, 0.01), unit=4)) == []


def test_more_damping_is_told_with_its_amount() -> None:
    second = torch.ones(4, 4, dtype=torch.float64)
    second[0, 1] = second[1, 0] = 1.05  # as rounding may leave it, only larger
    told = steps(lambda: cholesky(second, 1e-3))
    assert told == ["down: more damping (0.1 of the mean diagonal)"]
    kept = torch.arange(4)
    told = steps(lambda: refit(weight[:, :4], second, kept, 1e-3))
    assert told == ["down: more damping (a pull of 0.1)"]


def test_a_singular_system_is_solved_by_least_squares() -> None:
    singular = torch.ones(3, 3, dtype=torch.float64)
    right = torch.full((3, 1), 6.0, dtype=torch.float64)
    found: list[torch.Tensor] = []
    told = steps(lambda: found.extend([ladder.solve(singular, right), ladder.inverse(singular)]))
    assert told == ["down: least squares"]  # each step is told once
    torch.testing.assert_close(found[0], torch.full((3, 1), 2.0, dtype=torch.float64))
    torch.testing.assert_close(found[1], singular / 9)


def test_float32_systems_that_fail_are_done_in_float64() -> None:
    # Of condition 1e9: too much for float32, not for float64.
    near = torch.tensor([[1.0, 1.0], [1.0, 1.0]]) + torch.diag(torch.tensor([0.0, 1e-7]))
    good = torch.eye(2)
    found: list[torch.Tensor] = []
    told = steps(lambda: found.append(ladder.factors(torch.stack([good, near - 2e-7 * good]))))
    assert told[0].startswith("down: ")
    torch.testing.assert_close(found[0][0], good)
    assert bool(torch.isfinite(found[0]).all())


def test_a_system_that_nothing_helps_leaves_weights_alone() -> None:
    wrong = torch.tensor([[[1.0, 50.0], [50.0, 4.0]]])  # no second moment is like this
    found: list[torch.Tensor] = []
    assert steps(lambda: found.append(ladder.factors(wrong))) == ["down: no tuning"]
    torch.testing.assert_close(found[0][0], torch.diag(torch.tensor([1.0, 2.0])))


def test_what_overflows_float32_is_done_in_float64() -> None:
    # Its inverse factor has entries of 1e42.
    second = second_moment("good") * 1e-84
    found: list[removal.Sparse] = []
    way = WAYS["sparsegpt"]
    told = steps(lambda: found.append(removal.remove(weight, second, Pattern(0.5), 48, way)))
    assert told == ["down: float64"]
    wanted = removal.remove(weight, second * 1e84, Pattern(0.5), 48, way)
    assert torch.equal(found[0].mask, wanted.mask)
    torch.testing.assert_close(found[0].weight, wanted.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_statistics_that_are_not_finite_are_refused(bad: float) -> None:
    second = second_moment("good")
    second[2, 2] = bad
    for work in (
        lambda: cholesky(second, 0.01),
        lambda: ladder.inverse(second),
        lambda: ladder.factors(second[None]),
        lambda: removal.remove(weight, second, Pattern(0.5), 48, WAYS["apt MM"]),
    ):
        with pytest.raises(ArithmeticError, match="not finite"):
            work()


def test_sums_of_squares_beyond_float32() -> None:
    x = torch.tensor([[3e20, 1.0], [1e20, -2.0]])
    moments = Moments.empty(2, torch.device("cpu"))
    channels = Channels.empty(2, torch.device("cpu"))
    told = steps(lambda: (moments.add(x), channels.add(x)))
    assert told == ["down: float64 (an activation above 1e19)"]
    torch.testing.assert_close(moments.second, x.double().T @ x.double())
    torch.testing.assert_close(channels.norm, x.double().norm(dim=0))


# ---- what is written -------------------------------------------------------------------------


class Fits(Method):
    """Fits whatever it was given."""

    given: BlockCut

    def __init__(self) -> None:
        pass

    def cut(self, block: Block, quota: int) -> BlockCut:
        return self.given


def fitted(new: torch.Tensor, dtype: torch.dtype, **more: Any) -> tuple[BlockCut, list[str]]:
    method = Fits()
    method.given = BlockCut(3, inputs={"down": torch.tensor([0, 2])}, weights={"down": new}, **more)
    block = Block(3, None, {"down": weight}, {}, torch.Generator())  # type: ignore[arg-type]
    with ladder.listening() as heard:
        cut = cut_by(method, block, 1, dtype)
    return cut, ladder.texts(heard)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(7e4, torch.float16), (math.nan, torch.float32), (-math.inf, torch.bfloat16)],
)
def test_fitted_weights_that_cannot_be_written_give_way(value: float, dtype: torch.dtype) -> None:
    new = weight[:, [0, 2]] * 2
    new[1, 1], new[2, 0] = value, 0.0
    cut, told = fitted(new, dtype, notes={"error": {"down": math.nan, "up": 0.25}})
    short = str(dtype).removeprefix("torch.")
    assert told == [f"down: no tuning (fitted weights do not fit {short})"]
    wanted = weight[:, [0, 2]].clone()
    wanted[2, 0] = 0  # what the method removed stays removed
    assert torch.equal(cut.weights["down"], wanted)
    assert cut.notes == {"error": {"up": 0.25}}  # JSON knows no NaN


def test_fitted_weights_that_can_be_written_stay() -> None:
    new = weight[:, [0, 2]] * 2
    cut, told = fitted(new, torch.float16, scales={"up": torch.full((2,), math.inf)})
    assert cut.weights["down"] is new
    assert told == ["up: no tuning (scaled weights do not fit float16)"]
    assert cut.scales == {}


def test_scales_that_push_weights_out_of_float16_give_way() -> None:
    cut, told = fitted(weight[:, [0, 2]], torch.float16, scales={"down": torch.full((2,), 6e4)})
    assert told == ["down: no tuning (scaled weights do not fit float16)"]
    assert cut.scales == {}


def test_the_report_says_where(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer whose factorisation fails at the asked damping, through to the pages and the line."""
    real = torch.linalg.cholesky_ex
    calls = [0]

    def fails_once(matrix: torch.Tensor, **more: Any) -> Any:
        found = real(matrix, **more)
        calls[0] += matrix.ndim == 2
        if calls[0] == 1 and matrix.ndim == 2:
            calls[0] += 1
            return found[0], torch.ones_like(found[1])
        return found

    recipe = make_recipe(
        remove="20%", method="comp", calibration={"samples": 2, "length": 16},
        options={"layers": 0, "exempt_first": 0, "exempt_last": 0, "inputs": "sequential"},
    )  # fmt: skip
    source = model_folder("llama-gqa-tied")
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", fails_once)
        result = prune(source, tmp_path / "out", recipe, verify=False)
    line = "self_attn.o_proj: more damping (1 of the mean diagonal)"
    assert [cut.notes.get("numerics") for cut in result.plan.blocks] == [[line], None, None, None]
    assert line in bytes_of(tmp_path / "out")["secateur.json"].decode()
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert f"block 0, {line}" in page
    assert f"block 0, {line}" in bytes_of(tmp_path / "out")["README.md"].decode()
    prune(source, tmp_path / "good", recipe, verify=False)
    assert "steps of numerics" not in (tmp_path / "good" / PAGE).read_text(encoding="utf-8")
