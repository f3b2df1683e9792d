"""What is written opens, computes the plan, and behaves as any other transformers model."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from folders import bytes_of
from safetensors.torch import load_file, save_file

import secateur
from secateur.calibration import consecutive_windows, load_text
from secateur.checkpoint import open_checkpoint
from secateur.checkpoint.safetensors_folder import read_header
from secateur.errors import RecipeError, VerifyError
from secateur.evaluation import load_whole
from secateur.masking import masked_hidden
from secateur.modules import MODELING_FILE, SlicedLinear
from secateur.outputs.hf import INDEX
from secateur.outputs.verify import verify_folder
from secateur.pruning import PLAN_TENSORS, RECORD, PruneResult, prune
from secateur.recipe import Recipe, make_recipe
from secateur.streaming import Stream

Folder = Callable[[str], Path]

#: name -> (share of the decoder, options). ``stock`` ones must need no code of ours.
EVERYWHERE: dict[str, Any] = {"exempt_first": 0, "exempt_last": 0, "layers": 0, "grid": 8}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "layers": ("25%", {"layers": 1, "denses": "neurons"}),
    "neurons": ("10%", {"layers": 0, "denses": "neurons"}),
    "outputs": ("20%", {**EVERYWHERE, "denses": "outputs"}),
    "all": ("30%", {**EVERYWHERE, "denses": "all"}),
    "width": ("20%", {**EVERYWHERE, "groups": "keep"}),
    "layers and all": ("45%", {**EVERYWHERE, "denses": "all", "layers": 1}),
    "coupled": ("40%", {**EVERYWHERE, "allocation": "variance"}),
    "one group": ("50%", {**EVERYWHERE, "groups": 1}),
    "uniform group": ("50%", {**EVERYWHERE, "groups": 1, "layers": 1}),
    "obs": ("30%", {**EVERYWHERE, "pull": 0.1}),
    "obs one group": ("57%", {**EVERYWHERE, "groups": 1, "pull": 0.1, "layers": 1}),
}
#: Variants with one width for all blocks; stock classes must need no code of ours for them.
UNIFORM = ("width", "uniform group")
STOCK = ("layers", *UNIFORM)
SHORT = {"samples": 4, "length": 24}


@dataclass(frozen=True)
class Written:
    """A pruned tiny model and what is needed to compare it."""

    source: Path
    result: PruneResult

    @property
    def out(self) -> Path:
        return self.result.out

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "config.json").read_text()))


Write = Callable[..., Written]


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers copies modelling files before it runs them; not into the user's home."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        yield cache


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, model_folder: Folder) -> Write:
    """Prune a tiny model; each combination once a session."""
    root = tmp_path_factory.mktemp("pruned")
    done: dict[tuple[str, str, str], Written] = {}

    def write(name: str, variant: str, dtype: str = "auto") -> Written:
        key = (name, variant, dtype)
        if key not in done:
            source = model_folder(name)
            out = root / "-".join(key).replace(" ", "-")
            result = prune(source, out, recipe_of(variant, dtype), verify=False)
            done[key] = Written(source, result)
        return done[key]

    return write


def recipe_of(variant: str, dtype: str = "auto") -> Recipe:
    share, options = VARIANTS[variant]
    return make_recipe(
        remove=share,
        of="decoder",
        options=options,
        calibration=SHORT,
        dtype=dtype,
        layout="uniform" if variant in UNIFORM else "auto",
        method="obs" if variant.startswith("obs") else "comp",
    )


def reopen(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Open as a user would; everything must be found and nothing left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **{"trust_remote_code": True, **settings}
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits_of(model: Any, tokens: torch.Tensor, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False, **settings).logits


def planned_logits(
    written: Written, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The original with the plan as zeros and scales: an independent path to the same numbers."""
    stream = Stream(open_checkpoint(written.source))
    hidden = masked_hidden(stream, written.result.plan, tokens, dtype)
    found: list[torch.Tensor] = []
    stream.head(hidden, tokens, lambda _, window: found.append(window), dtype=dtype)
    return torch.stack(found)


def random_tokens(windows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCABULARY, (windows, length), generator=generator)


# ---- the round trip --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_round_trip(name: str, variant: str, written: Write) -> None:
    if variant == "uniform group" and name.startswith("opt"):
        with pytest.raises(RecipeError) as caught:
            written(name, variant)
        assert str(caught.value) == (
            "groups is 1, but the stock class of opt holds 4 KV groups: choose one of these, auto "
            "or keep"
        )
        return
    made = written(name, variant)
    plan, config = made.result.plan, made.config
    model = reopen(made.out)
    tokens = random_tokens(3, 20)
    torch.testing.assert_close(
        logits_of(model, tokens), planned_logits(made, tokens), rtol=1e-4, atol=1e-5
    )

    # The class, and whether code of ours is needed.
    stock = type(open_skeleton(made.source)).__name__
    if variant in STOCK:
        assert type(model).__name__ == config["architectures"][0] == stock
        assert not (made.out / MODELING_FILE).exists()
        assert "auto_map" not in config
        assert "secateur" not in config
        reopen(made.out, trust_remote_code=False)
    else:
        assert type(model).__name__ == config["architectures"][0] == f"Secateur{stock}"
        assert config["model_type"] == "secateur_" + plan.anatomy.model_type
        assert (made.out / MODELING_FILE).is_file()
    assert config["num_hidden_layers"] == len(plan.blocks)
    assert len(plan.removed_layers) == VARIANTS[variant][1].get("layers", 0)

    # Sizes: the plan, the opened model, the files and the report agree.
    sizes = plan.sizes()
    assert sum(p.numel() for p in model.parameters()) == sizes.parameters
    assert sizes.parameters < plan.sizes_before().parameters
    assert made.result.bytes_written == 4 * sizes.parameters
    check_files(made, model)


def open_skeleton(source: Path) -> Any:
    return Stream(open_checkpoint(source)).model


def check_files(made: Written, model: Any) -> None:
    """Every shard holds what the index, the config and the opened model say, and nothing else."""
    index = json.loads((made.out / INDEX).read_text())
    shards = sorted(p.name for p in made.out.glob("model-*.safetensors"))
    assert len(shards) == len(made.result.plan.blocks) + 1
    headers = {shard: read_header(made.out / shard) for shard in shards}
    stored = {name: info for header in headers.values() for name, info in header.items()}
    assert index["weight_map"] == {n: shard for shard in shards for n in headers[shard]}
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in stored.values())

    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    assert {n: s for n, s in wanted.items() if n not in tied} == {
        n: info.shape for n, info in stored.items()
    }
    parameters = dict(model.named_parameters())
    assert sum(stored[n].numel for n in stored if n in parameters) == (
        made.result.plan.sizes().parameters
    )
    shapes = made.config.get("secateur", {}).get("shapes", [])
    path = made.result.plan.anatomy.family.blocks
    for number, sizes in enumerate(shapes):
        for layer, (kept_in, full_in, kept_out, full_out) in sizes.items():
            prefix = f"{path}.{number}.{layer}"
            assert stored[f"{prefix}.weight"].shape == (kept_out, kept_in)
            assert (f"{prefix}.in_index" in stored) == (kept_in != full_in)
            assert (f"{prefix}.out_index" in stored) == (kept_out != full_out)


def test_blocks_with_their_own_attention_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of four is removed, so that every other would have the wrong kind by its place."""
    kinds = ["full_attention", "sliding_attention"] * 2
    settings = {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": kinds,
    }
    monkeypatch.setitem(tiny.MODELS, "mixed", ("qwen2", settings))
    model = tiny.make_model("mixed")
    with torch.no_grad():  # a block that changes nothing goes first
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    source = tmp_path / "mixed"
    model.save_pretrained(source)
    tiny.make_tokenizer().save_pretrained(source)
    tokens = random_tokens(3, 20)
    for variant in ("layers", "layers and all"):
        result = prune(source, tmp_path / variant, recipe_of(variant), verify=False)
        made = Written(source, result)
        assert result.plan.removed_layers == [0]
        assert made.config["layer_types"] == kinds[1:]
        torch.testing.assert_close(
            logits_of(reopen(made.out), tokens),
            planned_logits(made, tokens),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["layers", "all"])
def test_weights_are_written_in_the_type_asked_for(
    dtype: str, variant: str, written: Write
) -> None:
    made = written("llama-biases", variant, dtype)
    assert made.config["dtype"] == dtype
    kind = getattr(torch, dtype)
    model = reopen(made.out, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {kind}
    assert made.result.bytes_written == 2 * made.result.plan.sizes().parameters
    tokens = random_tokens(2, 20)
    torch.testing.assert_close(  # the values in the file, computed with in float32
        logits_of(reopen(made.out), tokens),
        planned_logits(made, tokens, kind),
        rtol=1e-4,
        atol=1e-5,
    )


# ---- used as any other model -----------------------------------------------------------------

REPRESENTATIVES = pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])


@REPRESENTATIVES
def test_generation_with_a_cache_equals_without(name: str, written: Write) -> None:
    model = reopen(written(name, "all").out)
    prompt = random_tokens(2, 10)
    settings = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 2,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    cached = model.generate(prompt, use_cache=True, **settings)
    plain = model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(
        torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4
    )
    assert cached.past_key_values is not None


@REPRESENTATIVES
def test_a_padded_batch_equals_single_prompts(name: str, written: Write) -> None:
    model = reopen(written(name, "all").out)
    prompts = [random_tokens(1, length, seed=length)[0] for length in (5, 9, 12)]
    batch = torch.full((3, 12), 2)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, 12 - len(prompt) :] = prompt
        mask[row, 12 - len(prompt) :] = 1
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    together = model.generate(batch, attention_mask=mask, **settings)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **settings)
        assert torch.equal(together[row, 12:], alone[0, len(prompt) :])


@REPRESENTATIVES
def test_saved_again_it_opens_again(name: str, written: Write, tmp_path: Path) -> None:
    made = written(name, "all")
    model = reopen(made.out)
    again = tmp_path / f"again-{name}"
    model.save_pretrained(again)
    assert (again / MODELING_FILE).read_bytes() == (made.out / MODELING_FILE).read_bytes()
    tokens = random_tokens(2, 16)
    assert torch.equal(logits_of(reopen(again), tokens), logits_of(model, tokens))
    assert json.loads((again / "config.json").read_text())["secateur"] == made.config["secateur"]


@REPRESENTATIVES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs(name: str, dtype: torch.dtype, written: Write) -> None:
    made = written(name, "all")
    model = reopen(made.out, dtype)
    indices = [b for n, b in model.named_buffers() if n.endswith("_index")]
    assert indices
    assert all(b.dtype == torch.int64 for b in indices)  # numbers of inputs do not fit bfloat16
    tokens = random_tokens(2, 16)
    half, full = logits_of(model, tokens), logits_of(reopen(made.out), tokens)
    assert half.dtype == dtype
    assert torch.isfinite(half).all()
    error = (half.float() - full).norm() / full.norm()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama-gqa-tied", "aot_eager"),
        pytest.param("llama-gqa-tied", "inductor", marks=pytest.mark.slow),
        pytest.param("opt", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_it_computes_the_same(name: str, backend: str, written: Write) -> None:
    """In one graph; ``inductor``, what users get by default, takes a minute and a half."""
    model = reopen(written(name, "all").out)
    tokens = random_tokens(2, 16)
    wanted = logits_of(model, tokens)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(logits_of(compiled, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_without_trust_transformers_refuses(written: Write) -> None:
    from transformers import AutoModelForCausalLM

    out = written("llama-gqa-tied", "neurons").out
    with pytest.raises(ValueError, match=r"(?s)custom code.*trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)


@pytest.mark.parametrize("variant", ["layers", "all"])
def test_the_tokenizer_opens_without_trust(variant: str, written: Write) -> None:
    from transformers import AutoTokenizer

    made = written("llama-gqa-tied", variant)
    text = "Pruning is done in winter, çà et là."
    opened = AutoTokenizer.from_pretrained(made.out, trust_remote_code=False)
    wanted = AutoTokenizer.from_pretrained(made.source)
    assert opened(text)["input_ids"] == wanted(text)["input_ids"]
    assert open_checkpoint(made.out).tokenizer(text)["input_ids"] == wanted(text)["input_ids"]


# ---- the check in a fresh process ------------------------------------------------------------


def damage(folder: Path, layer: str) -> None:
    """Flip every bit of one weight tensor's bytes but the exponents' highest, in place."""
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    (name,) = [n for n in index if n.endswith(layer)]
    path = folder / index[name]
    tensors = load_file(path)
    bits = tensors[name].view(torch.int32)
    tensors[name] = torch.bitwise_xor(bits, -0x7F800001).view(torch.float32)
    assert torch.isfinite(tensors[name]).all()
    save_file(tensors, path, {"format": "pt"})


def test_a_fresh_process_verifies_and_finds_damage(written: Write, tmp_path: Path) -> None:
    made = written("llama-gqa-tied", "all")
    stream = Stream(open_checkpoint(made.source))
    found = verify_folder(made.out, stream, made.result.plan, torch.float32)
    assert found.model_class == "SecateurLlamaForCausalLM"
    assert found.parameters == made.result.plan.sizes().parameters
    assert found.max_difference < 1e-4
    assert "fresh process as SecateurLlamaForCausalLM" in found.text()

    broken = tmp_path / "broken"
    shutil.copytree(made.out, broken)
    damage(broken, ".2.self_attn.o_proj.weight")
    with pytest.raises(VerifyError, match="computes something else than its plan"):
        verify_folder(broken, stream, made.result.plan, torch.float32)


def test_what_does_not_fit_in_memory_is_streamed(written: Write, tmp_path: Path) -> None:
    made = written("opt", "all")
    stream = Stream(open_checkpoint(made.source))
    found = verify_folder(made.out, stream, made.result.plan, torch.float32, memory=1)
    assert found.model_class == "SecateurOPTForCausalLM, streamed"
    assert found.parameters == made.result.plan.sizes().parameters
    assert found.max_difference < 1e-4

    broken = tmp_path / "broken"
    shutil.copytree(made.out, broken)
    damage(broken, ".2.self_attn.out_proj.weight")
    with pytest.raises(VerifyError, match="computes something else than its plan"):
        verify_folder(broken, stream, made.result.plan, torch.float32, memory=1)


def test_a_fresh_process_says_why_it_cannot_open(written: Write, tmp_path: Path) -> None:
    made = written("opt", "all")
    stream = Stream(open_checkpoint(made.source))
    broken = tmp_path / "broken"
    shutil.copytree(made.out, broken)
    (broken / MODELING_FILE).write_text("raise RuntimeError('no such luck')\n")
    with pytest.raises(VerifyError, match=r"does not open.*RuntimeError: no such luck"):
        verify_folder(broken, stream, made.result.plan, torch.float32)


def test_prune_verifies_before_the_folder_gets_its_name(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that fails its check stays in the work folder, and the same call tells again."""
    from secateur import pruning

    seen = []

    def refuse(folder: Path, *_: object, **__: object) -> None:
        seen.append(folder)
        raise VerifyError("it computes something else")

    monkeypatch.setattr(pruning, "verify_folder", refuse)
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(VerifyError):
            prune(model_folder("qwen2"), out, recipe_of("layers"))
    assert not out.exists()
    assert seen == [tmp_path / "out.partial" / "model"] * 2


# ---- the record and the card -----------------------------------------------------------------


def test_the_record_says_what_was_done(written: Write) -> None:
    made = written("llama-gqa-tied", "layers and all")
    plan = made.result.plan
    record = json.loads((made.out / RECORD).read_text())
    assert record["recipe"] == recipe_of("layers and all").model_dump()
    assert record["recipe"]["seed"] == 0
    assert record["method_options"]["denses"] == "all"
    assert record["method_options"]["damping"] > 0  # defaults are spelled out
    assert record["source"]["name"] == "llama-gqa-tied"
    assert record["source"]["fingerprint"] == open_checkpoint(made.source).fingerprint
    assert set(record["versions"]) == {"secateur", "python", "torch", "transformers", "safetensors"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["calibration"]["origin"] == "built-in passages"
    assert len(record["calibration"]["sha256"]) == 64

    before, after = plan.sizes_before(), plan.sizes()
    assert record["asked"]["parameters_removed"] == made.result.asked
    assert made.result.asked == round(0.45 * before.decoder)
    gone = before.parameters - after.parameters
    assert record["reached"]["parameters_removed"] == gone
    assert abs(gone - made.result.asked) < 0.002 * before.decoder
    assert record["plan"]["parameters"] == {"before": before.parameters, "after": after.parameters}
    assert record["plan"]["removed_layers"] == plan.removed_layers
    assert record["layer_stage"]["removed_in_order"] == plan.removed_layers
    assert [b["source"] for b in record["plan"]["blocks"]] == plan.kept_layers
    assert [b["shapes"] for b in record["plan"]["blocks"]] == made.config["secateur"]["shapes"]
    assert (made.out / RECORD).read_text().endswith("}\n")


def test_the_plan_tensors_are_the_plan(written: Write) -> None:
    made = written("qwen3", "all")
    stored = load_file(made.out / PLAN_TENSORS)
    wanted = {
        f"blocks.{number}.{name}": tensor
        for number, cut in enumerate(made.result.plan.blocks)
        for name, tensor in cut.tensors().items()
    }
    assert wanted
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)
    kinds = {name.split(".")[2] for name in stored}
    assert kinds == {"inputs", "scales", "rows"}
    # The class comes from the shipped file, so it is not the one of secateur.modules.
    sliced = [m for m in reopen(made.out).modules() if type(m).__name__ == SlicedLinear.__name__]
    assert sliced
    assert not any(isinstance(m, SlicedLinear) for m in sliced)


@pytest.mark.parametrize("variant", ["layers", "all"])
def test_the_card_says_how_to_open(
    variant: str, written: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    made = written("mistral", variant)
    card = (made.out / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    assert "secateur" in yaml.safe_load(header)["tags"]
    assert "# mistral, pruned" in body
    call = 'AutoModelForCausalLM.from_pretrained("FOLDER"{})'
    assert call.format("" if variant == "layers" else ", trust_remote_code=True") in body
    assert (MODELING_FILE in body) == (variant == "all")
    after = made.result.plan.sizes()
    assert f"{after.parameters:,}" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert make_recipe(**recipe) == recipe_of(variant)
    code = body.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(made.out)), names)
    assert names["model"].config.num_hidden_layers == len(made.result.plan.blocks)
    assert names["tokenizer"]("Spring")["input_ids"]
    said = capfd.readouterr()
    assert "Do you wish to run the custom code" not in said.out + said.err  # nobody is asked


def test_a_name_with_a_dot_stays_whole_in_the_card(model_folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "Some-1.7B"
    shutil.copytree(model_folder("opt"), source)
    out = prune(source, tmp_path / "out", recipe_of("layers"), verify=False).out
    assert "# Some-1.7B, pruned" in (out / "README.md").read_text()


def test_files_of_the_source_travel(model_folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("qwen2"), source)
    (source / "LICENSE").write_text("do as you like\n")
    (source / "chat_template.jinja").write_text("{{ messages }}\n")
    (source / "generation_config.json").write_text('{"temperature": 0.25}\n')
    (source / "secret.py").write_text("raise SystemExit\n")
    out = prune(source, tmp_path / "out", recipe_of("layers"), verify=False).out
    for name in ("LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "secret.py").exists()

    (source / "generation_config.json").unlink()
    other = prune(source, tmp_path / "other", recipe_of("layers"), verify=False).out
    assert json.loads((other / "generation_config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize("variant", ["layers", "all"])
def test_the_same_bytes_anywhere(variant: str, model_folder: Folder, tmp_path: Path) -> None:
    """Two runs, in folders of different names: nothing depends on time or place."""
    first = prune(model_folder("opt"), tmp_path / "one", recipe_of(variant), verify=False)
    deep = tmp_path / "a" / "b" / "two"
    second = prune(model_folder("opt"), deep, recipe_of(variant), verify=False)
    assert bytes_of(first.out) == bytes_of(second.out)
    assert not list(tmp_path.glob("*.partial*"))
    assert [p.name for p in deep.parent.iterdir()] == ["two"]


# ---- our own reading of our own output -------------------------------------------------------


def perplexity_by_transformers(model: Any, tokens: torch.Tensor) -> float:
    logits = logits_of(model, tokens)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).double(), tokens[:, 1:].reshape(-1)
    )
    return math.exp(float(losses))


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt-project"])
@pytest.mark.parametrize("variant", ["layers", "all", "layers and all"])
def test_evaluate_agrees_with_transformers(name: str, variant: str, written: Write) -> None:
    made = written(name, variant)
    checkpoint = open_checkpoint(made.out)
    windows = consecutive_windows(
        load_text("builtin", use="evaluation"), checkpoint.tokenizer, length=48, most=5
    )
    found = secateur.evaluate(made.out, length=48, windows=5)
    assert (found.windows, found.length, found.sha256) == (5, 48, windows.sha256)
    wanted = perplexity_by_transformers(reopen(made.out), windows.tokens)
    assert found.value == pytest.approx(wanted, rel=1e-4)
    # ... and load_whole, for generation
    torch.testing.assert_close(
        logits_of(load_whole(checkpoint), windows.tokens),
        logits_of(reopen(made.out), windows.tokens),
        rtol=1e-4,
        atol=1e-5,
    )


def test_evaluate_does_not_run_the_modelling_file(
    written: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = written("llama-gqa-tied", "all")
    copy = tmp_path / "copy"
    shutil.copytree(made.out, copy)
    mark = tmp_path / "it-ran"
    (copy / MODELING_FILE).write_text(f"open({str(mark)!r}, 'w')\nraise SystemExit(3)\n")
    got = secateur.evaluate(copy, length=48, windows=3)
    assert got == secateur.evaluate(made.out, length=48, windows=3)
    load_whole(open_checkpoint(copy))
    assert "You are using a model of type" not in capfd.readouterr().err
    (copy / MODELING_FILE).unlink()
    assert secateur.evaluate(copy, length=48, windows=3) == got
    assert not mark.exists()


def test_a_shipped_file_is_the_one_that_was_tested(written: Write) -> None:
    """One modelling file for all models of a family: same text whatever was cut."""
    digests = {
        hashlib.sha256((written(name, variant).out / MODELING_FILE).read_bytes()).hexdigest()
        for name in ("llama-gqa-tied", "llama-biases")
        for variant in ("neurons", "all")
    }
    assert len(digests) == 1
