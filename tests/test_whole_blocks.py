"""ShortGPT and SLEB against the whole model in memory: which blocks go, in which order, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import secateur

from secateur import layers
from secateur.boundaries import Boundaries
from secateur.checkpoint import open_checkpoint
from secateur.engine import Engine
from secateur.errors import RecipeError, SourceError
from secateur.layers import LayerChoice, Round, by_loss, losses_without, search_work
from secateur.methods import get_method
from secateur.pipeline import make_plan
from secateur.progress import Progress
from secateur.recipe import make_recipe
from secateur.streaming import Stream

Folder = Callable[[str], Path]
DEPTH = 6
OUTPUTS = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")
NAMES = ["deep-gqa", "deep-opt", "deep-mistral"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A model of six blocks by name, whose blocks put out more or less, so that they differ."""
    root = tmp_path_factory.mktemp("deep")
    kinds = {
        "deep-gqa": ("llama-gqa-tied", 3),
        "deep-opt": ("opt", 1),
        "deep-mistral": ("mistral", 3),
    }
    for name, (kind, seed) in kinds.items():
        model = tiny.make_model(kind, layers=DEPTH, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for block in blocks_of(model):
                size = 0.3 + 0.5 * float(torch.rand((), generator=generator))
                for path, parameter in block.named_parameters():
                    if path.endswith(OUTPUTS):
                        parameter.mul_(size)
        model.save_pretrained(root / name)
        tiny.make_tokenizer().save_pretrained(root / name)
    return lambda name: root / name


def blocks_of(model: Any) -> Any:
    return (model.model.decoder if hasattr(model.model, "decoder") else model.model).layers


def shortened(folder: Path, gone: Sequence[int]) -> Any:
    """The whole model, opened by transformers, without some blocks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parent = model.model.decoder if hasattr(model.model, "decoder") else model.model
    left = [block for number, block in enumerate(parent.layers) if number not in gone]
    parent.layers = torch.nn.ModuleList(left)
    model.config.num_hidden_layers = len(left)
    return model


def dense_loss(folder: Path, gone: Sequence[int], tokens: torch.Tensor) -> float:
    """Mean of -log p of every token but the first of each window, in float64."""
    with torch.no_grad():
        logits = shortened(folder, gone)(input_ids=tokens, use_cache=False).logits
    scores = logits[:, :-1].double().numpy()
    scores = scores - scores.max(-1, keepdims=True)
    chosen = np.take_along_axis(scores, tokens[:, 1:, None].numpy(), -1)[..., 0]
    return float((np.log(np.exp(scores).sum(-1)) - chosen).mean())


def dense_influence(
    folder: Path, gone: Sequence[int], tokens: torch.Tensor, distance: str
) -> dict[int, float]:
    """Block influence from the hidden states that the whole model gives out."""
    model, found = shortened(folder, gone), {}
    left = [i for i in range(DEPTH) if i not in gone]

    def note(layer: int) -> Callable[..., None]:
        def hook(_: Any, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            x, y = args[0].double().numpy(), out.double().numpy()
            lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
            cosine = (x * y).sum(-1) / lengths
            angle = np.arccos(np.clip(cosine, -1, 1)) / np.pi
            found[layer] = float((angle if distance == "angular" else 1 - cosine).mean())

        return hook

    for layer, block in zip(left, blocks_of(model), strict=True):
        block.register_forward_hook(note(layer))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return found


def some_tokens(windows: int = 4, length: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, tiny.VOCABULARY, (windows, length), generator=generator)


def choice_of(
    folder: Path, name: str, count: int, tokens: torch.Tensor, **options: Any
) -> tuple[LayerChoice, Engine]:
    stream = Stream(open_checkpoint(folder))
    engine = Engine(
        stream,
        get_method(name, options),
        to_remove=count * stream.anatomy.block_parameters,
        seed=0,
        dtype=torch.float32,
        progress=Progress(),
    )
    return engine.choose_layers(tokens), engine


# ---- ShortGPT --------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["cosine", "angular"])
@pytest.mark.parametrize("name", NAMES)
def test_one_shot_removes_the_least_of_one_look(name: str, distance: str, deep: Folder) -> None:
    tokens = some_tokens()
    wanted = dense_influence(deep(name), [], tokens, distance)
    order = sorted(wanted, key=lambda layer: wanted[layer])
    for count in (1, 4):
        choice, _ = choice_of(deep(name), "shortgpt", count, tokens, distance=distance)
        assert choice.removed == order[:count]
        assert choice.layers == sorted(order[count:])
        left = {layer: wanted[layer] for layer in choice.layers}
        assert choice.importances == pytest.approx(left, abs=1e-6)


@pytest.mark.parametrize("distance", ["cosine", "angular"])
@pytest.mark.parametrize("name", NAMES)
def test_iterative_looks_at_the_shortened_model(name: str, distance: str, deep: Folder) -> None:
    tokens = some_tokens()
    removed: list[int] = []
    for _ in range(3):
        wanted = dense_influence(deep(name), removed, tokens, distance)
        removed.append(min(wanted, key=lambda layer: wanted[layer]))
    choice, _ = choice_of(deep(name), "shortgpt", 3, tokens, distance=distance, order="iterative")
    assert choice.removed == removed
    wanted = dense_influence(deep(name), removed, tokens, distance)
    assert choice.importances == pytest.approx(wanted, abs=1e-6)


def test_the_two_orders_differ_somewhere(deep: Folder) -> None:
    """Else the tests above would say little."""
    one, again = (
        [choice_of(deep(n), "shortgpt", 4, some_tokens(), order=order)[0].removed for n in NAMES]
        for order in ("one-shot", "iterative")
    )
    assert one != again


def test_one_look_runs_each_block_once_and_keeps_nothing(
    deep: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    monkeypatch.setattr(Boundaries, "__setitem__", lambda _, block, __: kept.append(block))
    ran = runs_of(monkeypatch)
    choice_of(deep("deep-gqa"), "shortgpt", 4, some_tokens())
    assert ran == list(range(DEPTH))
    assert kept == []


def runs_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of each block that is run."""
    ran: list[int] = []
    forward_block = Stream.forward_block

    def forward(self: Stream, index: int, *args: Any) -> torch.Tensor:
        ran.append(index)
        return forward_block(self, index, *args)

    monkeypatch.setattr(Stream, "forward_block", forward)
    return ran


# ---- SLEB ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "exempt"),
    [*((name, (1, 1)) for name in NAMES), ("deep-gqa", (0, 0)), ("deep-opt", (2, 0))],
)
def test_greedy_by_the_loss(name: str, exempt: tuple[int, int], deep: Folder) -> None:
    tokens, left = some_tokens(), list(range(DEPTH))
    removed: list[int] = []
    for _ in range(3):
        may_go = left[exempt[0] : len(left) - exempt[1]]
        now = dense_loss(deep(name), removed, tokens)
        wanted = {i: dense_loss(deep(name), [*removed, i], tokens) for i in may_go}
        removed.append(min(wanted, key=lambda layer: wanted[layer]))
        left.remove(removed[-1])
    choice, engine = choice_of(
        deep(name), "sleb", 3, tokens, exempt_first=exempt[0], exempt_last=exempt[1]
    )
    assert choice.removed == removed
    assert choice.layers == left
    rises = {i: loss - now for i, loss in wanted.items() if i != removed[-1]}
    assert choice.importances == pytest.approx(rises, abs=2e-6)
    losses = [dense_loss(deep(name), removed[:n], tokens) for n in (1, 2, 3)]
    assert [trial["loss"] for trial in engine.trials] == pytest.approx(losses, abs=2e-6)
    assert [trial["layers"] for trial in engine.trials] == [1, 2, 3]


@pytest.mark.parametrize("options", [{}, {"exempt_first": 0, "exempt_last": 3}])
def test_block_runs_are_counted_and_foretold(
    options: dict[str, int], deep: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = runs_of(monkeypatch)
    read: list[int] = []
    read_block = Stream.read_block
    monkeypatch.setattr(
        Stream,
        "read_block",
        lambda self, index, dtype=None: read.append(index) or read_block(self, index, dtype),
    )
    _, engine = choice_of(deep("deep-gqa"), "sleb", 2, some_tokens(), **options)
    assert sum(int(trial["block_runs"]) for trial in engine.trials) == len(ran)
    assert search_work(engine.method, DEPTH, 2)[0] == len(ran)
    assert len(read) == 2 * DEPTH - 1  # each block's weights once a removal


def test_work_of_a_search() -> None:
    """n blocks left, all may go: n (n - 1) / 2 for those without one, n or n - 1 for the whole."""
    method = get_method("sleb", {"exempt_first": 0, "exempt_last": 0})
    assert search_work(method, 30, 1) == (435 + 30, 31)
    assert search_work(method, 30, 2) == (435 + 30 + 406 + 28, 31 + 29)
    assert search_work(method, 30, 2, done=1) == (406 + 28, 29)


def test_on_disk_it_is_the_same(deep: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, tokens = Stream(open_checkpoint(deep("deep-opt"))), some_tokens()
    held = losses_without(stream, range(DEPTH), [1, 2, 4], tokens, whole=True)
    monkeypatch.setattr(layers, "Boundaries", lambda: Boundaries(limit=0))
    assert losses_without(stream, range(DEPTH), [1, 2, 4], tokens, whole=True) == held
    assert held.keys() == {1, 2, 4, None}


def test_a_search_goes_on_where_it_was_killed(deep: Folder) -> None:
    stream, tokens = Stream(open_checkpoint(deep("deep-gqa"))), some_tokens()
    method = get_method("sleb", {})
    noted: list[Round] = []
    whole = by_loss(stream, method, tokens, 3, Progress(), note=noted.append)
    assert whole[1] == noted
    for done in range(4):
        known = [Round.of(each.to_json()) for each in noted[:done]]
        rest: list[Round] = []
        again = by_loss(stream, method, tokens, 3, Progress(), known=known, note=rest.append)
        assert again == whole
        assert rest == noted[done:]


def test_a_model_that_puts_out_nothing_finite(deep: Folder, tmp_path: Path) -> None:
    model = shortened(deep("deep-gqa"), [])
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)  # finite, but nothing behind it is
    model.save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SourceError) as refused:
        choice_of(tmp_path, "sleb", 1, some_tokens())
    assert str(refused.value) == (
        "the model puts out NaN or infinite values on the calibration text: check the weights, or "
        "try other text with --calibration"
    )


def test_a_block_that_breaks_the_model_is_the_one_to_go(deep: Folder) -> None:
    """Infinite losses are no candidates, whatever comparisons with NaN say."""
    stream = Stream(open_checkpoint(deep("deep-gqa")))
    losses_each = Stream.losses_each
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Stream,
            "losses_each",
            lambda *args: (
                loss * (math.nan if place == 0 else 1)
                for place, loss in enumerate(losses_each(*args))
            ),
        )
        choice, rounds = by_loss(stream, get_method("sleb", {}), some_tokens(), 1, Progress())
    assert choice.removed != [1]
    assert 1 not in rounds[0].rises


# ---- how many --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worth", "count"), [(0.5, 1), (1.0, 1), (1.49, 1), (1.5, 2), (6.0, 6), (7.49, 7), (8.51, 9)]
)
@pytest.mark.parametrize("name", ["shortgpt", "sleb"])
def test_as_many_as_come_nearest(name: str, worth: float, count: int) -> None:
    assert get_method(name, {}).layer_counts(worth) == (count,)


def test_less_than_half_a_block(deep: Folder) -> None:
    with pytest.raises(RecipeError) as refused:
        get_method("shortgpt", {}).layer_counts(0.2)
    assert str(refused.value) == (
        "the share that was asked for is worth 0.20 blocks, and method shortgpt removes whole "
        "ones: ask for 2.5 times as much, or use a method that cuts inside blocks, such as "
        "--method comp"
    )


@pytest.mark.parametrize(("name", "most"), [("shortgpt", 5), ("sleb", 4)])
def test_more_than_may_go(name: str, most: int, deep: Folder) -> None:
    wishes = ("--method", name, "--remove", "95%", "--of", "decoder")
    secateur("plan", deep("deep-opt"), *wishes).refused_at_once(
        f"6 of 6 blocks would go, but method {name} can remove at most {most} here: ask for less"
    )


def test_columns_are_not_its_business(deep: Folder) -> None:
    wishes = ("--method", "sleb", "--remove", "30%", "--structure", "inputs")
    secateur("plan", deep("deep-opt"), *wishes).refused_at_once(
        "method sleb removes whole blocks, not inputs of single layers: leave out --structure, or "
        "use --method comp"
    )


def test_the_result_says_what_was_reached(deep: Folder) -> None:
    small = ("--samples", "4", "--length", "24")
    said = secateur(
        "plan", deep("deep-gqa"), "--method", "sleb", "--remove", "30%", "--of", "decoder", *small
    ).fine()
    lines = said.splitlines()
    assert "the difference is above 0.2 points: blocks go whole, 7,744 parameters each" in lines
    assert not any("FFN widths" in line for line in lines)
    assert lines[1].split()[:3] == ["0", "–", "0.0%"]  # exempt, so nobody looked at it


def test_nothing_is_run_once_the_blocks_are_chosen(
    deep: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = runs_of(monkeypatch)
    recipe = make_recipe(
        remove="50%", of="decoder", method="shortgpt", calibration={"samples": 2, "length": 16}
    )
    plan = make_plan(deep("deep-opt"), recipe).plan
    assert ran == list(range(DEPTH))
    assert len(plan.blocks) == 3
    assert all(not cut.tensors() for cut in plan.blocks)
