"""Streamed gradients are those of plain autograd on the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from test_scored import blocks_of, whole
from test_streaming import blocks_with_weights, everything_on_meta, random_tokens
from torch import nn

from secateur import backward as module
from secateur import streaming
from secateur.backward import Gradients, backward
from secateur.boundaries import Boundaries
from secateur.checkpoint import open_checkpoint
from secateur.streaming import Stream

Folder = Callable[[str], Path]
#: Tied and untied heads, grouped heads, sliding attention, norms of heads, LayerNorm, projections,
#: state space mixers.
MODELS = ["llama-gqa-tied", "llama-mha-untied", "llama-biases", "mistral", "qwen3", "opt",
          "opt-project", "mamba", "mamba2"]  # fmt: skip


def window_losses(model: Any, tokens: torch.Tensor, kind: str) -> torch.Tensor:
    """L_s of each window from the whole model's logits."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return torch.stack(
        [
            nn.functional.cross_entropy(window[:-1], ids[1:], reduction=kind)
            for window, ids in zip(logits, tokens, strict=True)
        ]
    )


def reference(folder: Path, tokens: torch.Tensor, kind: str) -> list[list[Gradients]]:
    """By window and block: gradients of that window's loss, from autograd on the whole model."""
    model, found = whole(folder), []
    for window in tokens.split(1):
        model.zero_grad()
        window_losses(model, window, kind).sum().backward()
        found.append(
            [{n: p.grad.clone() for n, p in b.named_parameters()} for b in blocks_of(model)]
        )
    return found


def streamed(stream: Stream, tokens: torch.Tensor, **settings: Any) -> dict[int, list[Gradients]]:
    """By block: what :func:`backward` hands on, call after call."""
    found: dict[int, list[Gradients]] = {}

    def use(layer: int, _: nn.Module, gradients: Iterator[Gradients]) -> None:
        assert blocks_with_weights(stream) == [layer]
        found[layer] = list(gradients)

    backward(stream, tokens, use, **settings)
    return found


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_each_window(
    name: str, loss: Literal["mean", "sum"], model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "TOKENS_PER_HEAD_CALL", 5)  # the last piece predicts nothing
    tokens = random_tokens(3, 11)
    stream = Stream(open_checkpoint(model_folder(name)))
    found = streamed(stream, tokens, loss=loss)
    wanted = reference(model_folder(name), tokens, loss)
    assert list(found) == [3, 2, 1, 0]
    for layer, windows in found.items():
        assert len(windows) == 3
        for window, gradients in enumerate(windows):
            assert gradients.keys() == wanted[window][layer].keys()
            # That of a key's bias is zero (softmax takes no notice of it): rounding is all there
            # is to see of it, and only beside the block's other gradients.
            scale = max(float(g.abs().max()) for g in wanted[window][layer].values())
            for path, gradient in gradients.items():
                torch.testing.assert_close(
                    gradient, wanted[window][layer][path], rtol=1e-4, atol=1e-5 * scale
                )
    assert everything_on_meta(stream)


@pytest.mark.parametrize("per_call", [2, 4, 9])
def test_several_windows_a_call(per_call: int, model_folder: Folder) -> None:
    tokens = random_tokens(5, 12)
    stream = Stream(open_checkpoint(model_folder("llama-gqa-tied")))
    found = streamed(stream, tokens, per_call=per_call)
    wanted = reference(model_folder("llama-gqa-tied"), tokens, "mean")
    for layer, calls in found.items():
        batches = [wanted[i : i + per_call] for i in range(0, 5, per_call)]
        assert len(calls) == len(batches)
        for gradients, batch in zip(calls, batches, strict=True):
            for path, gradient in gradients.items():
                total = sum(window[layer][path] for window in batch)
                torch.testing.assert_close(gradient, total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_losses(loss: Literal["mean", "sum"], model_folder: Folder) -> None:
    tokens = random_tokens(3, 11)
    stream = Stream(open_checkpoint(model_folder("opt")))
    got = backward(stream, tokens, lambda *_: None, loss=loss)
    wanted = window_losses(whole(model_folder("opt")), tokens, loss)
    torch.testing.assert_close(got, wanted.detach().double(), rtol=1e-5, atol=1e-5)


def test_only_the_blocks_that_are_wanted(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks between pass the gradient on; those before the first are not run again."""
    tokens = random_tokens(2, 10)
    stream = Stream(open_checkpoint(model_folder("opt")))
    run: list[int] = []
    real = Stream.call_block

    def noted(self: Stream, index: int, *args: Any) -> torch.Tensor:
        run.append(index)
        return real(self, index, *args)

    monkeypatch.setattr(Stream, "call_block", noted)
    done: list[int | None] = []
    found = streamed(stream, tokens, blocks=[3, 1], per_call=2, step=done.append)
    assert list(found) == [3, 1]
    assert run == [0, 1, 2, 3, 3, 2, 1]
    assert done == [0, 1, 2, 3, None, 3, 2, 1]
    wanted = reference(model_folder("opt"), tokens, "mean")
    for layer in (1, 3):
        total = wanted[0][layer]["fc1.weight"] + wanted[1][layer]["fc1.weight"]
        torch.testing.assert_close(found[layer][0]["fc1.weight"], total, rtol=1e-4, atol=1e-6)


def test_what_is_left_of_the_gradients_goes_on(model_folder: Folder) -> None:
    """A caller that takes none, or only the first, does not change what blocks before get."""
    tokens = random_tokens(3, 10)
    stream = Stream(open_checkpoint(model_folder("llama-gqa-tied")))
    whole_way, found = streamed(stream, tokens), {}

    def use(layer: int, _: nn.Module, gradients: Iterator[Gradients]) -> None:
        if layer == 2:
            next(gradients)
        if layer == 0:
            found[0] = list(gradients)

    backward(stream, tokens, use)
    for got, wanted in zip(found[0], whole_way[0], strict=True):
        assert all(torch.equal(got[path], wanted[path]) for path in wanted)


def test_activations_on_disk(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokens = random_tokens(2, 10)
    stream = Stream(open_checkpoint(model_folder("opt")))
    wanted = streamed(stream, tokens)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files: list[int] = []

    class Watched(Boundaries):
        def pop(self, block: int) -> torch.Tensor:
            files.append(len(list(tmp_path.rglob("*.safetensors"))))
            return super().pop(block)

    monkeypatch.setattr(module, "Boundaries", Watched)
    found = streamed(stream, tokens, limit=2 * 2 * 10 * 32 * 4)  # room for two of the four
    assert files == [2, 1, 0, 0]
    assert not list(tmp_path.iterdir())
    for layer, calls in found.items():
        for got, want in zip(calls, wanted[layer], strict=True):
            assert all(torch.equal(got[path], want[path]) for path in want)
