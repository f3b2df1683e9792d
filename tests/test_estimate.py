"""What a run is estimated to take, against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import rereading
from secateur.checkpoint import open_checkpoint
from secateur.engine import Engine
from secateur.estimate import Work, estimate, work_of
from secateur.fit_text import TextWork, text_work
from secateur.forms import Form
from secateur.methods import Method, get_method
from secateur.methods.chain import Chain
from secateur.progress import Progress
from secateur.replaying import MOST_KEPT, kept_bytes, second_pass
from secateur.sparsity import parse_sparsity
from secateur.statistics import moments_work
from secateur.streaming import Stream

Folder = Callable[[str], Path]
#: Weights of layers as a part of those of a block: attention with two KV groups for four heads,
#: three layers of the FFN, two norms.
BLOCK = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32
QKV, OUT, DOWN = 32 * (32 + 16 + 16) / BLOCK, 32 * 32 / BLOCK, 32 * 48 / BLOCK
#: What runs before the last signal, the input of the down projection, is there.
TO_DOWN = QKV + OUT + 2 * DOWN


def method(name: str, sparsity: str | None = None, **options: Any) -> Method:
    pattern = None if sparsity is None else parse_sparsity(sparsity)
    found = get_method(name, options, Form(sparsity=pattern))
    assert isinstance(found, Method)
    return found


@pytest.mark.parametrize(
    ("name", "sparsity", "options", "wanted"),
    [
        ("comp", None, {"layers": 0}, Work(2, 0, 1)),  # the layer stage, and a look at each block
        ("comp", None, {"layers": 0, "inputs": "sequential"}, Work(2 + TO_DOWN, 0, 1)),
        ("comp", None, {"layers": "auto"}, Work(6, 2, 3)),  # two trials: one block, and none
        # Tokens in relation to what a block puts out: the look is a whole pass.
        ("obs", None, {"layers": 0}, Work(3, 0, 1)),
        # Of the second pass the down projection alone.
        ("obs", None, {"layers": 0, "groups": "keep"}, Work(2 + DOWN, 0, 1)),
        ("obs", None, {"layers": 0, "gradients": 0.5}, Work(7, 3, 1)),
        ("obs", None, {"gradients": 0.5}, Work(17, 8, 3)),  # a pass back for all trials
        ("flap", None, {}, Work(2, 0, 1)),  # looks ahead
        ("random", None, {}, Work(0, 0, 1)),
        ("llm-pruner", None, {}, Work(4, 3, 1)),
        ("wanda", "50%", {"scope": "block"}, Work(1 + TO_DOWN, 0, 1)),
        # Attention, FFN, and the FFN that is left behind what attention put out the last time.
        ("wanda", "50%", {"scope": "sublayer"}, Work(QKV + TO_DOWN + 3 * DOWN, 0, 1)),
        ("apt", "2:4", {"scope": "layer"}, Work(2 * QKV + OUT + TO_DOWN + 3 * DOWN, 0, 1)),
        ("apt", "50%", {"allocation": "owl", "scope": "block"}, Work(2 + TO_DOWN, 0, 1)),
        ("magnitude", "50%", {}, Work(0, 0, 1)),
    ],
)
def test_passes_of_a_run(
    name: str, sparsity: str | None, options: dict[str, Any], wanted: Work, model_folder: Folder
) -> None:
    stream = Stream(open_checkpoint(model_folder("llama-gqa-tied")))
    asked = method(name, sparsity, **options)
    engine = Engine(
        stream,
        asked,
        to_remove=round(1.5 * stream.anatomy.block_parameters),
        seed=0,
        dtype=torch.float32,
        progress=Progress(),
    )
    found = work_of(
        asked, stream.anatomy, engine.layer_counts(), 1000, asked.survey_by(stream.anatomy, 1000)
    )
    assert found == replace(wanted, passes=pytest.approx(wanted.passes))


def test_operations_of_cuts_are_counted_layer_by_layer(model_folder: Folder) -> None:
    anatomy = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy
    tokens = 1000
    shapes = [(d.rows, d.inputs) for d in anatomy.denses.values()]
    signals = {d.reads: d.inputs for d in anatomy.denses.values()}
    grams = sum(2 * tokens * q**2 + 3 * q**3 for q in signals.values())

    assert method("wanda", "50%").solving(anatomy, tokens) == 0
    assert method("magnitude", "50%").solving(anatomy, tokens) == 0
    columns = sum(3 * p * q**2 for p, q in shapes)  # the error, and what goes to the right
    assert method("sparsegpt", "50%").solving(anatomy, tokens) == grams + columns
    single = method("apt", "50%", solution="SS").solving(anatomy, tokens)
    assert single == grams + columns
    # Sixteen products of all rows with the inverse of 16 columns; four products behind them.
    many = method("apt", "50%", solution="SM", block=16, polish=4, pull=0.1)
    systems = sum(16 * 2 * p * q * 16 for p, q in shapes)
    polish = sum(4 * 2 * p * q**2 for p, q in shapes)
    assert many.solving(anatomy, tokens) == pytest.approx(grams + columns + systems + polish)
    searched = method("apt", "50%", solution="SM", block=16, polish=4).solving(anatomy, tokens)
    assert searched > many.solving(anatomy, tokens)

    both = Chain(method("comp"), method("apt", "50%"))
    parts = method("comp"), method("apt", "50%")
    assert both.solving(anatomy, tokens) == sum(m.solving(anatomy, tokens) for m in parts)


def test_few_tokens_take_less_than_a_matrix_of_all_inputs() -> None:
    assert moments_work(1000, 501) == 501 * 1000 * (1000 + 256) + 3 * 1000**3
    assert moments_work(100, 501) == 2 * 501 * 100**2 + 3 * 100**3
    assert moments_work(1000, 500) == 6 * 1000 * 500**2
    assert moments_work(1000, 100) < moments_work(1000, 400)


def test_a_large_block_waits_while_its_layers_are_solved(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    anatomy = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy
    signals = {"heads", "neurons"}
    heads, neurons = (
        anatomy.denses[name].inputs for name in anatomy.consumers("values", "neurons")
    )
    largest = max(d.rows * d.inputs for d in anatomy.denses.values())
    parameters = anatomy.block_parameters
    assert neurons > heads

    def matrices(tokens: int, *, waits: bool) -> int:
        found = estimate(
            anatomy,
            signals,
            windows=1,
            length=tokens,
            hidden=heads,
            vocabulary=8,
            passes=1,
            solver=method("comp").solver_bytes(anatomy, tokens),
            waits=waits,
        )
        return found.parts["a block and its matrices"]

    many = 8 * neurons**2 + 8 * heads**2  # second moments in float64
    kept = 6 * parameters + 6 * 8 * neurons**2 + many
    assert matrices(10 * neurons, waits=False) == kept
    assert matrices(10 * neurons, waits=True) == kept  # it is no large one
    monkeypatch.setattr(rereading, "LARGE_BLOCK", 1)
    assert matrices(10 * neurons, waits=False) == kept
    solved = 10 * largest + 6 * 8 * neurons**2 + many
    assert matrices(10 * neurons, waits=True) == solved < kept
    # Two tokens are kept as they are, and then the block itself is the most that there is.
    assert matrices(2, waits=True) == max(
        6 * parameters + 8 * (neurons + heads),
        10 * largest + 8 * (neurons + heads) + 12 * neurons**2,
        10 * parameters,
    )


def test_what_solving_one_layer_takes(model_folder: Folder) -> None:
    anatomy = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy
    hidden, neurons = 32, 48
    whole = 6 * 8 * neurons**2
    for name, sparsity in (("comp", None), ("obs", None), ("fpt", None), ("apt", "2:4")):
        assert method(name, sparsity).solver_bytes(anatomy, 25) == whole
    # Few tokens: COMP's Gram matrix in place; APT and FPT make all of it however few they are.
    assert method("comp").solver_bytes(anatomy, 16) == 12 * neurons**2
    assert method("comp").solver_bytes(anatomy, 24) == 6 * 8 * hidden**2  # many for attention
    assert method("comp", order="obs").solver_bytes(anatomy, 24) == whole
    assert method("apt", "2:4").solver_bytes(anatomy, 24) == whole
    assert method("flap").solver_bytes(anatomy, 24) == 0
    # obs, which of 10 tokens makes nothing of all inputs: what its order holds, or what its fit
    # does, of the attention output and the down projection.
    order = 8 * 10 * neurons + 8 * hidden * neurons + 8 * neurons * neurons // 2
    fit = (4 + 12) * hidden * neurons + 4 * 10 * neurons + (16 + 4) * hidden * 10 + 8 * 10**2
    assert fit > order
    assert method("obs").solver_bytes(anatomy, 10) == fit
    assert method("obs", refit=False, groups="keep").solver_bytes(anatomy, 10) == order
    many = method("obs").solver_bytes(anatomy, 20)  # of these 32 inputs a matrix is made
    assert many == max(6 * 8 * hidden**2, fit + 10 * (4 * neurons + 20 * hidden) + 8 * 300)
    both = Chain(method("comp"), method("apt", "2:4"))  # type: ignore[arg-type]
    assert both.solver_bytes(anatomy, 24) == whole


def test_activations_of_a_call_are_gone_when_layers_are_solved(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    anatomy = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy

    def activations(solver: int) -> int:
        found = estimate(
            anatomy, set(), windows=1, length=64, hidden=32, vocabulary=8, passes=1, solver=solver
        )  # fmt: skip
        return found.parts["activations"]

    call, between = 4 * 64 * (3 * 48 + 6 * 32), 4 * 64 * 32 * 3
    held, block = 6 * anatomy.block_parameters, 10 * anatomy.block_parameters
    assert held + call > block  # more than what is new of the block
    assert activations(10**9) == call + between  # small pieces may stay with the process
    monkeypatch.setattr("secateur.estimate.NOT_GIVEN_BACK", 0)
    assert activations(0) == held + call - block + between
    assert activations(10**9) == between


def test_what_making_text_takes(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten windows, three of them for judging: copies of seven, a fifth of each drawn anew."""
    anatomy = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy
    found = text_work(method("obs", copies=4, written=64), anatomy, 10, 128)
    assert found.windows == 10 + 4 * 7 + 64
    assert found.passes == pytest.approx((28 + 64) / 102)
    assert found.heads == pytest.approx((0.2 * 28 + 64) / 102)
    assert text_work(method("comp"), anatomy, 10, 128) == TextWork(10, 0, 0)
    monkeypatch.setattr("secateur.methods.obs.SMALL", 0)  # copies of a large model: one pass
    found = text_work(method("obs", copies=4), anatomy, 10, 128)
    assert (found.windows, found.passes) == (38, pytest.approx(7 / 38))


def test_a_second_pass_is_whole_where_too_much_would_be_kept(model_folder: Folder) -> None:
    anatomy = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy
    asked = method("obs", layers=0, groups="keep", rounds=0)
    most = MOST_KEPT // (4 * (48 + 32))  # neurons, and what attention puts out
    assert kept_bytes(asked, anatomy, most) == 4 * most * (48 + 32)
    assert kept_bytes(asked, anatomy, most + 1) == 0
    assert second_pass(asked, anatomy, most) == pytest.approx(DOWN)
    assert second_pass(asked, anatomy, most + 1) == 1
    anew = method("obs", layers=0, groups="keep", rounds=1)  # neurons are others behind the cut
    assert kept_bytes(anew, anatomy, 10) == 4 * 10 * 32
    assert second_pass(anew, anatomy, 10) == pytest.approx(3 * DOWN)
    assert kept_bytes(method("comp", groups="keep"), anatomy, 10) == 0  # has no second pass
    assert second_pass(method("comp", groups="keep"), anatomy, 10) == 0
    assert kept_bytes(method("wanda", "50%", scope="block"), anatomy, 10) == 0
    assert kept_bytes(method("wanda", "50%", scope="sublayer"), anatomy, 10) == 4 * 10 * 32


def test_comp_factors_a_matrix_of_all_inputs_however_few_the_tokens(model_folder: Folder) -> None:
    anatomy = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy
    heads, neurons = (anatomy.denses[n] for n in anatomy.consumers("values", "neurons"))
    for tokens in (2, 1000):
        wanted = sum(
            (d.rows + tokens) * d.inputs**2 + 2 / 3 * d.inputs**3 for d in (heads, neurons)
        )
        found = method("comp").solving(anatomy, tokens)
        assert found == pytest.approx(wanted)


def test_gradients_stand_beside_a_block_that_is_not_cut_yet(model_folder: Folder) -> None:
    anatomy = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy

    def parts(asked: Method) -> dict[str, int]:
        return estimate(
            anatomy, set(), windows=1, length=64, hidden=32, vocabulary=8, passes=1,
            gradients=asked.gradients_held,
        ).parts  # fmt: skip

    first, second = method("llm-pruner"), method("llm-pruner", score="param_second")
    cut = 10 * anatomy.block_parameters  # weights in float32 and what is written of them
    for asked, copies in ((first, 3), (second, 4)):  # the block, a call's, and one or two sums
        found = parts(asked)
        assert found["a block and its matrices"] == cut
        assert found["gradients of a block"] == copies * 4 * anatomy.block_parameters - cut
