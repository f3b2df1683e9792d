"""The stream computes what the whole transformers model does, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from secateur import boundaries, layers, streaming
from secateur.boundaries import Boundaries
from secateur.checkpoint import open_checkpoint
from secateur.engine import Engine
from secateur.evaluation import load_whole
from secateur.layers import LayerChoice
from secateur.methods import get_method
from secateur.pipeline import make_plan
from secateur.progress import Progress
from secateur.recipe import make_recipe
from secateur.streaming import Stream

Folder = Callable[[str], Path]
#: Two kinds of attention in turns; the window is far shorter than the texts below.
MIXED = (
    "qwen2",
    {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
)


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch, model_folder: Folder) -> Path:
    """A model with full and sliding attention in turns."""
    monkeypatch.setitem(tiny.MODELS, "mixed", MIXED)
    return model_folder("mixed")


def whole_model(folder: Path) -> Any:
    """The model as transformers opens it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def without_blocks(folder: Path, removed: list[int]) -> Any:
    """The same, with whole blocks and their entries in the config taken out."""
    model = whole_model(folder)
    parent = model.model.decoder if hasattr(model.model, "decoder") else model.model
    kept = [i for i in range(len(parent.layers)) if i not in removed]
    parent.layers = nn.ModuleList([parent.layers[i] for i in kept])
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    return model


def random_tokens(windows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCABULARY, (windows, length), generator=generator)


def through_blocks(stream: Stream, tokens: torch.Tensor, layers: list[int]) -> torch.Tensor:
    hidden = stream.embed(tokens)
    for layer in layers:
        with stream.block(layer) as module:
            hidden = stream.forward_block(layer, module, hidden)
    return hidden


def streamed_logits(
    stream: Stream, tokens: torch.Tensor, layers: list[int] | None = None
) -> torch.Tensor:
    layers = list(range(stream.anatomy.layers)) if layers is None else layers
    found: dict[int, torch.Tensor] = {}
    stream.head(through_blocks(stream, tokens, layers), tokens, found.__setitem__)
    assert sorted(found) == list(range(len(tokens)))  # every window, once
    return torch.stack([found[i] for i in range(len(tokens))])


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def everything_on_meta(stream: Stream) -> bool:
    stored = {*dict(stream.model.named_parameters()), *stream.model.state_dict()}
    tensors = {**dict(stream.model.named_parameters()), **dict(stream.model.named_buffers())}
    return all(tensors[name].is_meta for name in stored if name in tensors)


def blocks_with_weights(stream: Stream) -> list[int]:
    return [
        i
        for i, block in enumerate(stream._blocks)
        if any(not p.is_meta for p in block.parameters())
    ]


# ---- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*tiny.MODELS, *tiny.STATE_SPACE])
@pytest.mark.parametrize(
    ("per_call", "per_head_call"), [(4096, 512), (24, 24), (1, 1)], ids=["one", "two", "single"]
)
def test_logits_and_losses_equal_the_whole_model(
    name: str,
    per_call: int,
    per_head_call: int,
    model_folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "TOKENS_PER_CALL", per_call)
    monkeypatch.setattr(streaming, "TOKENS_PER_HEAD_CALL", per_head_call)
    stream = Stream(open_checkpoint(model_folder(name)))
    tokens = random_tokens(5, 12)  # two windows a call leave a last call of one
    wanted = logits_of(whole_model(model_folder(name)), tokens)
    torch.testing.assert_close(streamed_logits(stream, tokens), wanted, rtol=1e-5, atol=1e-5)

    hidden = through_blocks(stream, tokens, list(range(stream.anatomy.layers)))
    losses = [
        nn.functional.cross_entropy(window[:-1], ids[1:], reduction="none").double()
        for window, ids in zip(wanted, tokens, strict=True)
    ]
    torch.testing.assert_close(
        stream.losses(hidden, tokens), torch.stack(losses), rtol=1e-5, atol=1e-5
    )
    assert everything_on_meta(stream)


def test_windows_of_several_lengths_go_through_one_stream(model_folder: Folder) -> None:
    stream = Stream(open_checkpoint(model_folder("mistral")))
    whole = whole_model(model_folder("mistral"))
    for windows, length in ((3, 20), (2, 9), (3, 20), (1, 2)):
        tokens = random_tokens(windows, length, seed=length)
        torch.testing.assert_close(
            streamed_logits(stream, tokens), logits_of(whole, tokens), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", [*tiny.MODELS, *tiny.STATE_SPACE])
def test_filled_skeleton_is_the_whole_model(name: str, model_folder: Folder) -> None:
    tokens = random_tokens(2, 12)
    filled = load_whole(open_checkpoint(model_folder(name)))
    assert not any(t.is_meta for t in [*filled.parameters(), *filled.buffers()])
    wanted = whole_model(model_folder(name))
    assert sum(p.numel() for p in filled.parameters()) == sum(
        p.numel() for p in wanted.parameters()
    )
    torch.testing.assert_close(
        logits_of(filled, tokens), logits_of(wanted, tokens), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt-project"])
def test_outside_can_be_rounded_as_a_file_would(name: str, model_folder: Folder) -> None:
    stream = Stream(open_checkpoint(model_folder(name)))
    tokens = random_tokens(2, 12)
    hidden = stream.embed(tokens, torch.bfloat16)
    for layer in range(stream.anatomy.layers):
        with stream.block(layer) as module:
            hidden = stream.forward_block(layer, module, hidden)
    found: list[torch.Tensor] = []
    stream.head(hidden, tokens, lambda _, x: found.append(x), dtype=torch.bfloat16)

    wanted = whole_model(model_folder(name))
    outside = [n for n, _ in wanted.named_parameters() if stream._prefix not in n]
    with torch.no_grad():
        for parameter in outside:
            values = wanted.get_parameter(parameter)
            values.copy_(values.to(torch.bfloat16))
    torch.testing.assert_close(torch.stack(found), logits_of(wanted, tokens), rtol=1e-5, atol=1e-5)


# ---- one block in memory ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-mha-untied", "opt-project"])
def test_only_the_block_at_work_has_weights(
    name: str, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watched from inside, through a whole plan with its trials."""
    seen = {"blocks": 0, "outside": 0}
    stream_init, forward_block = Stream.__init__, Stream.forward_block

    def init(self: Stream, *args: Any, **kwargs: Any) -> None:
        stream_init(self, *args, **kwargs)

        def running_outside(*_: object) -> None:
            assert blocks_with_weights(self) == []
            seen["outside"] += 1

        self.model.register_forward_pre_hook(running_outside)

    def forward(self: Stream, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        assert blocks_with_weights(self) == [index]
        outside = [p for n, p in self.model.named_parameters() if not n.startswith(self._prefix)]
        assert outside
        assert all(p.is_meta for p in outside)
        seen["blocks"] += 1
        return forward_block(self, index, block, hidden)

    monkeypatch.setattr(Stream, "__init__", init)
    monkeypatch.setattr(Stream, "forward_block", forward)
    options = {"max_layers": 1, "exempt_first": 0, "exempt_last": 0, "inputs": "sequential"}
    result = make_plan(
        model_folder(name),
        make_recipe(
            remove="30%",
            of="decoder",
            method="comp",
            options=options,
            calibration={"samples": 4, "length": 16},
        ),
    )
    assert len(result.trials) == 2
    assert seen["blocks"] >= 4 * 4
    assert seen["outside"] >= 4


def test_weights_go_when_the_work_inside_fails(model_folder: Folder) -> None:
    stream = Stream(open_checkpoint(model_folder("llama-gqa-tied")))

    def work() -> None:
        with stream.block(1):
            assert blocks_with_weights(stream) == [1]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        work()
    assert everything_on_meta(stream)

    def fail(*_: object) -> None:
        raise RuntimeError("inside")

    tokens = random_tokens(2, 8)
    hidden = stream.embed(tokens)
    with pytest.raises(RuntimeError, match="inside"):
        stream.head(hidden, tokens, fail)
    assert everything_on_meta(stream)
    assert len(stream._blocks) == stream.anatomy.layers
    assert stream.model.get_submodule("model.layers") is stream._blocks


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt-project", "mamba"])
def test_a_model_that_is_in_memory_is_not_read_again(
    name: str, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, tokens = Stream(open_checkpoint(model_folder(name))), random_tokens(3, 12)
    wanted = stream.losses(stream.forward(tokens), tokens)

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    with stream.whole() as model:
        monkeypatch.setattr(stream.checkpoint, "read", read)
        with stream.whole():  # inside itself it changes nothing
            assert not everything_on_meta(stream)
        assert torch.equal(stream.losses(stream.forward(tokens), tokens), wanted)
        with torch.no_grad():
            logits = model(input_ids=tokens).logits
        assert torch.isfinite(logits).all()
        assert len(blocks_with_weights(stream)) == stream.anatomy.layers
    assert everything_on_meta(stream)
    monkeypatch.undo()
    assert torch.equal(stream.losses(stream.forward(tokens), tokens), wanted)


# ---- removed blocks --------------------------------------------------------------------------


def test_a_mistral_window_stays_with_each_block(model_folder: Folder) -> None:
    folder = model_folder("mistral")
    tokens = random_tokens(3, 24)  # three times the window
    got = streamed_logits(Stream(open_checkpoint(folder)), tokens, [0, 3])
    wanted = without_blocks(folder, [1, 2])
    torch.testing.assert_close(got, logits_of(wanted, tokens), rtol=1e-5, atol=1e-5)
    wanted.config.sliding_window = None
    assert (got - logits_of(wanted, tokens)).abs().max() > 1e-2  # the window does matter


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1, 2, 3], [0, 2], [1, 3], [0, 3]])
def test_blocks_keep_their_own_kind_of_attention(layers: list[int], mixed: Path) -> None:
    tokens = random_tokens(3, 24)
    got = streamed_logits(Stream(open_checkpoint(mixed)), tokens, layers)
    wanted = without_blocks(mixed, [i for i in range(4) if i not in layers])
    torch.testing.assert_close(got, logits_of(wanted, tokens), rtol=1e-5, atol=1e-5)
    types = wanted.config.layer_types
    wanted.config.layer_types = ["full_attention"] * len(types)
    if "sliding_attention" in types:
        assert (got - logits_of(wanted, tokens)).abs().max() > 1e-2


# ---- the layer stage -------------------------------------------------------------------------


def new_engine(stream: Stream) -> Engine:
    return Engine(
        stream,
        get_method("comp", {}),
        to_remove=1,
        seed=0,
        dtype=torch.float32,
        progress=Progress(),
    )


def first_choices(stream: Stream, tokens: torch.Tensor, count: int) -> list[LayerChoice]:
    stage = new_engine(stream).layer_stage(tokens)
    found = [next(stage) for _ in range(count)]
    stage.close()
    return found


def dense_importances(folder: Path, removed: list[int], tokens: torch.Tensor) -> dict[int, float]:
    """1 - mean cosine of what goes into and comes out of each block, on the whole model."""
    model = without_blocks(folder, removed)
    layers = [i for i in range(4) if i not in removed]
    found: dict[int, float] = {}

    def note(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            cosine = nn.functional.cosine_similarity(args[0], out, dim=-1)
            found[layer] = 1 - float(cosine.double().mean())

        return hook

    parent = model.model.decoder if hasattr(model.model, "decoder") else model.model
    for layer, block in zip(layers, parent.layers, strict=True):
        block.register_forward_hook(note(layer))
    logits_of(model, tokens)
    return found


@pytest.mark.parametrize("name", ["llama-gqa-tied", "mistral", "mixed", "opt", "opt-project"])
def test_layer_stage_equals_starting_from_scratch(
    name: str, model_folder: Folder, mixed: Path
) -> None:
    folder = model_folder(name)
    tokens = random_tokens(4, 24, seed=3)
    removed: list[int] = []
    for choice in first_choices(Stream(open_checkpoint(folder)), tokens, 4):
        assert choice.removed == removed
        assert choice.layers == [i for i in range(4) if i not in removed]
        wanted = dense_importances(folder, removed, tokens)
        assert choice.importances == pytest.approx(wanted, abs=1e-6)
        removed.append(min(wanted, key=lambda layer: wanted[layer]))


def test_layer_stage_runs_only_what_changed(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    forward_block = Stream.forward_block

    def forward(self: Stream, index: int, *args: Any) -> torch.Tensor:
        ran.append(index)
        return forward_block(self, index, *args)

    monkeypatch.setattr(Stream, "forward_block", forward)
    stream = Stream(open_checkpoint(model_folder("qwen3")))
    choices = first_choices(stream, random_tokens(3, 16), 3)
    expected = [0, 1, 2, 3]
    for choice in choices[1:]:
        expected += [layer for layer in choice.layers if layer > choice.removed[-1]]
    assert ran == expected


def test_boundaries_on_disk_give_the_same(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(open_checkpoint(model_folder("llama-gqa-tied")))
    tokens = random_tokens(4, 16)
    held = first_choices(stream, tokens, 4)
    used: list[Boundaries] = []

    def spilling() -> Boundaries:
        used.append(Boundaries(limit=0))
        return used[-1]

    monkeypatch.setattr(layers, "Boundaries", spilling)
    assert first_choices(stream, tokens, 4) == held
    assert len(used) == 1
    assert not used[0]._held


def test_boundaries_spill_replace_and_clean_up() -> None:
    first, second = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    kept = Boundaries(limit=first.nbytes)
    kept[0] = first
    kept[1] = second
    assert kept[0] is first
    assert torch.equal(kept[1], second)
    assert kept._folder is not None
    folder = kept._folder
    assert [p.name for p in folder.iterdir()] == ["1.safetensors"]
    kept[1] = first  # the newest value counts, wherever the old one was
    kept[0] = second
    assert torch.equal(kept[1], first)
    assert torch.equal(kept[0], second)
    kept.close()
    assert not folder.exists()
    with pytest.raises(KeyError):
        kept[0]
    assert boundaries.IN_MEMORY >= 2**28
