"""The fit of the layers that make neurons, against derivatives by autograd and dense solutions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_outputs import random_tokens

from secateur.checkpoint import open_checkpoint
from secateur.engine import Engine
from secateur.errors import RecipeError
from secateur.forms import Form
from secateur.methods import Method, get_method
from secateur.methods.chain import Chain
from secateur.neurons import Neurons, Parts, noted_neurons
from secateur.plans import Plan
from secateur.progress import Progress
from secateur.solvers import gauss_newton
from secateur.solvers.gauss_newton import DAMPING, NeuronFit, System, Weights
from secateur.sparsity import parse_sparsity
from secateur.statistics import relative_to
from secateur.streaming import Stream

Folder = Callable[[str], Path]
HIDDEN, WIDTH, OUT, TOKENS = 5, 7, 4, 60


def gated(outputs: Weights) -> torch.Tensor:
    """The function of a gated FFN, its two layers apart or in one."""
    if "both" in outputs:
        gate, up = outputs["both"].chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.silu(outputs["gate"]) * outputs["up"]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(fused: bool = False, late: int = 0) -> tuple[Neurons, Weights]:
    """Tokens of an FFN and its layers; the first tokens weigh less."""
    gate, up = random(WIDTH, HIDDEN, seed=1), random(WIDTH, HIDDEN, seed=2)
    down = random(OUT, WIDTH, seed=3)
    makers = {"both": torch.cat([gate, up])} if fused else {"gate": gate, "up": up}
    parts = Parts((), ("ffn",), tuple(makers), "down")
    weights = torch.linspace(0.2, 1.5, TOKENS)[:, None]
    neurons = Neurons(parts, random(TOKENS, HIDDEN, seed=4), weights, late, gated)
    return neurons, {**makers, "down": down}


def some_gone(fused: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    kept = torch.tensor([0, 1, 3, 4, 6])
    return kept, {"both": torch.cat([kept, kept + WIDTH])} if fused else {"gate": kept, "up": kept}


def fit_of(fused: bool = False, late: int = 0, pull: float = 0.01) -> NeuronFit:
    neurons, layers = problem(fused, late)
    return NeuronFit(neurons, layers, {}, *some_gone(fused), pull)


def system_of(fused: bool) -> tuple[System, torch.Tensor, torch.Tensor, Weights]:
    """A system, J of all weights of the producers by autograd, what is off, and the producers."""
    fit = fit_of(fused)
    neurons, reader = fit._neurons, fit._reader.float()
    system = System(list(fit._seen(fit._own, reader)), reader)
    names = list(fit._own)

    def put_out(*weights: torch.Tensor) -> torch.Tensor:
        outputs = {n: neurons.inputs @ w.T for n, w in zip(names, weights, strict=True)}
        return (gated(outputs) @ reader.T * neurons.weights).flatten()

    jacobian = torch.autograd.functional.jacobian(put_out, tuple(fit._own.values()))
    flat = torch.cat([part.flatten(1) for part in jacobian], dim=1)
    off = fit._wanted.flatten() - put_out(*fit._own.values())
    return system, flat, off, fit._own


def flat(each: Weights) -> torch.Tensor:
    return torch.cat([part.flatten() for part in each.values()])


def damping_of(jacobian: torch.Tensor, own: Weights) -> torch.Tensor:
    """What is added to J^T J, as a matrix, from the slopes that J has for one neuron alone."""
    x = problem()[0].inputs.double()
    metric = x.T @ x / len(x)
    metric += DAMPING * metric.diagonal().mean() * torch.eye(HIDDEN)
    found, start = [], 0
    for weight in own.values():
        # J of row j at token t is v_j s_jt x_t, so that its squares over x_t^2 add up to M_j.
        part = jacobian[:, start : start + weight.numel()].unflatten(1, weight.shape).double()
        by_token = (
            part.unflatten(0, (TOKENS, OUT)).square().sum((1, 3)) / x.square().sum(1)[:, None]
        )
        mean = by_token.sum(0).mean()
        found.append(torch.kron(DAMPING * mean * torch.eye(len(weight)), metric))
        start += weight.numel()
    return torch.block_diag(*found)


@pytest.mark.parametrize("fused", [False, True])
def test_products_are_those_of_the_jacobian(fused: bool) -> None:
    system, jacobian, off, own = system_of(fused)
    torch.testing.assert_close(flat(system.right()), jacobian.T @ off, rtol=1e-4, atol=1e-4)
    step = {name: random(*weight.shape, seed=9) for name, weight in own.items()}
    wanted = jacobian.T @ (jacobian @ flat(step)) + damping_of(jacobian, own).float() @ flat(step)
    torch.testing.assert_close(flat(system.times(step)), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_many_steps_solve_the_system(fused: bool) -> None:
    system, jacobian, off, own = system_of(fused)
    jacobian = jacobian.double()
    matrix = jacobian.T @ jacobian + damping_of(jacobian, own)
    wanted = torch.linalg.solve(matrix, jacobian.T @ off.double())
    torch.testing.assert_close(flat(system.solved(200)).double(), wanted, rtol=1e-3, atol=1e-4)
    few = flat(system.solved(2)).double()
    height = [float((w - wanted) @ matrix @ (w - wanted)) for w in (few, 0 * few)]
    assert height[0] < 0.6 * height[1]


def test_the_reader_is_the_pulled_least_squares_solution() -> None:
    fit = fit_of(late=15, pull=0.2)
    neurons = fit._neurons
    z = gated({n: neurons.inputs[:45] @ w.T for n, w in fit._own.items()}).double()
    root = neurons.weights[:45].double()
    second = (z * root).T @ (z * root) / 45
    pull = 0.2 * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    across = fit._wanted[:45].double().T @ (z * root) / 45
    wanted = across + fit._reader @ pull
    found = fit._reader_for(fit._own, fit._reader, 45)
    torch.testing.assert_close(
        found, torch.linalg.solve(second + pull, wanted.T).T, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("fused", [False, True])
def test_rounds_bring_the_output_nearer(fused: bool) -> None:
    errors = []
    for rounds in (1, 4, 12):
        found = fit_of(fused, late=12).run(rounds)
        assert found is not None
        assert found.rounds <= rounds
        errors.append(found.error)
    alone = fit_of(fused)
    start = alone._error(alone._own, alone._reader_for(alone._own, alone._reader, TOKENS), 0)
    assert errors[0] < 0.8 * start
    assert errors[2] <= errors[1] < errors[0]


def test_layers_in_one_are_fitted_as_layers_apart() -> None:
    apart, fused = fit_of(False, late=12).run(2), fit_of(True, late=12).run(2)
    assert apart is not None
    assert fused is not None
    # M is damped by its mean over a layer, which is that of both halves here.
    joined = torch.cat([apart.producers["gate"], apart.producers["up"]])
    assert fused.rounds == apart.rounds
    assert float((joined - fused.producers["both"]).norm() / joined.norm()) < 0.05


def test_nothing_changes_where_the_tokens_kept_apart_gain_nothing() -> None:
    """Targets that are noise: the fit gets nearer on its own tokens and no other."""
    fit = fit_of(late=30)
    fit._wanted = random(TOKENS, OUT, seed=11)
    fit._wanted[30:] = 0.0
    assert fit.run(3) is None


def test_a_step_that_is_not_finite_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(system: System, steps: int) -> Weights:
        return {"gate": torch.full((5, HIDDEN), torch.nan), "up": torch.zeros(5, HIDDEN)}

    monkeypatch.setattr(gauss_newton.System, "solved", broken)
    assert fit_of(late=12).run(2) is None


# ---- inside a model --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-biases", "qwen3", "opt"])
def test_neurons_of_a_block_are_noted_and_made_again(name: str, model_folder: Folder) -> None:
    stream = Stream(open_checkpoint(model_folder(name)))
    hidden = stream.embed(random_tokens(3, 10))
    anatomy = stream.anatomy
    seen: list[torch.Tensor] = []
    with stream.block(1) as module:
        consumer = module.get_submodule(anatomy.coupling("neurons").consumer)
        handle = consumer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with noted_neurons(module, anatomy, late=10, relative=True) as noted:
            out = stream.forward_block(1, module, hidden)
        handle.remove()
        (neurons,) = noted
        producers = {n: module.get_submodule(n) for n in neurons.parts.producers}
        outputs = {n: layer(neurons.inputs).detach() for n, layer in producers.items()}
        z, slopes = neurons.slopes(outputs)
        moved = neurons.activations({n: o + 1e-3 * slopes[n] for n, o in outputs.items()})
    torch.testing.assert_close(z, torch.cat([x.flatten(0, -2) for x in seen]))
    torch.testing.assert_close(neurons.weights, relative_to(out))
    first_order = sum(slope.square() for slope in slopes.values())
    torch.testing.assert_close((moved - z) / 1e-3, first_order, rtol=0.05, atol=0.02)


def cut_of(name: str, folder: Folder, rounds: int | str, done: Plan | None = None) -> Plan:
    stream = Stream(open_checkpoint(folder(name)))
    options = {"layers": 0, "copies": 0, "written": 0, "groups": "keep", "rounds": rounds}
    options |= {"exempt_first": 0, "exempt_last": 0}
    method = get_method("obs", options, Form("coupled"))
    assert isinstance(method, Method)
    engine = Engine(
        stream, method, to_remove=4000, seed=0, dtype=torch.float32, progress=Progress()
    )
    tokens = random_tokens(24, 24)
    choice = engine.choose_layers(tokens)
    shares = engine.shares(choice, tokens)
    finished = {cut.source: cut for cut in done.blocks[:2]} if done else None
    return engine.neuron_stage(choice.layers, shares, tokens, done=finished)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])
def test_a_block_cut_with_rounds_is_nearer_to_the_whole(name: str, model_folder: Folder) -> None:
    plain, fitted = cut_of(name, model_folder, 0), cut_of(name, model_folder, 3)
    coupling = fitted.anatomy.coupling("neurons")
    producers, consumer = set(coupling.producers), coupling.consumer
    used = [cut for cut in fitted.blocks if cut.notes["rounds"]]
    assert used
    for cut in used:
        assert producers < cut.weights.keys()
        assert cut.weights[consumer].shape[1] == len(cut.inputs[consumer])
    # The first block sees the same in both.
    first = fitted.blocks[0].notes["error"][consumer], plain.blocks[0].notes["error"][consumer]
    assert first[0] < first[1]
    again = cut_of(name, model_folder, 3, done=fitted)
    for one, other in zip(fitted.blocks, again.blocks, strict=True):
        for path, weight in one.weights.items():
            assert torch.equal(weight, other.weights[path])


def test_auto_fits_where_there_is_much_text(model_folder: Folder) -> None:
    anatomy = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy
    auto = get_method("obs", {}, Form("coupled"))
    assert isinstance(auto, Method)
    assert not auto.fits_neurons(anatomy, 29_999)
    assert auto.fits_neurons(anatomy, 30_000)
    assert auto.held(anatomy, 29_999) == 0
    # Inputs, outputs and errors of the FFN, and slopes of gate and up.
    assert auto.held(anatomy, 30_000) == 4 * 30_000 * (3 * 32 + 2 * 48)
    assert auto.solving(anatomy, 30_000) > 3 * auto.solving(anatomy, 29_999)
    mamba = Stream(open_checkpoint(model_folder("mamba"))).anatomy
    assert not auto.fits_neurons(mamba, 30_000)


def test_where_there_is_nothing_to_fit(model_folder: Folder) -> None:
    mamba = Stream(open_checkpoint(model_folder("mamba"))).anatomy
    method = get_method("obs", {"rounds": 2}, Form("coupled"))
    with pytest.raises(RecipeError) as error:
        method.check(mamba)
    assert str(error.value) == (
        "rounds is 2, but blocks of mamba do not end with an FFN of their own: leave it out, or "
        "set it to 0"
    )
    llama = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy
    then = get_method("apt", {}, Form(sparsity=parse_sparsity("2:4")))
    with pytest.raises(RecipeError) as error:
        Chain(method, then)  # type: ignore[arg-type]
    assert str(error.value) == (
        "rounds is 2, but --then needs the neurons that stay as they were: leave it out, or set it "
        "to 0"
    )
    auto, none = (get_method("obs", o, Form("coupled")) for o in ({}, {"rounds": 0}))
    assert isinstance(auto, Method)
    assert isinstance(none, Method)
    assert isinstance(then, Method)
    chain = Chain(auto, then)  # type: ignore[arg-type]
    assert auto.fits_neurons(llama, 10**6)
    assert not chain.fits_neurons(llama, 10**6)  # and counts no operations of it
    assert chain.solving(llama, 10**6) == none.solving(llama, 10**6) + then.solving(llama, 10**6)
