"""The pass behind a cut that runs nothing but what the cut has changed, against a whole one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_outputs import random_tokens

from secateur import replaying
from secateur.checkpoint import open_checkpoint
from secateur.engine import Engine
from secateur.forms import Form
from secateur.inside import Inside
from secateur.masking import masked, state_of
from secateur.methods import Method, get_method
from secateur.plans import BlockCut
from secateur.progress import Progress
from secateur.replaying import Passed
from secateur.sparsity import parse_sparsity
from secateur.streaming import Stream

Folder = Callable[[str], Path]
LENGTH, WINDOWS = 12, 5
FAMILIES = ["llama-gqa-tied", "llama-biases", "mistral", "qwen2", "qwen3", "opt", "opt-project"]


def obs(**options: Any) -> Method:
    found = get_method("obs", {"layers": 0, "copies": 0, "written": 0, **options}, Form("coupled"))
    assert isinstance(found, Method)
    return found


def neurons_gone(stream: Stream, *, bias: bool) -> BlockCut:
    """A third of the neurons of block 1 gone, the rest with new weights."""
    generator = torch.Generator().manual_seed(5)
    coupling = stream.anatomy.coupling("neurons")
    shape = stream.anatomy.denses[coupling.consumer]
    kept = torch.randperm(shape.inputs, generator=generator)[: 2 * shape.inputs // 3].sort()[0]
    cut = BlockCut(1, inputs={coupling.consumer: kept})
    cut.rows = dict.fromkeys(coupling.producers, kept)
    cut.weights = {coupling.consumer: torch.randn(shape.rows, len(kept), generator=generator)}
    if bias:
        cut.biases = {coupling.consumer: torch.randn(shape.rows, generator=generator)}
    return cut


def both_passes(
    stream: Stream, cut: BlockCut, passed: Passed
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Block 1 with the cut run as a whole, and replayed; which linear layers that called."""
    hidden = stream.embed(random_tokens(WINDOWS, LENGTH))
    called: list[str] = []
    with stream.block(1) as module, stream.calls_of(2):  # three calls
        with passed.noted(module):
            stream.forward_block(1, module, hidden)
        with masked(stream, module, state_of(module), cut, torch.float32):
            whole = stream.forward_block(1, module, hidden)

            def count(layer: torch.nn.Module, *_: Any, path: str) -> None:
                if "forward" not in vars(layer):  # else something stands in its place
                    called.append(path)

            handles = [
                module.get_submodule(path).register_forward_hook(partial(count, path=path))
                for path in stream.anatomy.denses
            ]
            with passed.replayed(module, cut):
                found = stream.forward_block(1, module, hidden)
            for handle in handles:
                handle.remove()
            torch.testing.assert_close(stream.forward_block(1, module, hidden), whole)  # put back
    return whole, found, called


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_layer_that_reads_neurons_runs_again(
    name: str, bias: bool, model_folder: Folder
) -> None:
    stream = Stream(open_checkpoint(model_folder(name)))
    with stream.calls_of(2):
        stream.embed(random_tokens(WINDOWS, LENGTH))
    cut = neurons_gone(stream, bias=bias)
    passed = Passed(obs(), stream.anatomy, WINDOWS * LENGTH)
    whole, found, called = both_passes(stream, cut, passed)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    assert called == [stream.anatomy.coupling("neurons").consumer] * 3


def test_a_cut_of_more_runs_as_a_whole(model_folder: Folder) -> None:
    stream = Stream(open_checkpoint(model_folder("llama-gqa-tied")))
    with stream.calls_of(2):
        stream.embed(random_tokens(WINDOWS, LENGTH))
    cut = neurons_gone(stream, bias=False)
    shape = stream.anatomy.denses["self_attn.o_proj"]
    cut.inputs["self_attn.o_proj"] = torch.arange(shape.inputs // 2)
    cut.rows["self_attn.v_proj"] = torch.arange(shape.inputs // 4)
    whole, found, called = both_passes(stream, cut, Passed(obs(), stream.anatomy, 60))
    assert torch.equal(found, whole)
    assert len(called) == 3 * len(stream.anatomy.denses)


@pytest.mark.parametrize("why", ["memory", "family"])
def test_nothing_is_kept_where_it_must_not(
    why: str, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(open_checkpoint(model_folder("mamba" if why == "family" else "qwen2")))
    if why == "memory":
        monkeypatch.setattr(replaying, "MOST_KEPT", 1000)
    passed = Passed(obs(), stream.anatomy, WINDOWS * LENGTH)
    hidden = stream.embed(random_tokens(WINDOWS, LENGTH))
    with stream.block(1) as module:
        with passed.noted(module):
            wanted = stream.forward_block(1, module, hidden)
            assert not any(part._forward_hooks for part in module.modules())
        with passed.replayed(module, BlockCut(1)):
            assert torch.equal(stream.forward_block(1, module, hidden), wanted)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])
def test_cuts_are_those_of_whole_passes_and_of_a_run_that_was_killed(
    name: str, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, the type of these models, nothing is rounded between the two ways."""
    tokens = random_tokens(10, 16)
    options = {"groups": "keep", "exempt_first": 0, "exempt_last": 0}

    def cuts(done: int = 0) -> list[BlockCut]:
        stream = Stream(open_checkpoint(model_folder(name)))
        engine = Engine(
            stream, obs(**options), to_remove=3000, seed=0, dtype=torch.float32, progress=Progress()
        )
        choice = engine.choose_layers(tokens)
        shares = engine.shares(choice, tokens)
        finished = {cut.source: cut for cut in found[:done]}
        return engine.neuron_stage(choice.layers, shares, tokens, done=finished).blocks

    found: list[BlockCut] = []
    found = cuts()
    assert sum(bool(cut.inputs) for cut in found) == 4
    for one, other in zip(found, cuts(done=2), strict=True):
        for path, tensor in one.tensors().items():
            assert torch.equal(tensor, other.tensors()[path])
        for path, weight in one.weights.items():
            assert torch.equal(weight, other.weights[path])
    monkeypatch.setattr(replaying, "MOST_KEPT", 0)
    for one, other in zip(found, cuts(), strict=True):
        for path, kept in one.inputs.items():
            assert torch.equal(kept, other.inputs[path])
        assert one.weights.keys() == other.weights.keys()  # some are best as they were
        for path, weight in one.weights.items():
            torch.testing.assert_close(weight, other.weights[path], rtol=1e-3, atol=1e-4)


def test_stages_run_no_further_than_they_look(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of each shape of layer in four blocks; what is found is that of whole passes."""
    tokens = random_tokens(4, 16)
    called: Counter[tuple[int, int]] = Counter()
    linear = torch.nn.Linear.forward

    def counted(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        called[self.in_features, self.out_features] += 1
        return linear(self, x)

    def cuts(done: int = 0) -> list[BlockCut]:
        stream = Stream(open_checkpoint(model_folder("llama-gqa-tied")))
        form = Form(sparsity=parse_sparsity("50%"))
        method = get_method("wanda", {"scope": "sublayer"}, form)
        assert isinstance(method, Method)
        engine = Engine(
            stream, method, to_remove=0, seed=0, dtype=torch.float32, progress=Progress()
        )
        choice = engine.choose_layers(tokens)
        finished = {cut.source: cut for cut in found[:done]}
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Linear, "forward", counted)
            shares = engine.shares(choice, tokens)
            return engine.neuron_stage(choice.layers, shares, tokens, done=finished).blocks

    found: list[BlockCut] = []
    found = cuts()
    blocks = len(found)
    assert called == {
        (32, 32): 3 * blocks,  # q in both stages, o in the second: the first ends in front of it
        (32, 16): 4 * blocks,  # k and v
        (32, 48): 2 * blocks + 2 * (blocks - 1),  # gate and up; behind the last cut nothing runs
        (48, 32): blocks - 1,
    }
    again = cuts(done=2)
    monkeypatch.setattr(replaying, "MOST_KEPT", 0)
    look = Inside.look
    monkeypatch.setattr(Inside, "look", lambda *args: look(*args[:-1], passes=True))
    for other in (again, cuts()):
        for one, same in zip(found, other, strict=True):
            assert one.weights.keys() == same.weights.keys() != set()
            for path, weight in one.weights.items():
                assert torch.equal(weight, same.weights[path])
