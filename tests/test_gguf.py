"""GGUF files: they say what the plan says, torch reads them back, llama.cpp computes the same."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llama_cpp import needs_llama_cpp, write_gguf

from secateur.anatomy import Anatomy
from secateur.checkpoint import open_checkpoint
from secateur.errors import OutputError, SecateurError, SourceError
from secateur.evaluation import load_whole
from secateur.exporting import export as export_command
from secateur.masking import masked_hidden
from secateur.outputs import gguf, hf, llama_cpp
from secateur.plans import BlockCut, Plan, Widths, group_inputs, live_rows
from secateur.pruning import prune
from secateur.recipe import make_recipe
from secateur.streaming import Stream

Entry = tuple[str, dict[str, Any]]

GRANITE = {
    "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}  # fmt: skip
#: Heads of 16 where the hidden width of 32 would give each of the six 5.
WIDE_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
#: Models that llama.cpp has an architecture for: those of all tests, and what they leave out.
MODELS: dict[str, Entry] = {
    **{name: entry for name, entry in tiny.MODELS.items() if entry[0] != "opt"},
    "llama-3x2": (
        "llama",
        {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8},
    ),
    "llama-5x1": ("llama", {"hidden_size": 40, "num_attention_heads": 5}),
    "mistral-wide": ("mistral", {**WIDE_HEADS, "sliding_window": None}),
    "qwen2-tied": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3-tied": ("qwen3", {**WIDE_HEADS, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"num_key_value_heads": 2}),
    "granite": ("granite", GRANITE),
}
#: llama.cpp's names for blocks that are all alike, and for blocks that are not.
HOMES = {
    "llama": ("llama", "deci"), "mistral": ("llama", "deci"), "qwen2": ("qwen2", "deci"),
    "qwen3": ("qwen3", "openelm"), "smollm3": ("smollm3", ""), "granite": ("granite", ""),
}  # fmt: skip
#: Whose blocks must all be alike there.
ALIKE = ("qwen3", "smollm3", "granite")

EVERYWHERE: dict[str, Any] = {"exempt_first": 0, "exempt_last": 0, "layers": 0, "grid": 8}
#: name -> share of the decoder, options, layout.
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dense": ("", {}, ""),
    "per-layer": ("30%", {**EVERYWHERE, "groups": 1, "exempt_first": 1}, "per-layer"),
    "uniform": ("45%", {**EVERYWHERE, "groups": 1}, "uniform"),
    "removed": ("45%", {**EVERYWHERE, "layers": 1}, "auto"),
}
CASES = [
    (name, variant)
    for name in MODELS
    for variant in VARIANTS
    if not (name in ALIKE and variant == "per-layer")
    if (name, variant) != ("smollm3", "removed")  # a test of its own below
]


# ---- helpers ---------------------------------------------------------------------------------


def write_model(folder: Path, entry: Entry, layers: int = 3) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.MODELS, "this", entry)
        return tiny.write_model(folder, "this", layers=layers)


def stream_of(source: Path) -> Stream:
    return Stream(open_checkpoint(source))


def export(source: Path, file: Path, kind: str = "f32") -> gguf.Exported:
    return gguf.export(stream_of(source), file, kind=kind)


def some_tokens(count: int = 64) -> list[int]:
    return np.random.default_rng(0).integers(3, 259, count).tolist()


def logits_of(source: Path, tokens: Sequence[int]) -> torch.Tensor:
    """(length, vocabulary), by torch."""
    with torch.no_grad():
        return load_whole(open_checkpoint(source))(torch.tensor([tokens])).logits[0]


def same_logits(file: Path, source: Path, tokens: Sequence[int]) -> None:
    """llama.cpp's and torch's, which are of the size of 3, and their likeliest continuations."""
    wanted = logits_of(source, tokens)
    torch.testing.assert_close(llama_cpp.logits(file, tokens), wanted, rtol=0, atol=1e-3)
    assert wanted.abs().max() > 1


def refused(run: Callable[[], Any], text: str, kind: type[SecateurError] = OutputError) -> None:
    with pytest.raises(kind) as caught:
        run()
    assert str(caught.value) == text


def cut_of(
    anatomy: Anatomy,
    source: int,
    groups: Sequence[int],
    neurons: Sequence[int],
    scales: torch.Tensor | None = None,
) -> BlockCut:
    """What stays of a block of a LLaMA; ``scales`` are of the neurons."""
    inputs = {"mlp.down_proj": torch.tensor(neurons)}
    kept = None
    if len(groups) < anatomy.kv_heads:
        kept = torch.tensor(groups)
        inputs["self_attn.o_proj"] = group_inputs(anatomy, kept)
    factors = {} if scales is None else {"mlp.down_proj": scales}
    rows = live_rows(anatomy, inputs, kept)
    return BlockCut(source, inputs, factors, rows, groups=kept)


def write_plan(stream: Stream, plan: Plan, folder: Path) -> Path:
    """A pruned folder without a method."""
    plan.check()
    folder.mkdir()
    blocks, dtype = len(plan.blocks), torch.float32
    for number, cut in enumerate(plan.blocks):
        state = stream.read_block(cut.source, dtype)
        hf.write_block(folder, plan, cut, state, number=number, blocks=blocks, dtype=dtype)
    hf.write_outside(folder, stream.read_outside(dtype), blocks=blocks, dtype=dtype)
    hf.write_config(folder, stream.checkpoint, plan, dtype)
    hf.copy_companions(folder, stream.checkpoint)
    return folder


def uneven(source: Path, folder: Path, lost: str = "nothing both neurons groups") -> Path:
    """A pruned folder; a word for each of its blocks says what that has lost."""
    stream = stream_of(source)
    groups, neurons = range(stream.anatomy.kv_heads), range(stream.anatomy.ffn_width)
    left: dict[str, tuple[Sequence[int], Sequence[int]]] = {
        "nothing": (groups, neurons),
        "both": (groups[:1], neurons[5:18]),
        "neurons": (groups, neurons[::2]),
        "groups": (groups[1:], neurons),
    }
    words = lost.split()[: stream.anatomy.layers]
    cuts = [cut_of(stream.anatomy, i, *left[word]) for i, word in enumerate(words)]
    return write_plan(stream, Plan(stream.anatomy, cuts), folder)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """One process of llama.cpp for all tests here: to start one takes longer than to ask it."""
    held: list[Any] = []
    start = llama_cpp.open_worker

    def keep(file: str | Path, **environment: str) -> Any:
        if not held or held[-1]._process.poll() is not None:
            held.append(start(file, **environment))
        return nullcontext(held[-1])

    with pytest.MonkeyPatch.context() as patch:
        if llama_cpp.available():
            patch.setattr(llama_cpp, "open_worker", keep)
        yield
    for worker in held:
        with worker:
            pass


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of one of :data:`MODELS`."""
    root = tmp_path_factory.mktemp("sources")

    @lru_cache
    def folder(name: str) -> Path:
        return write_model(root / name, MODELS[name], layers=4 if name == "smollm3" else 3)

    return folder


@dataclass(frozen=True)
class Written:
    """A folder, dense or pruned, the widths of its blocks by the plan, and the file made of it."""

    folder: Path
    widths: list[Widths]
    exported: gguf.Exported

    @property
    def file(self) -> Path:
        return self.exported.path


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, source_of: Callable[[str], Path]
) -> Callable[[str, str], Written]:
    root = tmp_path_factory.mktemp("written")

    @lru_cache
    def make(name: str, variant: str) -> Written:
        folder, (share, options, layout) = source_of(name), VARIANTS[variant]
        if variant == "dense":
            anatomy = stream_of(folder).anatomy
            width = Widths(anatomy.query_heads, anatomy.kv_heads, anatomy.ffn_width)
            widths = [width] * anatomy.layers
        else:
            if name in ALIKE:
                layout = "uniform"
            recipe = make_recipe(
                remove=share, of="decoder", method="comp", options=options, layout=layout,
                calibration={"samples": 4, "length": 24},
            )  # fmt: skip
            result = prune(folder, root / f"{name}-{variant}", recipe, verify=False)
            folder = result.out
            widths = [w for cut in result.plan.blocks if (w := result.plan.widths(cut))]
            assert len(widths) == stream_of(source_of(name)).anatomy.layers - options["layers"]
        return Written(folder, widths, export(folder, root / f"{name}-{variant}.gguf"))

    return make


# ---- what a file says ------------------------------------------------------------------------


def expected_architecture(model_type: str, widths: list[Widths], config: Any) -> str:
    alike, uneven = HOMES[model_type]
    if len(set(widths)) > 1:
        return uneven
    plain = widths[0].query_heads * head_size(config) == config.hidden_size
    return "deci" if alike == "qwen2" and not plain else alike


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def expected_shapes(name: str, arch: str, widths: list[Widths], config: Any) -> dict[str, Any]:
    """Every tensor of a file and its shape, rows first."""
    model_type, fields = MODELS[name]
    hidden, size = config.hidden_size, head_size(config)
    found: dict[str, Any] = {"token_embd.weight": (tiny.VOCABULARY, hidden)}
    found["output_norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        found["output.weight"] = (tiny.VOCABULARY, hidden)
    for number, width in enumerate(widths):
        q, kv = width.query_heads * size, width.kv_groups * size
        shapes: dict[str, Any] = {
            "attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
            "attn_output": (hidden, q), "ffn_gate": (width.ffn, hidden),
            "ffn_up": (width.ffn, hidden), "ffn_down": (hidden, width.ffn),
        }  # fmt: skip
        biased = ["attn_q", "attn_k", "attn_v"] if model_type == "qwen2" else []
        if fields.get("attention_bias"):
            biased += ["attn_q", "attn_k", "attn_v", "attn_output"]
        if fields.get("mlp_bias"):
            biased += ["ffn_gate", "ffn_up", "ffn_down"]
        biases = {f"{layer}.bias": shapes[layer][:1] for layer in biased}
        if arch == "openelm":
            shapes["attn_qkv"] = (q + 2 * kv, hidden)
            del shapes["attn_q"], shapes["attn_k"], shapes["attn_v"]
        if model_type == "qwen3":
            shapes |= {"attn_q_norm": (size,), "attn_k_norm": (size,)}
        shapes |= {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
        block = {f"{layer}.weight": shape for layer, shape in shapes.items()} | biases
        found |= {f"blk.{number}.{tensor}": shape for tensor, shape in block.items()}
    return found


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_keys_and_tensors_are_those_of_the_plan(
    name: str, variant: str, written: Callable[[str, str], Written]
) -> None:
    made = written(name, variant)
    config, widths = open_checkpoint(made.folder).config, made.widths
    size = head_size(config)
    reader = GGUFReader(made.file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    arch = fields["general.architecture"]
    assert arch == made.exported.architecture
    assert arch == expected_architecture(MODELS[name][0], widths, config)
    assert variant == "removed" or (variant == "per-layer") == (len(set(widths)) > 1)
    if variant in ("per-layer", "uniform") and name != "llama-biases":  # which has one group only
        assert {w.kv_groups for w in widths[1:]} == {1}

    of_block = {
        "feed_forward_length": [w.ffn for w in widths],
        "attention.head_count": [w.query_heads for w in widths],
        "attention.head_count_kv": [w.kv_groups for w in widths],
    }
    if len(set(widths)) == 1:
        of_block = {key: values[0] for key, values in of_block.items()}
    elsewhere = {
        "block_count": len(widths),
        "embedding_length": config.hidden_size,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
        "vocab_size": tiny.VOCABULARY,
        "context_length": 8 if name == "mistral" else 128,
    }
    assert {key: fields[f"{arch}.{key}"] for key in of_block | elsewhere} == of_block | elsewhere
    shapes = {t.name: tuple(reversed(t.shape.tolist())) for t in reader.tensors}
    assert shapes == expected_shapes(name, arch, widths, config)
    assert {t.tensor_type.name for t in reader.tensors} == {"F32"}
    assert fields["general.file_type"] == 0
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert made.exported.bytes == made.file.stat().st_size


# ---- the same model in three programs --------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_torch_reads_it_back(
    name: str, variant: str, written: Callable[[str, str], Written]
) -> None:
    made = written(name, variant)
    folder, file = stream_of(made.folder), stream_of(made.file)
    assert file.checkpoint.config.model_type == folder.checkpoint.config.model_type
    assert file.checkpoint.dtype == torch.float32
    assert file.stored_parameters().keys() == folder.stored_parameters().keys()
    for parameter in folder.stored_parameters():
        assert torch.equal(file.read_tensor(parameter), folder.read_tensor(parameter)), parameter
    tokens = some_tokens(20)
    assert torch.equal(logits_of(made.file, tokens), logits_of(made.folder, tokens))
    # A tokenizer without merges, of which a GGUF file cannot have none.
    text = "Pruning is done in winter."
    assert file.checkpoint.tokenizer(text).input_ids == tiny.make_tokenizer()(text).input_ids


@needs_llama_cpp
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_llama_cpp_computes_it(
    name: str, variant: str, written: Callable[[str, str], Written]
) -> None:
    made = written(name, variant)
    window = name == "mistral"  # of 8 tokens, which llama.cpp does not know
    tokens = some_tokens(8 if window else 64)
    same_logits(made.file, made.folder, tokens)
    prompt = tokens[:4]
    (found,) = llama_cpp.greedy(made.file, [prompt], 4 if window else 12)
    behind = logits_of(made.folder, [*prompt, *found])[len(prompt) - 1 : -1]
    assert found == behind.argmax(-1).tolist()


def test_a_sliding_window_ends_the_context(written: Callable[[str, str], Written]) -> None:
    for variant, arch in (("dense", "llama"), ("per-layer", "deci")):
        assert written("mistral", variant).exported.notes == [
            f"llama.cpp's architecture {arch} knows no sliding window: the context ends at the "
            "window's 8 tokens, up to which both are the same"
        ]


@needs_llama_cpp
def test_smollm3_needs_every_fourth_block_in_its_place(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", MODELS["smollm3"], layers=8)
    stream = stream_of(source)

    def without(*gone: int) -> Path:
        cuts = [BlockCut(i) for i in range(8) if i not in gone]
        name = "-".join(map(str, gone))
        return write_plan(stream, Plan(stream.anatomy, cuts), tmp_path / name)

    fine = without(7)
    assert export(fine, tmp_path / "fine.gguf").architecture == "smollm3"
    same_logits(tmp_path / "fine.gguf", fine, some_tokens())
    for gone, places in (((2,), "2, 6"), ((3, 7), "(none)")):
        folder = without(*gone)
        refused(
            lambda folder=folder: export(folder, tmp_path / "out.gguf"),
            "llama.cpp's architecture smollm3 leaves positions out in every fourth block, this "
            f"model in blocks {places}: if removing whole blocks moved them, prune the original "
            "with --layers 0, else write a Hugging Face folder instead",
        )


@needs_llama_cpp
def test_another_program_s_file_is_written_again(tmp_path: Path) -> None:
    """Quantized blocks, names and keys of llama.cpp's own, a tokenizer with a merge."""
    model = tiny.make_model("llama-mha-untied", layers=2)
    theirs = write_gguf(tmp_path / "theirs.gguf", model)
    made = export(theirs, tmp_path / "ours.gguf")
    assert (made.architecture, made.notes) == ("llama", [])
    opened = stream_of(made.path)
    for name, parameter in model.named_parameters():
        assert torch.equal(opened.read_tensor(name), parameter)
    assert llama_cpp.tokenize(made.path, ["that"]) == llama_cpp.tokenize(theirs, ["that"])
    assert torch.equal(
        llama_cpp.logits(made.path, some_tokens()), llama_cpp.logits(theirs, some_tokens())
    )


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen3-tied"])
def test_our_file_is_written_again(name: str, written: Callable[[str, str], Written],
                                   tmp_path: Path) -> None:  # fmt: skip
    """To the same bytes, under the same name."""
    made = written(name, "removed")
    again = export(made.file, tmp_path / made.file.name)
    assert again.path.read_bytes() == made.file.read_bytes()
    assert open_checkpoint(again.path).fingerprint == open_checkpoint(made.file).fingerprint


def test_prune_to_a_file_is_prune_and_export(
    source_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was interrupted between two tensors."""
    source = source_of("qwen3-tied")
    recipe = make_recipe(
        remove="20%",
        method="comp",
        options=VARIANTS["per-layer"][1],
        calibration={"samples": 4, "length": 24},
    )
    folder = prune(source, tmp_path / "folder" / source.name, recipe, verify=False).out
    wanted = export(folder, tmp_path / "wanted.gguf", "q8_0").path

    out, encode = tmp_path / "out.gguf", gguf._encode

    def interrupted(piece: torch.Tensor, kind: Any, entry: gguf.Entry) -> bytes:
        if entry.name == "blk.1.ffn_up.weight":
            raise KeyboardInterrupt
        return encode(piece, kind, entry)

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, recipe, weights="q8_0", verify=False)
    assert not out.exists()
    assert not list(tmp_path.rglob("*.tmp"))
    result = prune(source, out, recipe, weights="q8_0", verify=False)
    assert result.out == out
    assert out.read_bytes() == wanted.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "wanted.gguf", "out.gguf"}


# ---- positions -------------------------------------------------------------------------------

BASE = {"rope_theta": 10000.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    **BASE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
YARN = {**BASE, "rope_type": "yarn", "factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, spelled out": {
        **YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
        "attention_factor": 0.1 * math.log(4.0) + 1,
    },
}  # fmt: skip
#: (model, scaling, whether blocks are uneven, architecture).
ROTATED = [
    *(("llama-gqa-tied", rope, False, "llama") for rope in ROPES),
    *(("llama-gqa-tied", rope, True, "deci") for rope in ROPES),
    ("mistral-wide", "llama3", True, "deci"),
    ("qwen2", "linear", False, "qwen2"),
    ("qwen2", "llama3", False, "deci"),
    ("qwen2", "yarn", True, "deci"),
    ("qwen3-tied", "linear", True, "openelm"),
    ("qwen3-tied", "yarn", False, "qwen3"),
    ("qwen3-tied", "yarn", True, "openelm"),
    ("smollm3", "yarn", False, "smollm3"),
    ("granite", "llama3", False, "granite"),
    ("granite", "linear", False, "granite"),
]


def rotated(folder: Path, name: str, rope: dict[str, Any]) -> Path:
    model_type, fields = MODELS[name]
    return write_model(folder, (model_type, {**fields, "rope_parameters": rope}), layers=2)


@needs_llama_cpp
@pytest.mark.parametrize(("name", "rope", "cut", "arch"), ROTATED)
def test_scaled_positions(name: str, rope: str, cut: bool, arch: str, tmp_path: Path) -> None:
    source = rotated(tmp_path / "source", name, ROPES[rope])
    if cut:
        source = uneven(source, tmp_path / "cut")
    made = export(source, tmp_path / "out.gguf")
    assert made.architecture == arch
    same_logits(made.path, source, some_tokens(100))
    if not cut and rope != "theta":  # and would not be the same without
        plain = rotated(tmp_path / "plain", name, {"rope_type": "default", "rope_theta": 10000.0})
        gap = logits_of(plain, some_tokens(100)) - logits_of(source, some_tokens(100))
        assert gap.abs().max() > 0.05
    back = logits_of(made.path, some_tokens(100))
    assert torch.equal(back, logits_of(source, some_tokens(100)))


def test_frequency_factors(tmp_path: Path) -> None:
    """By the equations of Llama 3.1: long waves are stretched, short ones not, others between."""
    source = write_model(
        tmp_path / "source",
        ("llama", {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": LLAMA3}),
    )
    for folder in (source, uneven(source, tmp_path / "cut")):
        file = export(folder, tmp_path / f"{folder.name}.gguf").path
        (found,) = (t for t in GGUFReader(file).tensors if t.name == "rope_freqs.weight")
        wanted = []
        for i in range(8):
            wave = 2 * math.pi * 10000.0 ** (i / 8)
            part = (32 / wave - 1.0) / (4.0 - 1.0)
            wanted.append(
                1 / ((1 - part) / 8.0 + part) if 0 < part < 1 else 1.0 if part >= 1 else 8.0
            )
        assert len(set(wanted)) > 2
        np.testing.assert_allclose(found.data, wanted, rtol=1e-5)


HF = "write a Hugging Face folder instead"
NO_SCALING = (
    "rotary scaling {} cannot be written to GGUF: allowed are default, linear, llama3 and yarn; "
    f"{HF}"
)
YARN_WITH = (
    f"rotary scaling yarn with {{}} cannot be written to GGUF, which has no place for that: {HF}"
)


@pytest.mark.parametrize(
    ("name", "rope", "cut", "text"),
    [
        ("llama-gqa-tied", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, False,
         NO_SCALING.format("dynamic")),
        ("qwen2", {**BASE, "rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4,
                   "long_factor": [2.0] * 4}, True, NO_SCALING.format("longrope")),
        ("llama-gqa-tied", {**YARN, "attention_factor": 1.5}, False,
         YARN_WITH.format("attention_factor 1.5")),
        ("qwen3-tied", {**YARN, "beta_fast": 8.0, "truncate": False}, True,
         YARN_WITH.format("beta_fast 8.0, truncate False")),
        ("granite", {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, False,
         YARN_WITH.format("mscale 1.0, mscale_all_dim 1.0")),
        *(
            (name, LLAMA3, cut,
             f"llama.cpp's architecture {arch} ignores the rotary scaling llama3, which this model "
             f"has: {HF}")
            for name, cut, arch in (
                ("qwen3-tied", True, "openelm"), ("qwen3-tied", False, "qwen3"),
                ("smollm3", False, "smollm3"),
            )
        ),
        ("llama-gqa-tied", {"rope_type": "default", "rope_theta": 1e4,
                            "partial_rotary_factor": 0.5}, False,
         "llama.cpp's architecture llama rotates whole heads, this model 0.5 of each "
         f"(partial_rotary_factor): {HF}"),
    ],
)  # fmt: skip
def test_positions_that_no_file_can_say(
    name: str, rope: dict[str, Any], cut: bool, text: str, tmp_path: Path
) -> None:
    source = rotated(tmp_path / "source", name, rope)
    if cut:
        source = uneven(source, tmp_path / "cut")
    refused(lambda: export(source, tmp_path / "out.gguf"), text)


# ---- any plan --------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn, anatomy: Anatomy) -> Plan:
    """Some blocks, of each some groups and some neurons, with scales or without."""
    kept = draw(st.sets(st.integers(0, anatomy.layers - 1), min_size=1))
    cuts = []
    for source in sorted(kept):
        groups = draw(st.sets(st.integers(0, anatomy.kv_heads - 1), min_size=1))
        neurons = draw(st.sets(st.integers(0, anatomy.ffn_width - 1), min_size=1))
        scales = None
        if draw(st.booleans()):
            rng = np.random.default_rng(draw(st.integers(0, 99)))
            scales = torch.as_tensor(rng.normal(1, 0.5, len(neurons))).float()
        cuts.append(cut_of(anatomy, source, sorted(groups), sorted(neurons), scales))
    return Plan(anatomy, cuts)


@pytest.mark.parametrize("name", ["llama-3x2", "llama-biases", "llama-5x1"])
def test_any_plan_is_the_same_everywhere(
    name: str, source_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Masked by the plan, cut by it in a folder, in a file read by torch, in llama.cpp."""
    stream = stream_of(source_of(name))
    tokens = some_tokens(24)

    @settings(max_examples=6, deadline=None, database=None)
    @given(plans(stream.anatomy))
    def same(plan: Plan) -> None:
        root = tmp_path_factory.mktemp("plan")
        folder = write_plan(stream, plan, root / "folder")
        masked: list[torch.Tensor] = []
        batch = torch.tensor([tokens])
        hidden = masked_hidden(stream, plan, batch, torch.float32)
        stream.head(hidden, batch, lambda _, found: masked.append(found))
        wanted = logits_of(folder, tokens)
        torch.testing.assert_close(masked[0], wanted, rtol=1e-4, atol=1e-5)

        made = export(folder, root / "out.gguf")
        widths = [plan.widths(cut) for cut in plan.blocks]
        assert made.architecture == ("llama" if len(set(widths)) == 1 else "deci")
        cut, back = stream_of(folder), stream_of(made.path)
        for parameter in cut.stored_parameters():
            assert torch.equal(back.read_tensor(parameter), cut.read_tensor(parameter))
        assert torch.equal(logits_of(made.path, tokens), wanted)
        if llama_cpp.available():
            found = llama_cpp.logits(made.path, tokens)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)

    same()


# ---- types -----------------------------------------------------------------------------------

ROWS_OF_96: Entry = (
    "llama",
    {"num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96,
     "tie_word_embeddings": False},
)  # fmt: skip
ROWS_OF_83: Entry = ("llama", {**ROWS_OF_96[1], "intermediate_size": 83})
ENDS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def rows_of_96(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("types") / "even", ROWS_OF_96, layers=2)


@pytest.fixture(scope="module")
def rows_of_83(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("types") / "odd", ROWS_OF_83, layers=2)


def worst_error(kind: str, values: torch.Tensor) -> torch.Tensor:
    """How far values may be off in each block of 32, or each by itself: half a step."""
    if kind == "f32":
        return torch.zeros(())
    if kind in ("f16", "bf16"):
        return values.abs() * 2.0 ** (-11 if kind == "f16" else -8) + 2.0**-25
    blocks = values.reshape(*values.shape[:-1], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    span = blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)
    step = {
        "q8_0": largest / 127 / 2,
        "q5_1": span / 31 / 2,
        "q4_1": span / 15 / 2,
        # Signed, so that the value opposite to the largest has no code: a whole step.
        "q5_0": largest / 16,
        "q4_0": largest / 8,
    }[kind]
    # Steps and offsets are float16 themselves.
    return (step + largest * 2.0**-9).expand_as(blocks).reshape(values.shape)


@pytest.mark.parametrize("kind", gguf.OWN_TYPES)
def test_types(kind: str, rows_of_96: Path, tmp_path: Path) -> None:
    """Which tensor has which, its bytes, and how far its values may be off."""
    made = export(rows_of_96, tmp_path / "out.gguf", kind)
    assert made.notes == []
    reader = GGUFReader(made.path)
    quantized = kind.startswith("q")
    for tensor in reader.tensors:
        wanted = kind
        if len(tensor.shape) == 1:
            wanted = "f32"
        elif quantized and tensor.name in ("token_embd.weight", "output.weight"):
            wanted = "q8_0"
        assert tensor.tensor_type.name.lower() == wanted, tensor.name
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[wanted.upper()]]
        assert tensor.n_bytes == tensor.n_elements // values * size
    keys = {"general.file_type": {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8,
                                  "q5_1": 9, "bf16": 32}[kind]}  # fmt: skip
    if quantized:
        keys["general.quantization_version"] = 2
    for key in ("general.file_type", "general.quantization_version"):
        field = reader.fields.get(key)
        assert (field.contents() if field else None) == keys.get(key)

    source, back = stream_of(rows_of_96), stream_of(made.path)
    for name in source.stored_parameters():
        values, found = source.read_tensor(name), back.read_tensor(name)
        stored = "f32" if values.ndim == 1 else "q8_0" if quantized and name in ENDS else kind
        assert ((found - values).abs() <= worst_error(stored, values)).all(), name
        assert torch.equal(found, values) == (stored == "f32"), name
    assert back.checkpoint.dtype == {"f32": torch.float32, "bf16": torch.bfloat16}.get(
        kind, torch.float16
    )


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_llama_cpp_reads_all_types(kind: str, rows_of_83: Path, tmp_path: Path) -> None:
    """It rounds what goes into a matrix as well, so this is close only to what torch reads."""
    file = export(rows_of_83, tmp_path / "out.gguf", kind).path
    wanted = logits_of(file, some_tokens(20))
    gap = (llama_cpp.logits(file, some_tokens(20)) - wanted).norm() / wanted.norm()
    assert gap < 0.05


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_rows_that_are_no_whole_blocks(kind: str, rows_of_83: Path, tmp_path: Path) -> None:
    made = export(rows_of_83, tmp_path / "out.gguf", kind)
    assert made.notes == [
        "2 matrices stay f16, since their rows of 83 values are no multiple of 32: prune with "
        f"--round-to 32 to have them in {kind}"
    ]
    types = {t.name: t.tensor_type.name for t in GGUFReader(made.path).tensors}
    halves = [name for name, found in types.items() if found == "F16"]
    assert halves == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert types["blk.0.ffn_up.weight"] == kind.upper()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_floats_take_any_row(kind: str, rows_of_83: Path, tmp_path: Path) -> None:
    assert export(rows_of_83, tmp_path / "out.gguf", kind).notes == []


def test_large_weights(tmp_path: Path) -> None:
    model = tiny.make_model("llama-gqa-tied", layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = -1e5
    model.save_pretrained(tmp_path / "source")
    tiny.make_tokenizer().save_pretrained(tmp_path / "source")
    out = tmp_path / "out.gguf"
    for kind, text in (("f16", "f16"), ("q8_0", "f16"), ("q4_0", "f16")):  # rows of 48
        refused(
            lambda kind=kind: export(tmp_path / "source", out, kind),
            f"tensor blk.0.ffn_down.weight has weights too large for {text}: write --type bf16 or "
            "f32",
        )
    for kind in ("bf16", "f32"):
        opened = open_checkpoint(export(tmp_path / "source", out, kind).path)
        assert opened.read("model.layers.0.mlp.down_proj.weight").min() < -99_000


def test_unknown_type(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    text = (
        "type is {!r}: allowed are f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, and through "
        "llama.cpp's quantiser q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, iq4_nl, iq4_xs, q3_k_l, "
        "q3_k_m, q3_k_s, q2_k"
    )
    source, out = source_of("qwen2"), tmp_path / "out.gguf"
    recipe = make_recipe(remove="20%")
    calls: list[Callable[[str], Any]] = [
        lambda kind: export(source, out, kind),
        lambda kind: export_command(source, out, weights=kind),
        lambda kind: prune(source, out, recipe, weights=kind),
    ]
    for kind in ("q3", "int8", "Q4_2"):
        for call in calls:
            refused(partial(call, kind), text.format(kind))
    assert export(source, out, "Q8_0").path == out
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@needs_llama_cpp
def test_k_quants(tmp_path: Path) -> None:
    """All blocks of 256 where widths allow it; what is read back is close to the source."""
    entry: Entry = (
        "llama",
        {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 2,
         "tie_word_embeddings": False},
    )  # fmt: skip
    source = write_model(tmp_path / "source", entry, layers=2)
    folder = uneven_ffn(source, tmp_path / "cut")
    made = export(folder, tmp_path / "out.gguf", "q4_k_m")
    assert (made.architecture, made.notes) == ("deci", [])
    reader = GGUFReader(made.path)
    types = {t.name: t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
    assert set(types.values()) == {"Q4_K", "Q6_K"}
    assert types["blk.0.attn_q.weight"] == "Q4_K"
    assert reader.fields["general.file_type"].contents() == 15
    assert {path.name for path in tmp_path.iterdir()} == {"source", "cut", "out.gguf"}

    cut, back = stream_of(folder), stream_of(made.path)
    for name in cut.stored_parameters():
        wanted, found = cut.read_tensor(name), back.read_tensor(name)
        assert (found - wanted).norm() / wanted.norm() < 0.1, name
    tokens = some_tokens(20)
    wanted = logits_of(made.path, tokens)
    assert (llama_cpp.logits(made.path, tokens) - wanted).norm() / wanted.norm() < 0.1


def uneven_ffn(source: Path, folder: Path) -> Path:
    stream = stream_of(source)
    groups = range(stream.anatomy.kv_heads)
    cuts = [BlockCut(0), cut_of(stream.anatomy, 1, groups, range(100, 356))]
    return write_plan(stream, Plan(stream.anatomy, cuts), folder)


@needs_llama_cpp
def test_k_quants_of_narrow_rows(rows_of_83: Path, tmp_path: Path) -> None:
    made = export(rows_of_83, tmp_path / "out.gguf", "Q4_K_M")
    assert made.notes == [
        "12 tensors are q5_0 instead of q4_K: rows of 64 do not divide by 256",
        "1 tensor is f16 instead of q4_K: rows of 83 do not divide by 256",
        "1 tensor is q8_0 instead of q6_K: rows of 64 do not divide by 256",
        "1 tensor is f16 instead of q6_K: rows of 83 do not divide by 256",
    ]
    out = tmp_path / "other.gguf"
    refused(
        lambda: export(rows_of_83, out, "iq4_nl"),
        f"llama.cpp refuses {out}: blk.0.ffn_down.weight - ncols 83 not divisible by 32 (required "
        "for type iq4_nl); no tensor type fallback is defined for type iq4_nl; try another --type, "
        "or prune with --round-to 32",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_k_quants_without_llama_cpp(
    source_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    source, out = source_of("qwen2"), tmp_path / "out.gguf"
    text = (
        "the type q4_k_m runs llama.cpp through the package cyllama, which is not installed: "
        "pip install 'secateur[llama-cpp]'"
    )
    refused(lambda: export(source, out, "q4_k_m"), text)
    refused(lambda: export_command(source, out, weights="Q4_K_M"), text)
    recipe = make_recipe(remove="20%")
    refused(lambda: prune(source, out, recipe, weights="q4_k_m"), text)
    assert not list(tmp_path.iterdir())
    assert export_command(source, out, weights="q8_0").verification is None


# ---- refusals --------------------------------------------------------------------------------


def test_what_has_no_architecture(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    opt = (
        "llama.cpp has no architecture for OPT (learned positions, ReLU, LayerNorm): GGUF can be "
        "written of llama, mistral, qwen2, qwen3, smollm3, granite; for this model give --out a "
        "folder name, which transformers opens"
    )
    out = tmp_path / "out.gguf"
    refused(lambda: export_command(model_folder("opt"), out), opt)
    pruned = prune(
        model_folder("opt"), tmp_path / "pruned",
        make_recipe(
            remove="30%", method="comp", options=EVERYWHERE,
            calibration={"samples": 4, "length": 24},
        ),
        verify=False,
    )  # fmt: skip
    refused(lambda: export_command(pruned.out, out), opt)
    assert not out.exists()


def test_layers_that_read_through_an_index(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = make_recipe(
        remove="20%", structure="inputs", options={**EVERYWHERE, "exempt_first": 1},
        calibration={"samples": 4, "length": 24},
    )  # fmt: skip
    folder = prune(model_folder("llama-gqa-tied"), tmp_path / "in", recipe, verify=False).out
    layer = stream_of(folder).model.model.layers[1].self_attn.q_proj
    refused(
        lambda: export_command(folder, tmp_path / "out.gguf"),
        "block 1 cannot be held by llama.cpp: its self_attn.q_proj reads or writes through an "
        f"index ({layer.extra_repr()}); prune the original with --structure coupled, which removes "
        "whole neurons and KV groups",
    )


CANNOT = (
    "llama.cpp cannot hold this model: its blocks have {}, {}; prune the original with --layout "
    "uniform"
)
BOTH = "FFN widths of 13 to 48 and 1 to 2 KV groups"


@pytest.mark.parametrize(
    ("name", "lost", "differences", "reason"),
    [
        *(
            (name, "nothing both neurons groups", BOTH,
             f"but its architecture {name} for {name} has one width for all blocks")
            for name in ("smollm3", "granite")
        ),
        *(
            ("qwen3", lost, differences,
             "and openelm, its only architecture for qwen3 blocks of different widths, has no head "
             "of its own, which this model has")
            for lost, differences in (
                ("nothing both", BOTH), ("nothing groups", "1 to 2 KV groups"),
                ("nothing neurons", "FFN widths of 24 to 48"),
            )
        ),
    ],
)  # fmt: skip
def test_different_widths_without_a_home(
    name: str, lost: str, differences: str, reason: str,
    source_of: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    folder = uneven(source_of(name), tmp_path / "cut", lost)
    text = CANNOT.format(differences, reason)
    refused(lambda: export_command(folder, tmp_path / "out.gguf"), text)
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


NO_PLACE = "llama.cpp's architecture {} has no place for tensor model.layers.{}.bias: " + HF
#: What llama.cpp would refuse to open, or compute without a word: (entry, uneven, refusal).
NO_HOME: dict[str, tuple[Entry, bool, str]] = {
    "smollm3, biases of the FFN": (
        ("smollm3", {"num_key_value_heads": 2, "mlp_bias": True}), False,
        NO_PLACE.format("smollm3", "0.mlp.gate_proj"),
    ),
    "smollm3, biases of the attention": (
        ("smollm3", {"num_key_value_heads": 2, "attention_bias": True}), False,
        NO_PLACE.format("smollm3", "0.self_attn.o_proj"),
    ),
    "qwen3, biases": (
        ("qwen3", {**WIDE_HEADS, "attention_bias": True}), False,
        NO_PLACE.format("qwen3", "0.self_attn.o_proj"),
    ),
    "openelm, biases": (
        ("qwen3", {**WIDE_HEADS, "attention_bias": True, "tie_word_embeddings": True}), True,
        NO_PLACE.format("openelm", "0.self_attn.q_proj"),
    ),
    "gelu": (
        ("llama", {"num_key_value_heads": 2, "hidden_act": "gelu"}), False,
        f"llama.cpp's architecture llama computes silu in its FFN, this model gelu: {HF}",
    ),
    "relu, per layer": (
        ("mistral", {"num_key_value_heads": 2, "hidden_act": "relu"}), True,
        f"llama.cpp's architecture deci computes silu in its FFN, this model relu: {HF}",
    ),
    "positions in other places": (
        ("smollm3", {"num_key_value_heads": 2, "no_rope_layers": [0, 1, 1]}), False,
        "llama.cpp's architecture smollm3 leaves positions out in every fourth block, this model "
        "in blocks 0: if removing whole blocks moved them, prune the original with --layers 0, "
        f"else {HF}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_HOME)
def test_what_llama_cpp_would_not_compute(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by ``export``, and by ``prune`` before it does any work."""
    entry, cut, text = NO_HOME[case]
    source = write_model(tmp_path / "source", entry)
    folder = uneven(source, tmp_path / "cut") if cut else source
    refused(lambda: export_command(folder, tmp_path / "out.gguf"), text)
    layout = "per-layer" if cut else "uniform"
    refused_at_once(monkeypatch, source, tmp_path / "out.gguf", text, layout=layout)
    assert not list(tmp_path.glob("out*"))


def refused_at_once(
    monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, text: str, **fields: Any
) -> None:
    from secateur.pipeline import Run

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_calibrate", None)
        recipe = make_recipe(remove="20%", **{"options": {"layers": 0}, **fields})
        refused(lambda: prune(source, out, recipe), text)


def test_prune_refuses_at_once_what_its_layout_cannot_have(
    source_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    moved = (
        "llama.cpp's architecture smollm3 leaves positions out in every fourth block, which "
        "removing whole blocks would move: use --layers 0, or give --out a folder name"
    )
    for options in ({}, {"layers": 1}):
        refused_at_once(monkeypatch, source_of("smollm3"), out, moved, options=options)
    scaled = rotated(tmp_path / "scaled", "qwen3-tied", LLAMA3)
    for layout, arch in (("per-layer", "openelm"), ("auto", "openelm"), ("uniform", "qwen3")):
        refused_at_once(
            monkeypatch, scaled, out,
            f"llama.cpp's architecture {arch} ignores the rotary scaling llama3, which this model "
            f"has: {HF}",
            layout=layout,
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["scaled"]


def test_silu_goes_by_two_names(tmp_path: Path) -> None:
    entry: Entry = ("llama", {"num_key_value_heads": 2, "hidden_act": "swish"})
    source = write_model(tmp_path / "source", entry, layers=1)
    assert export(source, tmp_path / "out.gguf").architecture == "llama"


def test_places_that_cannot_be_written(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    source, mine = source_of("qwen2"), tmp_path / "mine.gguf"
    mine.write_text("mine")
    refused(
        lambda: export_command(source, tmp_path / "out.bin"),
        f"output {tmp_path}/out.bin must end in .gguf, which other programs know it by",
    )
    refused(
        lambda: export_command(source, tmp_path / "out.gguf", to="onnx"),
        "--to is 'onnx': allowed is gguf, packed, plain",
    )
    exists = f"output {mine} exists: choose another --out, or remove it first"
    refused(lambda: export_command(source, mine), exists)
    refused(lambda: export_command(mine, mine), exists)
    refused(lambda: prune(source, mine, make_recipe(remove="20%")), exists)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.gguf"]
    assert mine.read_text() == "mine"
    deep = tmp_path / "a" / "b" / "out.gguf"
    assert export_command(source, deep, verify=False).path == deep
    assert deep.is_file()


# ---- a tensor at a time ----------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["norm", "ffn_up", "output_norm", "no space"])
def test_a_half_written_file_is_never_seen(
    failing: str, source_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, encode = tmp_path / "out.gguf", gguf._encode
    seen = []

    def fail(piece: torch.Tensor, kind: Any, entry: gguf.Entry) -> bytes:
        seen.append([path.name for path in tmp_path.iterdir()])
        if failing in entry.name:
            raise OutputError("it cannot be encoded")
        if failing == "no space":
            raise OSError(28, "No space left on device")
        return encode(piece, kind, entry)

    monkeypatch.setattr(gguf, "_encode", fail)
    with pytest.raises(OSError if failing == "no space" else OutputError):
        export(source_of("llama-gqa-tied"), out, "f16")
    assert seen
    assert all(names == [".out.gguf.tmp"] for names in seen)
    assert not list(tmp_path.iterdir())


def test_the_quantiser_s_work_is_never_seen(
    source_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"

    def fail(source: Path, target: Path, kind: str) -> list[str]:
        assert kind == "q4_k_m"
        assert out not in (source, target)
        assert GGUFReader(source).tensors[0].tensor_type.name == "F32"
        target.write_text("half of it")
        raise OutputError(f"llama.cpp, at work on {source}, ended with SIGKILL")

    monkeypatch.setattr(llama_cpp, "available", lambda: True)
    monkeypatch.setattr(llama_cpp, "quantize", fail)
    refused(
        lambda: export(source_of("llama-gqa-tied"), out, "q4_k_m"),
        f"llama.cpp, at work on {out}, ended with SIGKILL; try another --type, or prune with "
        "--round-to 32",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize("name", ["llama-mha-untied", "qwen3-tied"])
def test_one_tensor_is_in_memory_at_a_time(
    name: str, kind: str, source_of: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each is read once, and gone before the next; ``openelm`` stacks three to one."""
    stream = stream_of(uneven(source_of(name), tmp_path / "cut"))
    read, names = stream.read_tensor, []
    alive: list[weakref.ref[Any]] = []

    def watched(part: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        assert not [array for array in alive if array() is not None]
        array = read(part, dtype).numpy().copy()
        alive.append(weakref.ref(array))
        names.append(part)
        return torch.from_numpy(array)

    monkeypatch.setattr(stream, "read_tensor", watched)
    file = gguf.export(stream, tmp_path / "whole.gguf", kind=kind, name="x").path
    assert sorted(names) == sorted(stream.stored_parameters())
    monkeypatch.setattr(gguf, "VALUES_AT_ONCE", 70)  # two rows of 32, or one of more
    pieces = gguf.export(stream, tmp_path / "pieces.gguf", kind=kind, name="x").path
    assert pieces.read_bytes() == file.read_bytes()


# ---- damaged files ---------------------------------------------------------------------------

Change = Callable[[Any], Any]


def damaged(source: Path, file: Path, *, config: Change | None = None,
            table: Change | None = None) -> Path:  # fmt: skip
    """A whole file whose entries say something else."""
    values, origin = gguf.config_values, gguf._origin
    with pytest.MonkeyPatch.context() as patch:
        if config is not None:
            patch.setattr(gguf, "config_values", lambda stream: config(values(stream)))
        if table is not None:
            patch.setattr(gguf, "_origin", lambda stream, entry: table(origin(stream, entry)))
        export(source, file)
    return file


def of_query(change: Change) -> Change:
    return lambda entry: change(entry) if entry[0] == "blk.0.attn_q.weight" else entry


#: Changes of the entry [name, [[part, rows]], heads] of a matrix of 32 rows and 4 heads.
TABLES: dict[str, tuple[Change, str]] = {
    "a number": (lambda _: 7, "TypeError('cannot unpack non-iterable int object')"),
    "two parts of three": (lambda e: e[:2], "ValueError('not enough values to unpack (expected 3, "
                           "got 2)')"),
    "no such tensor": (lambda e: ["blk.9.x", *e[1:]], "KeyError('blk.9.x')"),
    "too few rows": (lambda e: [e[0], [[e[1][0][0], 16]], 4],
                     "ValueError('rows of blk.0.attn_q.weight')"),
    "no rows": (lambda e: [e[0], [*e[1], ["model.norm.weight", 0]], 4],
                "ValueError('rows of model.norm.weight')"),
    "rows below none": (lambda e: [e[0], [[e[1][0][0], 64], ["model.norm.weight", -32]], 4],
                        "ValueError('rows of model.norm.weight')"),
    "heads of no whole rows": (lambda e: [*e[:2], 7],
                               "ValueError('rows of model.layers.0.self_attn.q_proj.weight')"),
    "heads of odd size": (lambda e: [*e[:2], 32],
                          "ValueError('rows of model.layers.0.self_attn.q_proj.weight')"),
    "heads below none": (lambda e: [*e[:2], -4],
                         "ValueError('rows of model.layers.0.self_attn.q_proj.weight')"),
    "heads without end": (lambda e: [*e[:2], math.inf],
                          "ValueError('rows of model.layers.0.self_attn.q_proj.weight')"),
    "heads in words": (lambda e: [*e[:2], "four"],
                       "TypeError(\"'<' not supported between instances of 'str' and 'int'\")"),
}  # fmt: skip
DAMAGED = "{} has damaged entries secateur.config or secateur.tensors ({}): export it again"


@pytest.mark.parametrize("case", TABLES)
def test_a_damaged_table(case: str, source_of: Callable[[str], Path], tmp_path: Path) -> None:
    change, reason = TABLES[case]
    source = source_of("llama-mha-untied")
    file = damaged(source, tmp_path / "out.gguf", table=of_query(change))
    refused(lambda: open_checkpoint(file), DAMAGED.format(file, reason), SourceError)


def test_a_table_of_another_model(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    """It opens, but not as this config's model."""
    source, query = source_of("llama-mha-untied"), "model.layers.0.self_attn.q_proj.weight"

    def renamed(entry: list[Any]) -> list[Any]:
        return [entry[0], [["elsewhere.weight", 32]], 4]

    for change in (
        of_query(renamed),
        of_query(lambda e: [*e[:1], [[e[1][0][0], 16], ["x", 16]], 0]),
    ):
        file = damaged(source, tmp_path / "out.gguf", table=change)
        with pytest.raises(SourceError) as caught:
            stream_of(file)
        assert query in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda _: [], id="list"),
        pytest.param(lambda _: {}, id="empty"),
        pytest.param(lambda c: {**c, "model_type": "lluma"}, id="unknown type"),
        pytest.param(lambda c: {**c, "model_type": "secateur_llama"}, id="without sizes"),
        pytest.param(lambda c: {**c, "num_hidden_layers": 5}, id="more blocks"),
        pytest.param(lambda c: {**c, "intermediate_size": 40}, id="other width"),
        pytest.param(lambda c: {**c, "vocab_size": "many"}, id="words"),
        pytest.param(lambda c: {**c, "hidden_size": -3}, id="negative"),
        pytest.param(lambda c: {k: v for k, v in c.items() if k != "vocab_size"}, id="no size"),
    ],
)
def test_a_damaged_config(change: Change, source_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = source_of("llama-mha-untied")
    file = damaged(source, tmp_path / "out.gguf", config=change)
    with pytest.raises(SourceError) as caught:
        stream_of(file)
    text = str(caught.value)
    assert str(file) in text
    assert "\n" not in text


def test_entries_that_are_no_json(written: Callable[[str, str], Written], tmp_path: Path) -> None:
    content = written("llama-3x2", "per-layer").file.read_bytes()
    for begin in (b'{"architectures"', b'[["token_embd'):
        assert content.count(begin) == 1
        file = tmp_path / "out.gguf"
        file.write_bytes(content.replace(begin, b"!" + begin[1:]))
        refused(
            lambda file=file: open_checkpoint(file),
            DAMAGED.format(file, "JSONDecodeError('Expecting value: line 1 column 1 (char 0)')"),
            SourceError,
        )


# ---- what a stock class holds ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "legal"),
    [
        # LLaMA wants a hidden width that the number of heads divides: 48 of 8 x 2, 16 by groups.
        (("llama", {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 8}),
         (1, 2, 3, 4, 6, 8)),
        (("llama", {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}),
         (1, 2, 3, 4)),
        (("llama", {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5}),
         (1, 2, 4, 5)),
        (("mistral", {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 8}),
         (1, 2, 3, 4, 5, 6, 7, 8)),
        (("qwen2", {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5}),
         (1, 2, 3, 4, 5)),
        (("qwen3", WIDE_HEADS), (1, 2, 3)),
        (("opt", {"ffn_dim": 64}), (4,)),
    ],
)  # fmt: skip
def test_numbers_of_groups_that_stock_classes_hold(
    entry: Entry, legal: tuple[int, ...], tmp_path: Path
) -> None:
    stream = stream_of(write_model(tmp_path / "source", entry, layers=1))
    assert hf.stock_groups(stream.checkpoint, stream.anatomy) == legal
