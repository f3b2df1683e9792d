"""Copies of calibration windows that the model draws itself, and what an engine does with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_outputs import random_tokens
from transformers import AutoModelForCausalLM

from secateur.anatomy import Anatomy
from secateur.authoring import Author
from secateur.checkpoint import open_checkpoint
from secateur.drawing import drawn
from secateur.engine import Engine
from secateur.fit_text import FitText
from secateur.forms import Form
from secateur.methods import Method, get_method
from secateur.progress import Progress
from secateur.resampling import Resampler
from secateur.streaming import Stream

Folder = Callable[[str], Path]


def resampler(folder: Path, rate: float = 0.5, seed: int = 0, chained: bool = True) -> Resampler:
    stream = Stream(open_checkpoint(folder))
    return Resampler(stream, rate=rate, seed=seed, progress=Progress(), chained=chained)


@pytest.mark.parametrize("chained", [True, False])
def test_copies_are_the_same_whichever_windows_are_asked_for(
    chained: bool, model_folder: Folder
) -> None:
    folder, tokens = model_folder("llama-gqa-tied"), random_tokens(4, 10)
    make = partial(resampler, folder, chained=chained)
    made = make().copies(tokens, 2)
    assert made.shape == (2, 4, 10)
    asked_before = make()
    assert torch.equal(asked_before.copies(tokens, 1), made[:1])
    assert torch.equal(asked_before.copies(tokens[:3], 2), made[:, :3])
    assert torch.equal(make().copies(tokens[:3], 2), made[:, :3])
    assert not torch.equal(make(seed=1).copies(tokens, 2), made)
    assert asked_before.copies(tokens, 0).shape == (0, 4, 10)


@pytest.mark.parametrize(("chained", "passes"), [(True, 3), (False, 1)])
def test_copies_start_from_the_one_before_or_all_from_one_pass(
    chained: bool, passes: int, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_by = resampler(model_folder("llama-gqa-tied"), chained=chained)
    run, calls = Stream.forward, []
    monkeypatch.setattr(Stream, "forward", lambda *args: calls.append(args[1]) or run(*args))
    tokens = random_tokens(6, 20)
    copies = made_by.copies(tokens, 3)
    assert len(calls) == passes
    for number, copy in enumerate(copies):
        before = copies[number - 1] if chained and number else tokens
        replaced, _ = made_by._places(tokens, number)
        assert torch.equal(copy[:, 1:][~replaced], before[:, 1:][~replaced])
        assert not torch.equal(copy[:, 1:][replaced], before[:, 1:][replaced])


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_share_of_drawn_tokens_and_the_first_that_stays(
    rate: float, model_folder: Folder
) -> None:
    tokens = random_tokens(20, 24)
    made = resampler(model_folder("llama-gqa-tied"), rate).copies(tokens, 1)[0]
    assert torch.equal(made[:, 0], tokens[:, 0])
    changed = float((made[:, 1:] != tokens[:, 1:]).double().mean())
    # A draw may fall on the old token, but a random model gives that some percent at most.
    assert changed == pytest.approx(rate, abs=0.08)


def test_tokens_are_drawn_from_the_models_own_odds(model_folder: Folder) -> None:
    """Frequencies of the token behind one context, over many windows, against the whole model."""
    folder = model_folder("llama-gqa-tied")
    start = random_tokens(1, 3)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        odds = model(input_ids=start).logits[0, 0].softmax(-1)
    made = resampler(folder, rate=1.0).copies(start.repeat(3000, 1), 1)[0]
    counts = torch.bincount(made[:, 1], minlength=len(odds)).double()
    wanted = odds.double() * len(made)
    # Pearson's statistic has the number of tokens as its mean, and twice that as its variance.
    statistic = float(((counts - wanted) ** 2 / wanted).sum())
    assert abs(statistic - len(odds)) < 5 * (2 * len(odds)) ** 0.5


def test_what_fits_are_judged_by_has_no_copies(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windows behind the held-out ones are originals; copies are of the others alone."""
    stream = Stream(open_checkpoint(model_folder("llama-gqa-tied")))
    options = {"copies": 2, "written": 0, "layers": 0, "exempt_first": 2}
    method = get_method("obs", options, Form("coupled"))
    engine = Engine(
        stream, method, to_remove=1000, seed=3, dtype=torch.float32, progress=Progress()
    )
    tokens = random_tokens(10, 12)
    windows, late = engine.text.windows(tokens)
    assert late == 3
    assert len(windows) == 7 + 2 * 7 + 3
    assert torch.equal(windows[:7], tokens[:7])
    assert torch.equal(windows[-3:], tokens[-3:])
    copies = windows[7:21].reshape(2, 7, 12)
    assert torch.equal(copies[:, :, 0], tokens[:7, 0].expand(2, 7))
    assert not torch.equal(copies[0], tokens[:7])

    apart: list[int | None] = []
    monkeypatch.setattr(
        "secateur.inside.gather",
        lambda module, readers, kind, after=None, *_, **__: apart.append(after) or _nothing(),
    )
    choice = engine.choose_layers(tokens)
    shares = engine.shares(choice, tokens)
    with pytest.raises(KeyError):  # no statistics were gathered
        engine.neuron_stage(choice.layers, shares, tokens)
    assert apart == [None, None, 21 * 12]  # two exempt blocks need none


def _nothing() -> object:
    from contextlib import nullcontext

    return nullcontext(({}, {}))


@pytest.mark.parametrize(("windows", "length", "copies"), [(10, 128, 8), (64, 512, 0), (2, 16, 8)])
def test_copies_by_default(windows: int, length: int, copies: int, model_folder: Folder) -> None:
    small = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy
    large = replace(small, layers=10**6)  # its blocks are too many to write text with

    def made(name: str, options: dict[str, int | bool], anatomy: Anatomy = large) -> int:
        method = get_method(name, options, Form("coupled"))
        assert isinstance(method, Method)
        return method.copies(anatomy, windows, length)

    assert made("obs", {}) == copies
    assert made("obs", {}, small) == min(copies, 4)
    assert made("obs", {"written": 0}, small) == copies
    assert made("obs", {"refit": False}) == 0
    assert made("obs", {"copies": 3}, small) == 3
    assert made("comp", {}) == 0


@pytest.mark.parametrize(
    ("width", "windows", "length", "copies"),
    [
        (4096, 10, 128, 8),  # whole second moments are small
        (5632, 10, 128, 1),  # 22 windows are half as many tokens: 10 and 7
        (11008, 10, 128, 4),  # 43 windows: 10 and four times the 7 that no fit is judged by
        (16384, 10, 128, 7),  # 64 windows: 10 and seven times 7
        (11008, 40, 128, 0),  # one copy of 28 windows beside 40 is too much
        (11008, 6, 1024, 0),  # too many tokens to begin with, and enough
        (11008, 30, 192, 1),  # too many to begin with, so that more cost no more memory
    ],
)
def test_copies_leave_tokens_of_wide_layers_few(
    width: int, windows: int, length: int, copies: int, model_folder: Folder
) -> None:
    anatomy = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy
    widened = {
        name: replace(dense, inputs=width) if dense.reads == "neurons" else dense
        for name, dense in anatomy.denses.items()
    }
    method = get_method("obs", {}, Form("coupled"))
    assert isinstance(method, Method)
    assert method.copies(replace(anatomy, denses=widened, layers=10**6), windows, length) == copies
    told = get_method("obs", {"copies": 8}, Form("coupled"))
    assert isinstance(told, Method)
    assert told.copies(replace(anatomy, denses=widened, layers=10**6), windows, length) == 8


# ---- windows that the model writes -----------------------------------------------------------


def author(folder: Path, seed: int = 0) -> Author:
    return Author(Stream(open_checkpoint(folder)), seed=seed, progress=Progress())


def test_written_windows_are_the_same_however_many_are_asked_for(model_folder: Folder) -> None:
    folder = model_folder("llama-gqa-tied")
    state = torch.get_rng_state()
    made = author(folder).windows(70, 12)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws are disturbed
    assert made.shape == (70, 12)
    assert torch.equal(author(folder).windows(5, 12), made[:5])
    one = author(folder)
    assert torch.equal(one.windows(3, 12), made[:3])
    assert torch.equal(one.windows(66, 12), made[:66])
    assert not torch.equal(author(folder, seed=1).windows(5, 12), made[:5])


def test_written_windows_follow_the_models_own_odds(model_folder: Folder) -> None:
    """Of many windows the second tokens, each judged by the model's odds behind its first one."""
    folder = model_folder("llama-gqa-tied")
    made = author(folder).windows(1280, 3)
    special = open_checkpoint(folder).tokenizer.all_special_ids
    assert not torch.isin(made[:, 0], torch.tensor(special)).any()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        odds = model(input_ids=made[:, :1]).logits[:, 0]
    odds[:, model.generation_config.eos_token_id] = -torch.inf  # windows do not end early
    log = odds.log_softmax(-1)
    got = float(log.gather(1, made[:, 1:2]).mean())
    entropy = float((log.exp() * log.clamp(min=-1e4)).sum(1).mean())
    uniform = float(log[:, special[-1] + 1 :].mean())
    assert got == pytest.approx(entropy, abs=0.1)
    assert abs(got - uniform) > 0.3


@pytest.mark.parametrize(
    "name", ["llama-gqa-tied", "mistral", "qwen3", "opt", "mamba", "mamba2", "mamba2-groups"]
)
def test_written_windows_are_those_of_the_whole_model_token_by_token(
    name: str, model_folder: Folder
) -> None:
    """Against a model without a cache that draws from the same numbers."""
    folder, length = model_folder(name), 20
    made = author(folder).windows(64, length)
    generator = torch.Generator().manual_seed(0)
    first = author(folder)._first_tokens(64, generator)
    assert torch.equal(made[:, :1], first)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=made).logits
    logits[:, :, model.generation_config.eos_token_id] = -torch.inf
    wanted = [
        drawn(logits[:, place].clone(), torch.rand(64, generator=generator))
        for place in range(length - 1)
    ]
    # Sums in another order may let one of 1,216 draws fall on the next token.
    assert int((torch.stack(wanted, dim=1) != made[:, 1:]).sum()) <= 2


def test_the_model_is_read_once_for_all_that_it_writes(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(open_checkpoint(model_folder("llama-gqa-tied")))
    method = get_method("obs", {"copies": 3, "written": 5}, Form("coupled"))
    assert isinstance(method, Method)
    text = FitText(stream, method, seed=0, progress=Progress())
    read: list[int] = []
    read_block = Stream.read_block
    monkeypatch.setattr(
        Stream, "read_block", lambda self, i, *rest: read.append(i) or read_block(self, i, *rest)
    )
    tokens = random_tokens(10, 12)
    text.expect(tokens)
    windows, _ = text.windows(tokens[:7])
    assert read == [0, 1, 2, 3]
    assert len(windows) == 7 + 3 * 4 + 5  # three of the seven judge
    again, late = text.windows(tokens)
    assert read == [0, 1, 2, 3]
    assert (len(again), late) == (10 + 3 * 7 + 5, 3)
    assert torch.equal(again[7:28].reshape(3, 7, 12)[:, :4], windows[4:16].reshape(3, 4, 12))


def test_statistics_take_written_windows_too(model_folder: Folder) -> None:
    stream = Stream(open_checkpoint(model_folder("llama-gqa-tied")))
    tokens = random_tokens(4, 16)
    for options, count in (
        ({}, 512),
        ({"written": 3, "copies": 0}, 3),
        ({"written": 0, "copies": 0}, 0),
    ):
        method = get_method("obs", {"layers": 0, **options}, Form())
        assert isinstance(method, Method)
        assert method.written(stream.anatomy, 4, 16) == count
        engine = Engine(
            stream, method, to_remove=1000, seed=0, dtype=torch.float32, progress=Progress()
        )
        if count == 512:
            continue  # too many for a test
        windows, late = engine.text.windows(tokens)
        assert late == 2
        assert len(windows) == 4 + count
        assert torch.equal(windows[:2], tokens[:2])
        assert torch.equal(windows[-2:], tokens[2:])
    big = replace(stream.anatomy, layers=10**6)
    method = get_method("obs", {}, Form())
    assert isinstance(method, Method)
    assert method.written(big, 4, 16) == 0  # it would not fit; copies are made
    assert method.written(stream.anatomy, 64, 512) == 0  # there is text enough
    assert method.written(stream.anatomy, 10, 128) == 64
