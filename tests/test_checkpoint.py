"""Reading models: headers, shards, names, types, GGUF. What is refused is in test_bad_input.py."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from secateur.checkpoint import Checkpoint, open_checkpoint
from secateur.checkpoint.safetensors_folder import DTYPES, read_header
from secateur.errors import SourceError
from secateur.skeleton import fill_skeleton
from secateur.streaming import Stream

ModelFolder = Callable[[str], Path]
LLAMA = "llama-gqa-tied"


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header: JSON values, or the raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def split_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a good file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_gguf(path: Path, model: Any, architecture: str = "llama") -> Path:
    """A tiny Llama as llama.cpp's converter writes it, in f32: rows of q and k in its order."""
    import gguf
    import numpy as np

    config, tokenizer = model.config, tiny.make_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = tensor.float().numpy()
        for kind, count in heads.items():
            if kind in name:  # the two halves of a head's rotation become neighbours
                rows = rows.reshape(count, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        base, _, leaf = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(base)}.{leaf}", np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def folder(tmp_path: Path, model_folder: ModelFolder) -> Path:
    """A copy of a tiny Llama that a test may change."""
    return shutil.copytree(model_folder(LLAMA), tmp_path / "model")


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Change the tensors of a folder with one weight file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})
    return folder


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    """Logits of three tokens, from the model as the checkpoint gives it."""
    from secateur.skeleton import build_skeleton

    model = build_skeleton(checkpoint)
    fill_skeleton(checkpoint, model, torch.float32)
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7]])).logits


# ---- one file's header -----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_header_of_every_type(tmp_path: Path, name: str) -> None:
    tensor = torch.zeros(3, 2, dtype=DTYPES[name])
    save_file({"a": tensor, "b": tensor[:0], "c": tensor[0, 0].clone()}, tmp_path / "x", {"k": "v"})
    found = read_header(tmp_path / "x")
    assert {n: (i.shape, i.dtype) for n, i in found.items()} == {
        "a": ((3, 2), name), "b": ((0, 2), name), "c": ((), name),
    }  # fmt: skip
    assert [found[n].numel for n in "abc"] == [6, 0, 1]
    assert found["a"].nbytes == 6 * tensor.element_size()
    assert found["a"].file == tmp_path / "x"


def test_header_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(safetensors_bytes({"__metadata__": {"format": "pt"}}))
    assert read_header(tmp_path / "x") == {}


def test_a_type_that_is_new_does_not_stop_the_header(tmp_path: Path) -> None:
    entry = {"dtype": "F2_X", "shape": [4], "data_offsets": [0, 1]}
    (tmp_path / "x").write_bytes(safetensors_bytes({"a": entry}, b"1"))
    assert read_header(tmp_path / "x")["a"].dtype == "F2_X"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers") / "x.safetensors"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F8_E4M3"]) | json_values,
        "shape": st.lists(st.integers(-2, 9), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-9, 99), min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=5), entries | json_values, max_size=4) | json_values


def reads_or_refuses(path: Path) -> None:
    try:
        found = read_header(path)
    except SourceError:
        return
    size = path.stat().st_size
    assert all(0 <= info.nbytes <= size for info in found.values())


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    reads_or_refuses(scratch)


@settings(max_examples=300, deadline=None)
@given(header=headers, data=st.binary(max_size=64))
def test_any_header_is_read_or_refused(scratch: Path, header: Any, data: bytes) -> None:
    scratch.write_bytes(safetensors_bytes(header, data))
    reads_or_refuses(scratch)


@settings(max_examples=60, deadline=None)
@given(where=st.integers(0, 10**6), value=st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(
    scratch: Path, model_folder: ModelFolder, where: int, value: int
) -> None:
    content = bytearray((model_folder(LLAMA) / "model.safetensors").read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    content[where % (8 + length)] = value
    scratch.write_bytes(content)
    reads_or_refuses(scratch)


# ---- folders ---------------------------------------------------------------------------------


def test_shards_read_like_one_file(tmp_path: Path, model_folder: ModelFolder) -> None:
    one = open_checkpoint(model_folder(LLAMA))
    tiny.make_model(LLAMA).save_pretrained(tmp_path, max_shard_size="50KB")
    several = open_checkpoint(tmp_path)
    assert len(several.files) > 2
    assert len(one.files) == 1
    assert one.tensors.keys() == several.tensors.keys()
    for name in one.tensors:
        assert torch.equal(one.read(name), several.read(name))
    assert one.fingerprint == several.fingerprint


def test_only_what_the_index_names_is_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file({**tensors, "stray": torch.zeros(1)}, folder / "a.safetensors")
    save_file({"other": torch.zeros(1)}, folder / "b.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).tensors.keys() == tensors.keys()


def test_a_single_file_may_have_any_name(folder: Path) -> None:
    names = open_checkpoint(folder).tensors.keys()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert open_checkpoint(folder).tensors.keys() == names


@pytest.mark.parametrize("name", ["opt", LLAMA])
def test_names_of_the_base_model_are_found(
    tmp_path: Path, model_folder: ModelFolder, name: str
) -> None:
    whole = open_checkpoint(model_folder(name))
    folder = shutil.copytree(model_folder(name), tmp_path / "model")
    resave(folder, lambda tensors: {k.removeprefix("model."): v for k, v in tensors.items()})
    short = open_checkpoint(folder)
    assert not any(stored.startswith("model.") for stored in short.tensors)
    ours, theirs = Stream(short), Stream(whole)
    for block in range(4):
        for key, tensor in theirs.read_block(block).items():
            assert torch.equal(ours.read_block(block)[key], tensor)
    assert torch.equal(logits(short), logits(whole))


@pytest.mark.parametrize("kept", [["model.embed_tokens.weight"], ["lm_head.weight"], None])
def test_tied_head_under_either_name(folder: Path, kept: list[str] | None) -> None:
    def both(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shared = tensors.pop("model.embed_tokens.weight")
        names = kept or ["model.embed_tokens.weight", "lm_head.weight"]
        return {**tensors, **{name: shared.clone() for name in names}}

    wanted = logits(open_checkpoint(folder))
    checkpoint = open_checkpoint(resave(folder, both))
    outside = Stream(checkpoint).read_outside()
    assert outside.keys() == {"model.embed_tokens.weight", "model.norm.weight"}
    assert Stream(checkpoint).anatomy.parameters == 40_608  # the shared matrix counts once
    assert torch.equal(logits(checkpoint), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_folder_reports_its_type(folder: Path, dtype: torch.dtype) -> None:
    resave(folder, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype == dtype
    assert checkpoint.read("model.norm.weight").dtype == dtype
    assert checkpoint.read("model.norm.weight", torch.float32).dtype == torch.float32


def test_the_type_of_most_weights_counts(folder: Path) -> None:
    resave(
        folder,
        lambda tensors: {k: v if "norm" in k else v.bfloat16() for k, v in tensors.items()},
    )
    assert open_checkpoint(folder).dtype == torch.bfloat16


def test_leftover_quantisation_entry_beside_plain_weights_is_harmless(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_must_be_finite(folder: Path, bad: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][[0, 3]] = bad

    checkpoint = open_checkpoint(resave(folder, spoil))
    checkpoint.read("model.embed_tokens.weight")
    with pytest.raises(SourceError, match=r"norm.weight in model\.safetensors holds 2 NaN"):
        checkpoint.read("model.norm.weight")


def test_fingerprint_and_state(folder: Path) -> None:
    import os

    first = open_checkpoint(folder)
    again = open_checkpoint(str(folder))
    assert first.fingerprint == again.fingerprint
    assert first.state() == again.state()
    assert first.nbytes == (folder / "model.safetensors").stat().st_size
    before = first.state()
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert first.state() != before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert open_checkpoint(folder).fingerprint != first.fingerprint


def test_tokenizer_of_a_folder(folder: Path) -> None:
    tokenizer = open_checkpoint(folder).tokenizer
    ids = tokenizer("Grüße, 世界!", add_special_tokens=False)["input_ids"]
    assert ids == tiny.make_tokenizer()("Grüße, 世界!", add_special_tokens=False)["input_ids"]


def test_trained_opt_opens(tiny_opt: Path) -> None:
    anatomy = Stream(open_checkpoint(tiny_opt)).anatomy
    assert anatomy.family.name == "OPT"
    assert 1_000_000 < anatomy.parameters < 2_000_000


# ---- GGUF ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, where config and tokenizer of a GGUF file are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "secateur" / "gguf"


@pytest.mark.parametrize("name", [LLAMA, "llama-mha-untied"])
def test_gguf_reads_like_the_folder(
    tmp_path: Path, cache: Path, model_folder: ModelFolder, name: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny.make_model(name))
    ours, theirs = open_checkpoint(path), open_checkpoint(model_folder(name))
    assert ours.dtype == torch.float32
    assert ours.source == str(path)
    assert ours.config.model_type == "llama"
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    left, right = Stream(ours), Stream(theirs)
    assert left.anatomy.parameters == right.anatomy.parameters
    for block in range(4):
        wanted = right.read_block(block)
        found = left.read_block(block)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    wanted, found = right.read_outside(), left.read_outside()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    torch.testing.assert_close(logits(ours), logits(theirs))


def test_gguf_tokenizer_has_no_ids_behind_the_embedding(tmp_path: Path, cache: Path) -> None:
    # transformers adds <|endoftext|> where a byte-level vocabulary lacks it, as Llama 3's does.
    tokenizer = open_checkpoint(
        write_gguf(tmp_path / "t.gguf", tiny.make_model(LLAMA, layers=1))
    ).tokenizer
    assert max(tokenizer.get_vocab().values()) == tiny.VOCABULARY - 1
    text = "a <|endoftext|> b"
    plain = tiny.make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == plain


def test_gguf_metadata_is_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "t.gguf", tiny.make_model(LLAMA, layers=1))
    first = open_checkpoint(path)
    assert [first.folder] == list(cache.iterdir())  # and no half-made one beside it
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    assert open_checkpoint(path).folder == first.folder


def test_gguf_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = write_gguf(tmp_path / "t.gguf", tiny.make_model(LLAMA, layers=1))
    with pytest.raises(SourceError, match="let XDG_CACHE_HOME name a folder that can be written"):
        open_checkpoint(path)


@pytest.mark.slow
def test_real_gguf(smollm2: Path) -> None:
    import gguf
    from gguf import GGUFReader

    checkpoint = open_checkpoint(smollm2)
    stream = Stream(checkpoint)
    assert stream.anatomy.parameters == 134_515_008
    raw = {entry.name: entry for entry in GGUFReader(smollm2).tensors}

    def values(name: str) -> torch.Tensor:
        return torch.from_numpy(gguf.dequantize(raw[name].data, raw[name].tensor_type).copy())

    block = stream.read_block(7)
    assert torch.equal(block["mlp.down_proj.weight"], values("blk.7.ffn_down.weight"))
    assert torch.equal(block["self_attn.v_proj.weight"], values("blk.7.attn_v.weight"))
    for layer, name, heads in (("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)):
        rows = values(f"blk.7.{name}.weight")
        rows = rows.view(heads, 32, 2, 576).transpose(1, 2).reshape(rows.shape)
        assert torch.equal(block[f"self_attn.{layer}.weight"], rows)
