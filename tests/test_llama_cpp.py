"""What llama.cpp is asked: its numbers against torch's, and what it says of bad files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from secateur.checkpoint import open_checkpoint
from secateur.errors import OutputError
from secateur.evaluation import load_whole
from secateur.outputs import llama_cpp

needs_llama_cpp = pytest.mark.skipif(
    not llama_cpp.available(), reason="cyllama is not installed: pip install 'secateur[llama-cpp]'"
)

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
#: A token of two bytes, so that there is a merge, without which llama.cpp opens no vocabulary.
MERGED = 259
Change = Callable[[str, np.ndarray], np.ndarray]


def write_gguf(
    path: Path, model: Any, *, change: Change | None = None, epsilon: float | None = None
) -> Path:
    """A llama of ``tiny`` in float32 as llama.cpp wants it, apart from what is changed."""
    from gguf import GGUFWriter

    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps if epsilon is None else epsilon)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = tiny.make_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens += ["th"] + [f"<unused{i}>" for i in range(config.vocab_size - MERGED - 1)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (MERGED - 2) + [5] * (config.vocab_size - MERGED - 1))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    for name, tensor in model.state_dict().items():
        short = name.removesuffix(".weight")
        if name.startswith("model.layers."):
            _, _, layer, part = short.split(".", 3)
            stored = f"blk.{layer}.{NAMES[part]}.weight"
        else:
            stored = f"{NAMES[short]}.weight"
        values = tensor.numpy()
        if ".attn_q." in stored or ".attn_k." in stored:
            # llama.cpp rotates neighboring rows of a head, transformers its two halves.
            count = heads if ".attn_q." in stored else kv_heads
            halves = values.reshape(count, 2, -1, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(
            stored, np.ascontiguousarray(change(stored, values) if change else values)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama-mha-untied", layers=2)


@pytest.fixture(scope="module")
def file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


def some_tokens(count: int) -> list[int]:
    return np.random.default_rng(0).integers(3, 256, count).tolist()


def torch_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0]


# ---- numbers -----------------------------------------------------------------------------------


@needs_llama_cpp
def test_logits_are_those_of_torch(model: Any, file: Path) -> None:
    """In more than one piece, the last of them not a full one; read by our own reader as well."""
    tokens = some_tokens(llama_cpp.TOKENS_PER_CALL + 9)
    found = llama_cpp.logits(file, tokens)
    assert found.dtype == torch.float32
    assert found.shape == (len(tokens), tiny.VOCABULARY)
    torch.testing.assert_close(found, torch_logits(model, tokens), atol=3e-5, rtol=0)
    opened = load_whole(open_checkpoint(file))
    torch.testing.assert_close(found, torch_logits(opened, tokens), atol=3e-5, rtol=0)


@needs_llama_cpp
def test_exact_is_what_keeps_float32(model: Any, file: Path) -> None:
    tokens = some_tokens(50)
    found, usual = (llama_cpp.logits(file, tokens, exact=exact) for exact in (True, False))
    wanted = torch_logits(model, tokens)
    assert (usual - wanted).abs().max() > 20 * (found - wanted).abs().max()


@needs_llama_cpp
def test_losses(model: Any, file: Path) -> None:
    """Each window by itself; one of a single token has nothing to predict."""
    windows = [some_tokens(140), some_tokens(40)[20:], [5], []]
    found = llama_cpp.losses(file, windows)
    assert [len(one) for one in found] == [139, 19, 0, 0]
    for window, got in zip(windows[:2], found[:2], strict=True):
        wanted = torch.nn.functional.cross_entropy(
            torch_logits(model, window)[:-1], torch.tensor(window[1:]), reduction="none"
        )
        torch.testing.assert_close(torch.tensor(got), wanted, atol=3e-5, rtol=0)


@needs_llama_cpp
def test_greedy(file: Path, tmp_path: Path) -> None:
    """The same tokens as torch takes, and no stop at the token that ends a text."""
    eager = tiny.make_model("llama-mha-untied", layers=2)
    with torch.no_grad():
        eager.lm_head.weight[1] = eager.lm_head.weight[3:].abs().max(0).values
        eager.model.norm.weight.abs_()
    often = write_gguf(tmp_path / "often.gguf", eager)
    prompts = [some_tokens(140)[-20:], [7], some_tokens(130)]
    ended = False
    for path, model in ((file, tiny.make_model("llama-mha-untied", layers=2)), (often, eager)):
        found = llama_cpp.greedy(path, prompts, 12)
        for prompt, got in zip(prompts, found, strict=True):
            behind = torch_logits(model, [*prompt, *got])[len(prompt) - 1 : -1]
            assert got == behind.argmax(-1).tolist()
            ended |= 1 in got[:-1]
    assert ended
    assert llama_cpp.greedy(file, prompts[:1], 0) == [[]]
    with pytest.raises(ValueError, match="at least one token"):
        llama_cpp.greedy(file, [[3], []], 1)


@needs_llama_cpp
def test_tokenize(file: Path) -> None:
    """Nothing in front, special tokens as such, merges made; a long text as a whole."""
    tokenizer = tiny.make_tokenizer()
    mixed, letter = "A <s> café", "x"
    found = llama_cpp.tokenize(file, [mixed, "", "th", letter * 20_000])
    assert found[:3] == [tokenizer(mixed).input_ids, [], [MERGED]]
    assert found[3] == tokenizer(letter).input_ids * 20_000
    assert 0 in found[0]


@needs_llama_cpp
def test_speed_tells_what_was_run(file: Path, model: Any) -> None:
    found = llama_cpp.speed(file, prompt_tokens=40, new_tokens=5, repeats=2, threads=1)
    assert math.isfinite(found.prompt)
    assert found.prompt > 0
    assert math.isfinite(found.generation)
    assert found.generation > 0
    assert found.nbytes == file.stat().st_size
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.memory > 2**20


def test_tokens_are_the_same_for_all_vocabularies() -> None:
    made = llama_cpp.fixed_tokens(600, 256)
    assert made == llama_cpp.fixed_tokens(600, 49_152)
    assert len(set(made)) == 256
    assert set(llama_cpp.fixed_tokens(100, 40)) <= set(range(40))


# ---- other types -------------------------------------------------------------------------------


@needs_llama_cpp
def test_quantize(file: Path, model: Any, tmp_path: Path) -> None:
    """The file opens, computes nearly the same, and what became another type is summed up."""
    target = tmp_path / "k.gguf"
    target.write_text("something older")
    assert llama_cpp.quantize(file, target, "Q6_K") == [
        "13 tensors are q8_0 instead of q6_K: rows of 32 do not divide by 256",
        "2 tensors are f16 instead of q6_K: rows of 48 do not divide by 256",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["k.gguf"]
    assert target.stat().st_size < file.stat().st_size / 2
    tokens = some_tokens(20)
    gap = (llama_cpp.logits(target, tokens) - torch_logits(model, tokens)).abs()
    assert 1e-4 < gap.mean() < 0.02
    assert llama_cpp.quantize(file, tmp_path / "half.gguf", "f16") == []


@needs_llama_cpp
def test_quantize_refuses(file: Path, tmp_path: Path) -> None:
    """And leaves what stands at the target alone."""
    target = tmp_path / "q.gguf"
    target.write_text("mine")
    with pytest.raises(
        OutputError,
        match=r"tiny\.gguf: blk\.0\.ffn_down\.weight .*48 not divisible by 32.*fallback",
    ):
        llama_cpp.quantize(file, target, "q8_0")
    assert target.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["q.gguf"]
    small = tmp_path / "small.gguf"
    llama_cpp.quantize(file, small, "q4_k_m")
    with pytest.raises(OutputError, match=r"small\.gguf: requantizing from type q5_0 is disabled"):
        llama_cpp.quantize(small, target, "q5_k_m")


def test_quantize_knows_its_types(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"type is 'q9': llama\.cpp writes .*q4_k_m"):
        llama_cpp.quantize(tmp_path / "any.gguf", tmp_path / "out.gguf", "q9")


# ---- what goes wrong ---------------------------------------------------------------------------


def narrow(name: str, values: np.ndarray) -> np.ndarray:
    return values[:40] if name == "blk.1.ffn_gate.weight" else values


@needs_llama_cpp
def test_refused_files(model: Any, file: Path, tmp_path: Path) -> None:
    """One line with the file and llama.cpp's own reason, not cyllama's list of guesses."""
    cases: dict[str, str] = {}
    write_gguf(tmp_path / "shape.gguf", model, change=narrow)
    cases["shape.gguf"] = "tensor 'blk.1.ffn_gate.weight' has wrong shape; expected 32, 48, got"
    data = file.read_bytes()
    (tmp_path / "half.gguf").write_bytes(data[: len(data) // 2])
    cases["half.gguf"] = "data is not within the file bounds"
    (tmp_path / "head.gguf").write_bytes(data[:500])
    cases["head.gguf"] = "failed to read key-value pairs"
    (tmp_path / "name.gguf").write_bytes(data.replace(b"llama", b"lluma"))
    cases["name.gguf"] = "unknown model architecture: 'lluma'"
    (tmp_path / "text.gguf").write_text("no model " * 40)
    cases["text.gguf"] = "does not look like a valid GGUF"
    (tmp_path / "empty.gguf").touch()
    cases["empty.gguf"] = "is empty"
    for name, reason in cases.items():
        with pytest.raises(OutputError) as caught:
            llama_cpp.logits(tmp_path / name, [3])
        text = str(caught.value)
        assert text.startswith(f"llama.cpp refuses {tmp_path / name}: ")
        assert reason in text
        assert "\n" not in text
        assert "Possible causes" not in text
    with pytest.raises(OutputError, match="is no file: give the path of a GGUF file"):
        llama_cpp.tokenize(tmp_path, ["x"])


@needs_llama_cpp
def test_tokens_that_are_not_there(file: Path) -> None:
    with pytest.raises(OutputError, match=r"refuses .*tiny\.gguf: invalid token\[2\] = 300"):
        llama_cpp.losses(file, [[3, 4, 300, 5]])


@needs_llama_cpp
def test_a_process_that_dies(model: Any, file: Path, tmp_path: Path) -> None:
    """By llama.cpp's own hand, by another's, by a mistake of ours."""
    bad = write_gguf(tmp_path / "abort.gguf", model, epsilon=-1.0)
    with pytest.raises(
        OutputError, match=r"at work on .*abort\.gguf, ended with SIGABRT: .*GGML_ASSERT\(eps >= 0"
    ):
        llama_cpp.logits(bad, [3])
    with llama_cpp.open_worker(file) as worker:
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(OutputError, match="ended with SIGKILL: out of memory, or killed"):
            worker.ask("tokenize", file=str(file), texts=["x"])
    with pytest.raises(OutputError, match="ended with code 1: OverflowError"):
        llama_cpp.logits(file, [2**40])


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    assert not llama_cpp.available()
    with pytest.raises(OutputError) as caught:
        llama_cpp.require("the type q4_k_m")
    assert str(caught.value) == (
        "the type q4_k_m runs llama.cpp through the package cyllama, which is not installed: "
        "pip install 'secateur[llama-cpp]'"
    )
    file, out = tmp_path / "a.gguf", tmp_path / "b.gguf"
    out.write_text("mine")
    for call in (
        lambda: llama_cpp.tokenize(file, ["x"]),
        lambda: llama_cpp.logits(file, [1]),
        lambda: llama_cpp.greedy(file, [[1]], 1),
        lambda: llama_cpp.losses(file, [[1, 2]]),
        lambda: llama_cpp.speed(file),
        lambda: llama_cpp.quantize(file, out, "q6_k"),
    ):
        with pytest.raises(OutputError, match=r"^opening .*a\.gguf runs llama\.cpp .*pip install"):
            call()
    assert out.read_text() == "mine"


@needs_llama_cpp
def test_what_libraries_print_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only answers go to stdout, whoever else writes to it, from Python or from C."""
    (tmp_path / "loud.py").write_text(
        "import os\n"
        "from secateur.workers import serve\n"
        "def add(a, b):\n"
        "    print('printed')\n"
        "    os.write(1, b'written')\n"
        "    return a + b\n"
        "serve({'add': add})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with llama_cpp.Worker("loud", "adding") as worker:
        assert worker.ask("add", a=1, b=2) == 3
        assert worker.ask("add", a="é", b="\n") == "é\n"


# ---- the real model ----------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.slow
def test_the_real_model(smollm2: Path) -> None:
    """4-bit weights of its own: it knows a capital, and finds text likelier than its reverse."""
    prompt, answer, text = llama_cpp.tokenize(
        smollm2,
        [
            "The capital of France is",
            " Paris",
            "Water boils at a lower temperature on a mountain, because the air there is thinner.",
        ],
    )
    assert llama_cpp.greedy(smollm2, [prompt], 1) == [answer]
    forward, backward = (np.mean(one) for one in llama_cpp.losses(smollm2, [text, text[::-1]]))
    assert 1 < forward < backward - 2
