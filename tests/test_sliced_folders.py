"""A folder with a sliced hidden width: it opens, computes its plan, and is used as any other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from commands import secateur as command
from folders import bytes_of
from safetensors.torch import load_file, save_file
from test_kill import KILLED, SERVER

import secateur
from secateur.calibration import consecutive_windows, load_text
from secateur.checkpoint import open_checkpoint
from secateur.errors import OutputError, PlanError, SourceError, VerifyError
from secateur.exporting import export, verify
from secateur.modules import MODELING_FILE
from secateur.outputs.hf import INDEX, RECORD
from secateur.outputs.verify import verify_folder
from secateur.pruning import PruneResult, prune
from secateur.recipe import Recipe, make_recipe
from secateur.rotation.plan import RotationPlan, Slice
from secateur.streaming import Stream

Folder = Callable[[str], Path]
Write = Callable[..., PruneResult]


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies modelling files before it runs them; not into the user's home."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        yield


SOURCES: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def sources(model_folder: Folder) -> None:
    SOURCES.update({name: model_folder(name) for name in tiny.MODELS})


def recipe(**fields: Any) -> Recipe:
    settings = {"remove": "10%", "of": "decoder", "calibration": {"samples": 4, "length": 24}}
    return make_recipe(method="slicegpt", **{**settings, **fields})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model_folder: Folder) -> Write:
    """A sliced tiny model; each combination once."""
    root, done = tmp_path_factory.mktemp("sliced"), {}

    def write(name: str, **fields: Any) -> PruneResult:
        key = f"{name}-{sorted(fields.items())}"
        if key not in done:
            out = root / str(len(done))
            done[key] = prune(model_folder(name), out, recipe(**fields), verify=False)
        return done[key]

    return write


def reopen(folder: Path, dtype: Any = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, trust_remote_code=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def tokens_of(windows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCABULARY, (windows, length), generator=generator)


def damage(folder: Path, layer: str) -> None:
    """Change one weight tensor in place, so that it stays finite."""
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    (name,) = [n for n in index if n.endswith(layer)]
    path = folder / index[name]
    tensors = load_file(path)
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, path, {"format": "pt"})


# ---- the round trip ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_fresh_process_opens_it(name: str, model_folder: Folder, tmp_path: Path) -> None:
    """The command's own check: stock blocks of the original, the stream projected."""
    made = prune(model_folder(name), tmp_path / "out", recipe())
    done, plan = made.verification, made.plan
    assert isinstance(plan, RotationPlan)
    assert done is not None
    assert done.model_class.startswith("Secateur")
    assert done.parameters == plan.sizes().parameters
    assert done.max_difference < 1e-4
    kept = plan.cut.kept  # the largest multiple of 8 that takes a tenth of the blocks
    wider = replace(plan, cut=Slice(kept + 8, kept + 8))
    assert (kept, plan.of) == (16 if name == "llama-biases" else 24, "decoder")
    assert wider.gone < made.asked <= plan.gone

    config = json.loads((made.out / "config.json").read_text())
    rotation = config["secateur"]["rotation"]
    assert (rotation["width"], rotation["kept"], rotation["kept_last"]) == (32, kept, kept)
    assert config["hidden_size"] == 32  # heads are made of it
    own = open_checkpoint(model_folder(name)).config
    head_goes_own_way = own.tie_word_embeddings and name != "opt-project"
    assert config["tie_word_embeddings"] == (own.tie_word_embeddings and not head_goes_own_way)
    assert bool(plan.own_head) == head_goes_own_way

    record = json.loads((made.out / RECORD).read_text())
    sizes = plan.sizes()
    assert record["plan"]["parameters"]["after"] == sizes.parameters
    assert record["plan"]["rotation"]["shortcut_parameters"] == plan.shortcuts
    assert record["plan"]["rotation"]["untied_head_parameters"] == plan.own_head
    assert record["reached"] == {"parameters_removed": plan.gone}
    assert record["asked"] == {"parameters_removed": made.asked}
    weights = sum(
        tensor.numel()
        for path in made.out.glob("model-*.safetensors")
        for tensor in load_file(path).values()
    )
    assert weights == sizes.parameters
    assert made.bytes_written == 4 * weights


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_sixteen_bits_it_is_what_the_file_holds(
    dtype: str, model_folder: Folder, tmp_path: Path
) -> None:
    made = prune(model_folder("opt"), tmp_path / "out", recipe(dtype=dtype))
    assert made.verification is not None
    assert made.verification.max_difference < 1e-4
    model = reopen(made.out, "auto")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    tokens = tokens_of(2, 16)
    full = logits_of(reopen(made.out), tokens)
    assert (logits_of(model, tokens).float() - full).norm() < 0.1 * full.norm()


def test_what_does_not_fit_in_memory_is_streamed(written: Write) -> None:
    made = written("llama-biases")
    stream = Stream(open_checkpoint(SOURCES["llama-biases"]))
    found = verify_folder(made.out, stream, made.plan, torch.float32, memory=1)
    assert found.model_class == "SecateurLlamaForCausalLM, streamed"
    assert found.max_difference < 1e-4


@pytest.mark.parametrize("layer", [".2.shortcuts.1.weight", ".1.mlp.down_proj.weight"])
def test_damage_is_found(layer: str, written: Write, tmp_path: Path) -> None:
    made, broken = written("qwen3"), tmp_path / "broken"
    shutil.copytree(made.out, broken)
    damage(broken, layer)
    stream = Stream(open_checkpoint(SOURCES["qwen3"]))
    with pytest.raises(VerifyError, match="computes something else than its plan"):
        verify_folder(broken, stream, made.plan, torch.float32)


def test_verify_looks_again(written: Write, tmp_path: Path) -> None:
    made = written("mistral")
    assert verify(made.out).max_difference < 1e-4  # the folder against its own files
    assert verify(made.out, against=SOURCES["mistral"]).max_difference < 1e-4
    with pytest.raises(SourceError, match="was not made from"):
        verify(made.out, against=SOURCES["qwen2"])
    light = tmp_path / "light"
    shutil.copytree(made.out, light, ignore=shutil.ignore_patterns("secateur_plan-*"))
    assert verify(light).max_difference < 1e-4  # only --against needs the bases
    with pytest.raises(PlanError, match="the plan of block 0: its bases cannot be read"):
        verify(light, against=SOURCES["mistral"])
    (light / MODELING_FILE).write_text("print('something else')\n")
    with pytest.raises(SourceError, match="brings Python code that is not what"):
        verify(light)


# ---- used as any other model -------------------------------------------------------------------

REPRESENTATIVES = pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])


@REPRESENTATIVES
def test_generation_with_a_cache_equals_without(name: str, written: Write) -> None:
    model, prompt = reopen(written(name).out), tokens_of(2, 10)
    settings = {
        "attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "min_new_tokens": 12,
        "do_sample": False, "pad_token_id": 2, "return_dict_in_generate": True,
        "output_logits": True,
    }  # fmt: skip
    cached = model.generate(prompt, use_cache=True, **settings)
    plain = model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(
        torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4
    )


@REPRESENTATIVES
def test_hidden_states_and_attentions_can_be_had(name: str, written: Write) -> None:
    model = reopen(written(name).out)
    with torch.no_grad():
        out = model(tokens_of(1, 8), output_hidden_states=True)
    assert [h.shape[-1] for h in out.hidden_states] == [24] * 5


@REPRESENTATIVES
def test_saved_again_it_opens_again(name: str, written: Write, tmp_path: Path) -> None:
    model = reopen(written(name).out)
    model.save_pretrained(tmp_path / f"again-{name}")
    tokens = tokens_of(2, 16)
    again = reopen(tmp_path / f"again-{name}")
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))


@REPRESENTATIVES
def test_it_can_be_trained(name: str, written: Write) -> None:
    """Every parameter gets a gradient, shortcuts too; a step lowers the loss."""
    model, tokens = reopen(written(name).out).train(), tokens_of(4, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_compiled_it_computes_the_same(written: Write) -> None:
    model, tokens = reopen(written("llama-gqa-tied").out), tokens_of(2, 16)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        logits_of(compiled, tokens), logits_of(model, tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt-project"])
def test_evaluate_agrees_with_transformers(name: str, written: Write) -> None:
    out = written(name).out
    tokenizer = open_checkpoint(out).tokenizer
    windows = consecutive_windows(
        load_text("builtin", use="evaluation"), tokenizer, length=48, most=5
    )
    logits = logits_of(reopen(out), windows.tokens)[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).double(), windows.tokens[:, 1:].reshape(-1)
    )
    found = secateur.evaluate(out, length=48, windows=5)
    assert found.value == pytest.approx(float(loss.exp()), rel=1e-4)


def test_the_card_says_what_was_done(written: Write) -> None:
    made = written("llama-gqa-tied")
    card = (made.out / "README.md").read_text()
    assert (
        "Its hidden width was rotated and sliced, with a shortcut matrix on every residual, so the "
        "folder carries `modeling_secateur.py`" in card
    )
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in card
    assert "`secateur_plan-*.safetensors` hold the bases" in card
    assert make_recipe(**yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])) == recipe()


def test_the_same_bytes_anywhere(written: Write, tmp_path: Path) -> None:
    again = prune(SOURCES["opt"], tmp_path / "deep" / "out", recipe(), verify=False)
    assert bytes_of(again.out) == bytes_of(written("opt").out)


# ---- a run that is killed ----------------------------------------------------------------------


def test_killed_anywhere_it_ends_in_the_same_bytes(model_folder: Folder, tmp_path: Path) -> None:
    """As tests/test_kill.py does for the other kinds of cut: SIGKILL at a spread of moments."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    fields = recipe().model_dump()

    def run(out: Path, at: int | None = None) -> dict[str, Any]:
        request = {
            "source": str(model_folder("llama-gqa-tied")), "out": str(out), "recipe": fields,
            "at": at,
        }  # fmt: skip
        print(json.dumps(request), file=server.stdin, flush=True)
        return dict(json.loads(server.stdout.readline()))  # type: ignore[union-attr]

    whole = run(tmp_path / "whole" / "out")
    assert whole["status"] == 0
    moments, files = whole["said"]["moments"], bytes_of(tmp_path / "whole" / "out")
    lines = [n for n in moments if n.startswith("after line")]
    assert lines == [f"after line {k}" for k in ["identity", *["block"] * 4, "files"]]
    second = [i for i, name in enumerate(moments) if name == "after line block"][1]
    end = moments.index("after out.partial.done")
    for at in sorted({*range(3, end, 7), second, end - 1}):
        out = tmp_path / str(at) / "out"
        assert run(out, at)["status"] == KILLED
        again = run(out)
        assert again["status"] == 0, moments[at]
        assert again["said"]["error"] is None, moments[at]
        assert bytes_of(out) == files, moments[at]
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        if at == second:
            assert again["said"]["moments"].count("after line block") == 2
    server.stdin.close()
    assert server.wait(timeout=60) == 0


# ---- on the command line -----------------------------------------------------------------------

SMALL = ("--method", "slicegpt", "--samples", "4", "--length", "16")


def test_plan_shows_the_widths(model_folder: Folder) -> None:
    out = command(
        "plan", model_folder("llama-mha-untied"), "--remove", "15%", *SMALL
    ).fine().splitlines()  # fmt: skip
    assert out[0].split("  ")[0] == "block"
    assert "widths of the stream" in out[0]
    assert out[1].split()[:5] == ["0", "12.4%", "24", "24", "24"]
    assert "parameters         54,304  45,120  16.91%" in out
    assert "asked 8,146 parameters, reached 9,184 (+1.91% of the model)" in out
    assert (
        "the difference is above 0.2 points: one width serves the whole model and is rounded down "
        "(--set multiple=1 comes closest)" in out
    )
    assert (
        "hidden width 32 -> 24 (75.0%): the shortcuts of its residuals take 4,608 parameters" in out
    )


def test_a_share_of_the_blocks_is_reported_as_one(model_folder: Folder) -> None:
    out = command(
        "plan", model_folder("llama-gqa-tied"), "--remove", "10%", "--of", "decoder", *SMALL
    ).fine().splitlines()  # fmt: skip
    assert "parameters         40,608  42,048  -3.55%" in out  # the head is no longer free
    assert "asked 3,098 parameters, reached 3,328 (+0.74% of the blocks)" in out
    assert out[-3] == (
        "hidden width 32 -> 24 (75.0%): the shortcuts of its residuals take 4,608 parameters, the "
        "head, until now the embedding, 7,200"
    )


def test_a_finer_multiple_comes_closer(model_folder: Folder) -> None:
    out = command(
        "plan", model_folder("llama-mha-untied"), "--remove", "13%", *SMALL, "--set", "multiple=1"
    ).fine()  # fmt: skip
    assert "hidden width 32 -> 25 (78.1%)" in out


def test_the_head_can_stay_whole(model_folder: Folder, tmp_path: Path) -> None:
    made = prune(
        model_folder("llama-gqa-tied"), tmp_path / "out", recipe(options={"head": "whole"})
    )
    assert isinstance(made.plan, RotationPlan)
    assert (made.plan.cut.kept, made.plan.cut.kept_last) == (16, 32)
    assert made.plan.own_head == 32 * tiny.VOCABULARY
    assert reopen(made.out).lm_head.weight.shape == (tiny.VOCABULARY, 32)


REFUSED = {
    "more than there is": (
        ("--remove", "70%"),
        "28,426 parameters should go, but even the smallest hidden width, 8 of 32, removes 27,616: "
        "the shortcuts of its residuals take 512 and the head, until now the embedding, 2,400; ask "
        "for less, lower multiple with --set, or use another --method",
    ),
    "grows first": (
        ("--remove", "5%", "--set", "multiple=28"),
        "2,030 parameters should go, but even the smallest hidden width, 28 of 32, adds 9,344: the "
        "shortcuts of its residuals take 6,272 and the head, until now the embedding, 8,400; ask "
        "for less, lower multiple with --set, or use another --method",
    ),
    "of the blocks": (
        ("--remove", "5%", "--of", "decoder", "--set", "multiple=28"),
        "1,549 parameters should go from the decoder blocks, but even the smallest hidden width, "
        "28 of 32, adds 2,176: the shortcuts of its residuals take 6,272 and the head, until now "
        "the embedding, 8,400; ask for less, lower multiple with --set, or use another --method",
    ),
    "multiple": (
        ("--remove", "5%", "--set", "multiple=32"),
        "multiple is 32, but the hidden width is only 32: allowed are 1 to 31",
    ),
    "structure": (
        ("--remove", "10%", "--structure", "coupled"),
        "--structure says what goes inside blocks, but method slicegpt cuts the hidden width of "
        "the whole model: leave out --structure",
    ),
    "layout": (
        ("--remove", "10%", "--layout", "uniform"),
        "--layout says whether blocks have widths of their own, but method slicegpt cuts the "
        "hidden width of the whole model: leave out --layout",
    ),
    "round-to": (
        ("--remove", "10%", "--round-to", "64"),
        "--round-to says multiples of FFN widths, but method slicegpt cuts the hidden width of the "
        "whole model: leave out --round-to",
    ),
    "layers": (
        ("--remove", "10%", "--layers", "1"),
        "option of method slicegpt layers is not known: allowed are head, multiple, signal",
    ),
    "signal": (
        ("--remove", "10%", "--set", "signal=loud"),
        "option of method slicegpt signal is 'loud': Input should be 'stream' or 'normed'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused(name: str, model_folder: Folder, tmp_path: Path) -> None:
    arguments, text = REFUSED[name]
    for verb in (("plan",), ("prune", "--out", tmp_path / "out")):
        ended = command(*verb, model_folder("llama-gqa-tied"), *SMALL, *arguments)
        ended.refused_at_once(text)
    assert not list(tmp_path.iterdir())


def test_gguf_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    command(
        "prune", tmp_path / "absent", "--remove", "10%", *SMALL, "--out", tmp_path / "out.gguf"
    ).refused_at_once(
        "a GGUF file cannot hold what method slicegpt makes: llama.cpp has no tensor for the "
        "shortcut matrices of its residuals; give --out a folder name, or use another --method"
    )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_sliced_folder_does_not_become_gguf(written: Write, tmp_path: Path) -> None:
    out = written("llama-gqa-tied").out
    with pytest.raises(OutputError) as caught:
        export(out, tmp_path / "out.gguf")
    assert str(caught.value) == (
        f"a GGUF file cannot hold {out}: its hidden width was sliced, and llama.cpp has no tensor "
        "for the shortcut matrices of its residuals; run it in transformers, or prune with another "
        "--method"
    )
    assert not list(tmp_path.iterdir())


def test_a_sliced_folder_is_not_pruned_again(written: Write) -> None:
    out = written("llama-gqa-tied").out
    command("plan", out, "--remove", "10%", *SMALL).refused_at_once(
        f"source {out} has been pruned to different sizes in each block already: prune the "
        "original with a larger --remove instead"
    )


def test_inspect_knows_the_width(written: Write) -> None:
    out = command("inspect", written("llama-gqa-tied").out).fine()
    assert "hidden width       32, sliced to 24" in out
