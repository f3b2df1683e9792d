"""Files of others: read, or refused in one line; nothing hangs, escapes or runs."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import jinja2
import mutations
import pytest
import yaml
from commands import secateur
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.checkpoint import open_checkpoint
from secateur.checkpoint.gguf_file import open_reader
from secateur.errors import OutputError, RecipeError, SourceError, one_line
from secateur.exporting import export, plan_of
from secateur.outputs.hf import copy_companions
from secateur.outputs.record import healed_text
from secateur.outputs.tokenizer_parts import open_tokenizer
from secateur.pruning import PruneResult, prune
from secateur.recipe import load_recipe, make_recipe
from secateur.recovery.source import open_pruned
from secateur.skeleton import build_skeleton
from secateur.streaming import Stream

Folder = Callable[[str], Path]
Ready = tuple[dict[str, hostile.Target], hostile.Guard]

#: Any JSON, with what Python's reader takes beside it.
values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30),
        st.integers(min_value=2**60, max_value=2**70), st.sampled_from(mutations.VALUES),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=5,
)  # fmt: skip


@st.composite
def inputs(draw: st.DrawFn, target: hostile.Target) -> bytes:
    """A good file of the target with any value somewhere, or mutated as the fuzzer does."""
    seed = draw(st.sampled_from(target.seeds))
    if target.form not in ("json", "yaml") or draw(st.booleans()):
        chance = random.Random(draw(st.integers(0, 2**32)))
        return mutations.mutated(seed, target.form, chance)
    tree: Any = yaml.safe_load("{remove: 20%, options: {layers: 0}, calibration: {samples: 4}}")
    if target.form == "json":
        tree = json.loads(seed)
    *way, last = draw(st.sampled_from([place for place in mutations.places(tree) if place]))
    owner = tree
    for key in way:
        owner = owner[key]
    owner[last] = draw(values)
    return b" " * (seed[:1] == b" ") + mutations.written(tree)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ready]:
    root = tmp_path_factory.mktemp("hostile").resolve()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hostile.surroundings(root).items():
            patch.setenv(name, value)
        yield hostile.targets(root), hostile.Guard(root)


@pytest.mark.parametrize("name", hostile.NAMES)
def test_anything_is_read_or_refused(name: str, ready: Ready) -> None:
    targets, guard = ready
    target, read = targets[name], []

    @settings(
        max_examples=40, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(inputs(target))
    def every(data: bytes) -> None:
        read.append(hostile.judged(target, data, guard))

    assert hostile.judged(target, target.seeds[0], guard), "the good file itself"
    every()
    assert len(read) >= 40
    assert not all(read)


# ---- recipes -------------------------------------------------------------------------------------


def refused_recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    line, code = one_line(caught.value)
    assert code == 2
    return line.replace(str(path), "FILE")


def test_aliases_that_grow(tmp_path: Path) -> None:
    bomb = "a0: &a0 x\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
    )
    refused = "recipe FILE has more than 10,000 values when its aliases are written out: it is no"
    assert refused_recipe(tmp_path, f"{bomb}remove: *a29") == f"{refused} recipe"
    assert refused_recipe(tmp_path, "remove: 20%\noptions: &a {b: *a}") == f"{refused} recipe"


def test_aliases_that_do_not(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("remove: 20%\nmethod: comp\noptions: &a {layers: 0}\nthen_options: {}\n")
    assert load_recipe(path).options == {"layers": 0}


def test_recipes_that_are_none(tmp_path: Path) -> None:
    assert refused_recipe(tmp_path, "x" * 70_000) == (
        "recipe FILE is larger than 65,536 bytes: it is no recipe"
    )
    for deep in ("[" * 60_000, "? " * 10_000, "{a: " * 60):
        assert refused_recipe(tmp_path, deep) == (
            "recipe FILE nests lists and fields deeper than 50 times: it is no recipe"
        )
    assert refused_recipe(tmp_path, "").startswith("recipe FILE does not consist of fields")
    for text in (
        "remove: !!python/object/apply:os.system [touch x]",
        "remove: !!python/name:os.system",
        'remove: "\\ud800"',
        "? {a: b}\n: c",
        "remove: \x00",
    ):
        assert refused_recipe(tmp_path, text).startswith("recipe FILE cannot be read as YAML: ")
    assert list(tmp_path.iterdir()) == [tmp_path / "recipe.yaml"]


# ---- weights -------------------------------------------------------------------------------------


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


def test_weights_that_are_a_link_to_elsewhere(model_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("llama-gqa-tied"), tmp_path / "model")
    weights, private = folder / "model.safetensors", tmp_path / "private"
    disk = tmp_path / "disk.safetensors"  # weights may lie on another disk
    weights.rename(disk)
    weights.symlink_to(disk)
    assert open_checkpoint(folder).tensors
    disk.rename(private)
    weights.unlink()
    weights.symlink_to(private)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(folder)
    assert str(caught.value) == (
        f"{weights} is a link to {private}, outside of the model's folder and no safetensors "
        "file: put the file itself in its place if it belongs to the model"
    )
    # In the hub's cache the files are links, to a folder of that cache.
    blob = tmp_path / "models--a--b" / "blobs" / "0"
    blob.parent.mkdir(parents=True)
    private.rename(blob)
    snapshot = folder.rename(tmp_path / "models--a--b" / "snapshot")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blob)
    assert open_checkpoint(snapshot).tensors


# ---- tokenizer and template ----------------------------------------------------------------------


def test_a_forged_id_is_not_counted_up_to(model_folder: Folder, tmp_path: Path) -> None:
    """tokenizers writes a vocabulary by counting: up to this id it would take minutes."""
    folder = shutil.copytree(model_folder("llama-gqa-tied"), tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["!"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(OutputError, match="has tokens up to id 2147483648, but the embedding has"):
        open_tokenizer(folder, 300)


def test_no_template_is_run(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(model_folder("llama-gqa-tied"), tmp_path / "model")
    template = "{{ cycler.__init__.__globals__.os.system('touch ran') }}"
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(content | {"chat_template": template}))
    (folder / "chat_template.jinja").write_text(template)
    compiled: list[str] = []
    compile_ = jinja2.Environment.compile

    def noting(self: jinja2.Environment, source: Any, *a: Any, **k: Any) -> Any:
        compiled.append(str(source))
        return compile_(self, source, *a, **k)

    monkeypatch.setattr(jinja2.Environment, "compile", noting)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    recipe = make_recipe(
        remove="10%", method="magnitude-sp", calibration={"samples": 2, "length": 16}
    )
    prune(folder, out, recipe, verify=False)
    export(out, tmp_path / "out.gguf", verify=False)
    assert template.encode() in (tmp_path / "out.gguf").read_bytes()  # it travels, as text
    assert (out / "chat_template.jinja").read_text() == template
    assert any("<html" in source for source in compiled), "our own page is a template too"
    assert not any("cycler" in source for source in compiled)
    assert not (tmp_path / "ran").exists()


# ---- secateur.json -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    recipe = make_recipe(
        remove="10%", method="magnitude-sp", calibration={"samples": 2, "length": 16}
    )
    out = tmp_path_factory.mktemp("made") / "out"
    return prune(model_folder("llama-gqa-tied"), out, recipe, verify=False)


def record_in(folder: Path, **changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "secateur.json").read_text()) | changes
    (folder / "secateur.json").write_text(json.dumps(record))
    return record


def test_a_record_that_does_not_say_how(made: PruneResult, tmp_path: Path) -> None:
    folder = shutil.copytree(made.out, tmp_path / "made")
    says = "secateur.json is damaged where it says how"
    for healed in (None, 5, {}, {"settings": [], "text": {}}, {"steps": "x" * 99}):
        record = record_in(folder, healed=healed)
        assert healed_text(record) == says
    assert says in secateur("inspect", folder).fine()
    record_in(folder, plan={"blocks": []})
    (folder / "secateur.json").write_text(
        re.sub(r'"healed".*?\]?\}, "', '"', (folder / "secateur.json").read_text(), count=1)
    )
    record = json.loads((made.out / "secateur.json").read_text())
    record["asked"]["parameters_removed"] = "<b>"
    (folder / "secateur.json").write_text(json.dumps(record))
    with pytest.raises(SourceError) as caught:
        open_pruned(folder)
    assert str(caught.value) == (
        f"source {folder} has a damaged secateur.json: its asked.parameters_removed is '<b>', and "
        "should be of type int; prune the model again"
    )


def test_a_plan_that_no_source_has(made: PruneResult, model_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(made.out, tmp_path / "made")
    source = Stream(open_checkpoint(model_folder("llama-gqa-tied")))
    plan = json.loads((folder / "secateur.json").read_text())["plan"]
    for blocks in ([0, 99], [1, 0], [0, 0], [-1]):
        forged = [{**plan["blocks"][0], "source": block} for block in blocks]
        record_in(folder, plan={**plan, "blocks": forged})
        with pytest.raises(SourceError, match=r"has a damaged plan in secateur\.json or"):
            plan_of(open_checkpoint(folder), source)
