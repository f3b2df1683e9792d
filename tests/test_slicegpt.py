"""The mathematics of SliceGPT: rotating loses nothing, and slicing is what the paper slices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import literal_slicegpt
import pytest
import tiny
import torch

from secateur.anatomy import (
    FAMILIES,
    Coupling,
    Dense,
    Family,
    Residual,
    Stage,
    describe,
    describe_residual,
)
from secateur.checkpoint import open_checkpoint
from secateur.errors import FamilyError, PlanError, RecipeError, SourceError
from secateur.methods import get_method, method_names
from secateur.methods.rotating import Rotating
from secateur.modules import pruned_classes
from secateur.outputs import hf
from secateur.progress import Progress
from secateur.rotation.original import ProjectedOriginal
from secateur.rotation.plan import RotationPlan, Slice, sizes_at, write_bases
from secateur.rotation.stages import KEPT, find_bases
from secateur.rotation.weights import rotate_block, rotate_outside
from secateur.streaming import Stream

Folder = Callable[[str], Path]
WIDTH = 32
#: Traits of families that the tests everywhere else do not need.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": (
        "granite",
        {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 1.5},
    ),
    "smollm3": ("smollm3", {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1, 0]}),
    "opt-no-biases": (
        "opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "enable_bias": False},
    ),
    "opt-untied": (
        "opt",
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "tie_word_embeddings": False},
    ),
}  # fmt: skip
NAMES = [*tiny.MODELS, *MORE]


@pytest.fixture
def source(tmp_path: Path, model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Folder of a tiny model, those of MORE included."""

    def folder(name: str) -> Path:
        if name in tiny.MODELS:
            return model_folder(name)
        monkeypatch.setitem(tiny.MODELS, name, MORE[name])
        return tiny.write_model(tmp_path / name, name)

    return folder


class HeldBases:
    """Bases in memory, where the package reads files."""

    def __init__(self) -> None:
        self.held: dict[int, list[torch.Tensor]] = {}

    def of_block(self, block: int) -> list[torch.Tensor]:
        return self.held[block]


class RandomBases:
    """A method that rotates at random: nothing about it suits the model."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def basis(
        self, hidden: torch.Tensor, kept: int, *, centred: bool
    ) -> tuple[torch.Tensor, float]:
        width = hidden.shape[-1]
        drawn = torch.randn(width, width, generator=self.generator, dtype=torch.float64)
        return torch.linalg.qr(drawn).Q[:, :kept].float(), 0.5


def windows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCABULARY, (count, length), generator=generator)


def sliced(
    folder: Path, cut: Slice, method: Any, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[RotationPlan, Any, Stream]:
    """The plan, the smaller model in memory as its folder would open, and the original's stream."""
    stream = Stream(open_checkpoint(folder))
    residual = describe_residual(stream.model, stream.anatomy)
    bases = HeldBases()
    plan = RotationPlan(stream.anatomy, [], residual, cut, bases=bases)  # type: ignore[arg-type]
    state: dict[str, torch.Tensor] = {}
    path = stream.anatomy.family.blocks

    def sink(done: Any, block: dict[str, torch.Tensor], around: list[torch.Tensor]) -> None:
        bases.held[done.source] = around
        made = rotate_block(block, residual, around, dtype)
        state.update({f"{path}.{done.source}.{k}": v for k, v in made.items()})

    find_bases(stream, method, plan, tokens, Progress(), sink=sink)
    ends = bases.held[0][0], bases.held[stream.anatomy.layers - 1][-1]
    state |= rotate_outside(stream.read_outside(), residual, *ends, dtype)
    base_config, base_model = hf.base_classes(stream.checkpoint)
    entry = {"base_config": base_config, "base_model": base_model, "blocks_path": path}
    config_class, model_class = pruned_classes(base_config, base_model)
    values = stream.checkpoint.config.to_dict() | plan.config_keys()
    model = model_class(config_class(**values, secateur={**entry, **plan.run_time()})).eval()
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= set(model.all_tied_weights_keys)
    return plan, model, stream


def dense_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits_of(AutoModelForCausalLM.from_pretrained(folder).eval(), tokens)


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def slicegpt(**options: Any) -> Any:
    method = get_method("slicegpt", options)
    assert isinstance(method, Rotating)
    return method


# ---- nothing is lost by rotating ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["principal", "random"])
@pytest.mark.parametrize("name", NAMES)
def test_rotated_without_slicing_the_logits_are_the_dense_ones(
    name: str, kind: str, source: Any
) -> None:
    folder = source(name)
    method = slicegpt() if kind == "principal" else RandomBases()
    _, model, _ = sliced(folder, Slice(WIDTH, WIDTH), method, windows(4, 20))
    tokens = windows(3, 20, seed=1)
    torch.testing.assert_close(
        logits_of(model, tokens), dense_logits(folder, tokens), rtol=1e-4, atol=1e-5
    )


def test_the_weights_were_really_rotated(model_folder: Folder) -> None:
    """What the test above would not notice: a model that was left as it was."""
    folder = model_folder("llama-gqa-tied")
    _, model, stream = sliced(folder, Slice(WIDTH, WIDTH), RandomBases(), windows(4, 20))
    dense = stream.read_block(1)["self_attn.q_proj.weight"]
    rotated = model.model.layers[1].self_attn.q_proj.weight.detach()
    assert float((rotated - dense).abs().max()) > 0.1
    shortcut = model.model.layers[1].shortcuts[0].weight.detach()
    assert float((shortcut - torch.eye(WIDTH)).abs().max()) > 0.1
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not hasattr(model.model.norm, "weight")


# ---- slicing is what the paper slices ----------------------------------------------------------

LITERAL = ("llama-gqa-tied", "llama-mha-untied", "llama-biases", "opt", "opt-no-biases")


@pytest.mark.parametrize("signal", ["stream", "normed"])
@pytest.mark.parametrize("cut", [Slice(24, 24), Slice(16, 32), Slice(9, 9)], ids=str)
@pytest.mark.parametrize("name", LITERAL)
def test_sliced_it_is_the_algorithm_written_out(
    name: str, cut: Slice, signal: str, source: Any
) -> None:
    from transformers import AutoModelForCausalLM

    folder, calibration, tokens = source(name), windows(6, 24), windows(3, 20, seed=1)
    _, model, _ = sliced(folder, cut, slicegpt(signal=signal), calibration)
    original = AutoModelForCausalLM.from_pretrained(folder)
    wanted = literal_slicegpt.logits(
        original, calibration, tokens, cut.kept, cut.kept_last, signal == "normed"
    )
    torch.testing.assert_close(logits_of(model, tokens).double(), wanted, rtol=1e-3, atol=1e-4)
    # ... and slicing at this width is no trifle, which any tolerance would hide.
    assert float((wanted - dense_logits(folder, tokens)).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_projections_in_the_original_model_are_the_same_network(
    name: str, dtype: torch.dtype, source: Any
) -> None:
    """What `verify` compares with: stock blocks, full width."""
    plan, model, stream = sliced(source(name), Slice(20, 24), slicegpt(), windows(6, 24), dtype)
    tokens = windows(3, 20, seed=1)
    original = ProjectedOriginal(stream, plan, dtype)
    found: list[torch.Tensor] = []
    hidden = original.forward(tokens)
    original.head(hidden, tokens, lambda _, window: found.append(window), dtype=dtype)
    torch.testing.assert_close(
        logits_of(model.float(), tokens), torch.stack(found), rtol=1e-4, atol=1e-4
    )


def test_the_notes_say_what_the_directions_hold(model_folder: Folder) -> None:
    plan, _, stream = sliced(
        model_folder("llama-mha-untied"), Slice(20, 20), slicegpt(), windows(6, 24)
    )
    shares = [cut.notes[KEPT] for cut in plan.blocks]
    assert [len(share) for share in shares] == [3, 2, 2, 2]  # the first has the embedding's too
    x = stream.embed(windows(6, 24)).reshape(-1, WIDTH).double()
    values = torch.linalg.svdvals(x).pow(2)
    assert shares[0][0] == pytest.approx(float(values[:20].sum() / values.sum()), abs=1e-6)
    assert all(0.5 < each < 1 for share in shares for each in share)


def test_attention_and_ffn_side_by_side_share_a_shortcut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family with parallel branches is an entry in the table, and has one matrix a block."""
    phi = Family(
        name="Phi",
        model_types=("phi",),
        blocks="model.layers",
        denses=(
            Dense("self_attn.q_proj", "attention"),
            Dense("self_attn.k_proj", "attention"),
            Dense("self_attn.v_proj", "attention"),
            Dense("self_attn.dense", "heads"),
            Dense("mlp.fc1", "ffn"),
            Dense("mlp.fc2", "neurons"),
        ),
        couplings=(
            Coupling("self_attn.dense", ("self_attn.v_proj",), "values"),
            Coupling("mlp.fc2", ("mlp.fc1",), "neurons"),
        ),
        residual=Residual(
            sources=(("model.embed_tokens",),),
            stages=(
                Stage(
                    "input_layernorm",
                    ("attention", "ffn"),
                    ("heads", "neurons"),
                    (("self_attn",), ("mlp",)),
                ),
            ),
            norm="model.final_layernorm",
            reader=("lm_head",),
        ),
    )
    # By its module: the package has a function of the same name.
    monkeypatch.setattr(sys.modules[describe.__module__], "FAMILIES", (*FAMILIES, phi))
    monkeypatch.setitem(tiny.MODELS, "phi", ("phi", {"num_key_value_heads": 2}))
    folder, tokens = tiny.write_model(tmp_path / "phi", "phi"), windows(3, 20, seed=1)
    plan, model, _ = sliced(folder, Slice(WIDTH, WIDTH), RandomBases(), windows(4, 20))
    torch.testing.assert_close(
        logits_of(model, tokens), dense_logits(folder, tokens), rtol=1e-4, atol=1e-5
    )
    plan, model, stream = sliced(folder, Slice(16, 16), slicegpt(), windows(4, 20))
    assert [len(block.shortcuts) for block in model.model.layers] == [1] * 4
    assert plan.sizes().parameters == sum(p.numel() for p in model.parameters())
    original = ProjectedOriginal(stream, plan, torch.float32)
    found: list[torch.Tensor] = []
    original.head(original.forward(tokens), tokens, lambda _, window: found.append(window))
    torch.testing.assert_close(logits_of(model, tokens), torch.stack(found), rtol=1e-4, atol=1e-4)


# ---- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [Slice(24, 24), Slice(16, 32)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_model(name: str, cut: Slice, source: Any) -> None:
    plan, model, stream = sliced(source(name), cut, slicegpt(), windows(4, 20))
    blocks = model.get_submodule(stream.anatomy.family.blocks)
    sizes = plan.sizes()
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.decoder == sum(p.numel() for p in blocks.parameters())
    for block, done in zip(blocks, plan.blocks, strict=True):
        left = sum(p.numel() for p in block.parameters())
        assert plan.block_gone(done) == stream.anatomy.block_parameters - left
    shortcuts = sum(p.numel() for n, p in blocks.named_parameters() if "shortcuts" in n)
    assert plan.shortcuts == shortcuts
    before = plan.sizes_before()
    assert plan.gone == before.parameters - sizes.parameters
    by_blocks = RotationPlan(plan.anatomy, plan.blocks, plan.stream, cut, "decoder")
    assert by_blocks.gone == before.decoder - sizes.decoder


#: LLaMA-2-7B: slice of the width -> kept width, parameters left in billions; counted by hand from
#: the shapes of the authors' program.
LLAMA_2_7B = {
    "10%": (3680, 6.921), "20%": (3272, 6.068), "25%": (3072, 5.658), "30%": (2864, 5.236),
    "40%": (2456, 4.426),
}  # fmt: skip


@pytest.mark.parametrize("share", LLAMA_2_7B)
def test_a_share_of_the_width_is_not_a_share_of_the_parameters(share: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    anatomy = describe(model)
    assert anatomy.parameters == 6_738_415_616
    kept, billions = LLAMA_2_7B[share]
    sizes = sizes_at(anatomy, describe_residual(model, anatomy), Slice(kept, kept))
    assert round(sizes.parameters / 1e9, 3) == billions
    d, f, v, layers = kept, 11008, 32000, 32
    by_hand = 2 * v * d + layers * (4 * 4096 * d + 3 * f * d + 2 * d * d)
    assert sizes.parameters == by_hand


# ---- what cannot be had ------------------------------------------------------------------------


def test_it_is_known_with_its_settings() -> None:
    assert "slicegpt" in method_names()
    options = slicegpt().options
    assert (options.multiple, options.signal, options.head) == (8, "stream", "sliced")
    with pytest.raises(RecipeError) as caught:
        get_method("slicegpt", {"layers": 2})
    assert str(caught.value) == (
        "option of method slicegpt layers is not known: allowed are head, multiple, signal"
    )


def test_norms_behind_what_they_belong_to_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": False}
    monkeypatch.setitem(tiny.MODELS, "post", ("opt", settings))
    stream = Stream(open_checkpoint(tiny.write_model(tmp_path / "post", "post")))
    with pytest.raises(FamilyError) as caught:
        describe_residual(stream.model, stream.anatomy)
    assert str(caught.value) == (
        "this opt model has its norms behind attention and FFN, or none at its end, so that the "
        "stream between them cannot be rotated: use another --method"
    )


def test_a_family_without_a_stream_is_refused(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    stream = Stream(open_checkpoint(model_folder("qwen2")))
    anatomy = replace(stream.anatomy, family=replace(stream.anatomy.family, residual=None))
    with pytest.raises(FamilyError) as caught:
        describe_residual(stream.model, anatomy)
    assert str(caught.value) == (
        "model type qwen2 has no residual stream described, which slicing the hidden width needs: "
        "fill its entry residual in secateur/anatomy/families.py, or use another --method"
    )


def test_activations_that_are_not_finite_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make_model("llama-gqa-tied")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e38)
        model.model.layers[2].mlp.up_proj.weight.mul_(1e30)
    folder = tmp_path / "loud"
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    with pytest.raises(SourceError) as caught:
        sliced(folder, Slice(24, 24), slicegpt(), windows(4, 20))
    assert str(caught.value) == (
        "block 2 puts out NaN or infinite values on the calibration text: check the weights, or "
        "try other text with --calibration"
    )


def test_a_plan_is_checked(model_folder: Folder, tmp_path: Path) -> None:
    from secateur.rotation.plan import StoredBases

    plan, _, _ = sliced(model_folder("llama-gqa-tied"), Slice(24, 32), slicegpt(), windows(4, 20))
    held = [plan.bases.of_block(i) for i in range(4)]  # type: ignore[union-attr]
    for number, bases in enumerate(held):
        write_bases(tmp_path, number, 4, bases)
    plan.bases = StoredBases(tmp_path, 4)
    plan.check()
    for number, bases in enumerate(held):
        got = plan.bases.of_block(number)
        assert all(torch.equal(a, b) for a, b in zip(got, bases, strict=True))

    write_bases(tmp_path, 1, 4, [held[1][0], held[1][1] * 1.01, held[1][2]])
    with pytest.raises(PlanError) as caught:
        plan.check()
    assert str(caught.value).startswith(
        "the plan of block 1: the columns of basis 1 are not orthonormal (off by 0.02"
    )
    write_bases(tmp_path, 1, 4, [held[1][0], held[1][1][:, :20], held[1][2]])
    with pytest.raises(PlanError) as caught:
        plan.check()
    assert str(caught.value) == (
        "the plan of block 1: its bases are [(32, 24), (32, 20), (32, 24)], they should be "
        "[(32, 24), (32, 24), (32, 24)]"
    )
    (tmp_path / "secateur_plan-00001-of-00004.safetensors").unlink()
    with pytest.raises(PlanError, match="the plan of block 0: its bases cannot be read"):
        plan.check()
