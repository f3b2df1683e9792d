"""Files of others: read, or refused in one line; nothing hangs, escapes or runs."""

from __future__ import annotations

import importlib.util
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.checkpoint import open_checkpoint
from secateur.checkpoint.gguf_file import open_reader
from secateur.errors import OutputError, SourceError
from secateur.outputs.card import plain
from secateur.outputs.hf import copy_companions
from secateur.skeleton import build_skeleton

Folder = Callable[[str], Path]


def of_bench() -> object:
    path = Path(__file__).parents[1] / "bench" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("target", "inputs"),
    [("recipe", 60), ("safetensors", 200), ("index", 100), ("secateur.json", 40), ("gguf", 30)],
)
def test_mutations_are_read_or_refused(
    target: str, inputs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where an input that is neither would be left
    tried, _ = of_bench().hammer(target, 0, 0, inputs=inputs)  # type: ignore[attr-defined]
    assert tried == inputs


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<QQ", 0, 1) + string("a") + struct.pack("<IIQ", 9, 0, 2**40),
        struct.pack("<QQ", 0, 1) + string("a") + struct.pack("<IIQ", 9, 8, 2**22),
        struct.pack("<QQ", 0, 1) + string("a") + struct.pack("<IQ", 8, 2**60),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**63),
        struct.pack("<QQ", 2**62, 0),
        struct.pack("<QQ", 1, 0) + string("t") + struct.pack("<I", 2**31),
        struct.pack("<QQ", 0, 1) + string("a") + struct.pack("<I", 77),
        b"",
    ],
)
def test_forged_lengths_in_gguf(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "forged.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + body)
    with pytest.raises(SourceError, match="is truncated or damaged"):
        open_reader(path)


def test_a_config_of_a_billion_blocks(model_folder: Folder) -> None:
    checkpoint = open_checkpoint(model_folder("llama-gqa-tied"))
    checkpoint.config.num_hidden_layers = 10**9
    with pytest.raises(SourceError, match="the config asks for 1000000000 blocks, the files hold"):
        build_skeleton(checkpoint)


def test_what_a_link_leads_to_is_not_copied(model_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("llama-gqa-tied"), tmp_path / "model")
    secret = tmp_path / "secret"
    secret.write_text("precious")
    (folder / "LICENSE").symlink_to(secret)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError) as caught:
        copy_companions(tmp_path / "out", open_checkpoint(folder))
    assert str(caught.value) == (
        f"{folder / 'LICENSE'} is a link to {secret}, which would be copied into the output: put a "
        "copy of the file in its place if it belongs to the model, or remove the link"
    )
    assert not (tmp_path / "out" / "LICENSE").exists()


def test_a_name_in_the_card_is_only_shown() -> None:
    assert plain("a_b-1.5") == "a_b-1.5"
    assert plain("<script>x</script>\n# y [z](w) `c`") == (
        "&lt;script&gt;x&lt;/script&gt; # y \\[z\\](w) \\`c\\`"
    )
