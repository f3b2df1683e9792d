"""From text to windows: what is read, what is drawn, and that the same seed draws the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch

from secateur.calibration import (
    HUB_DOCUMENTS,
    SETS,
    Text,
    check_vocabulary,
    consecutive_windows,
    draw_windows,
    encode,
    load_text,
)
from secateur.errors import CalibrationError, SourceError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a byte, so that lengths can be counted by hand."""
    return tiny.make_tokenizer()


def drawn(text: Text, tokenizer: Any, **settings: int) -> list[str]:
    """The windows as text."""
    settings = {"samples": 4, "length": 10, "seed": 0, **settings}
    tokens = draw_windows(text, tokenizer, **settings).tokens
    assert tokens.shape == (settings["samples"], settings["length"])
    return [tokenizer.decode(row) for row in tokens]


def documents(*lengths: int) -> Text:
    """Documents of these lengths, each of a letter of its own."""
    return Text([chr(ord("a") + i) * n for i, n in enumerate(lengths)], "letters")


# ---- drawing windows -------------------------------------------------------------------------


def test_same_seed_same_windows(tokenizer: Any) -> None:
    text = load_text("builtin", use="calibration")
    runs = [draw_windows(text, tokenizer, samples=6, length=32, seed=s) for s in (3, 3, 4)]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert runs[0].sha256 == runs[1].sha256
    assert runs[0].sha256 != runs[2].sha256
    assert runs[0].tokens.dtype == torch.int64
    assert runs[0].origin == "built-in passages"
    assert len(runs[0].sha256) == 64


def test_hash_is_of_the_tokens_alone(tokenizer: Any) -> None:
    text = load_text("builtin", use="calibration")
    windows = draw_windows(text, tokenizer, samples=2, length=8, seed=0)
    elsewhere = Text(text.documents, "another name")
    again = draw_windows(elsewhere, tokenizer, samples=2, length=8, seed=0)
    assert windows.sha256 == again.sha256


def test_windows_are_pieces_of_their_document(tokenizer: Any) -> None:
    text = load_text("builtin", use="calibration")
    for window in drawn(text, tokenizer, samples=8, length=40):
        assert sum(window in document for document in text.documents) == 1


def test_each_document_gives_one_before_any_gives_a_second(tokenizer: Any) -> None:
    windows = drawn(documents(100, 10, 55, 9), tokenizer, samples=3)
    assert sorted(window[0] for window in windows) == ["a", "b", "c"]  # "d" is too short
    windows = drawn(documents(100, 10, 55, 9), tokenizer, samples=5)
    assert sorted(window[0] for window in windows[:3]) == ["a", "b", "c"]
    assert sorted(window[0] for window in windows[3:]) == ["a", "c"]


def test_windows_of_one_document_do_not_overlap(tokenizer: Any) -> None:
    text = Text(["".join(chr(33 + i) for i in range(90))], "all different")
    letters = "".join(drawn(text, tokenizer, samples=8))
    assert len(set(letters)) == 80


def test_short_documents_are_packed(tokenizer: Any) -> None:
    windows = drawn(documents(6, 6, 6, 6, 6, 6), tokenizer, samples=4)
    packed = "".join(windows)
    assert len(packed) == 40
    assert all(len(piece) == 6 for piece in packed.split("\n\n")[:-1])


def test_text_of_exactly_the_right_length_is_enough(tokenizer: Any) -> None:
    assert drawn(documents(40), tokenizer) == ["a" * 10] * 4


def test_too_little_text(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError) as error:
        drawn(documents(20, 15), tokenizer)
    assert str(error.value) == (
        "calibration text (letters) has 37 tokens, enough for 3 windows of 10; asked were 4: "
        "give more text, or lower --samples or --length"
    )


def test_no_special_tokens(tokenizer: Any) -> None:
    assert encode(tokenizer, "ab").tolist() == tokenizer.convert_tokens_to_ids(["a", "b"])


def test_half_a_surrogate_pair_is_no_obstacle(tokenizer: Any) -> None:
    assert torch.equal(encode(tokenizer, "a\ud800b"), encode(tokenizer, "a?b"))


def test_consecutive_windows(tokenizer: Any) -> None:
    text = Text(["abc", "defgh", "ij"], "x")
    windows = consecutive_windows(text, tokenizer, length=4, most=2)
    assert [tokenizer.decode(row) for row in windows.tokens] == ["abc\n", "\ndef"]
    everything = consecutive_windows(text, tokenizer, length=4, most=None)
    assert [tokenizer.decode(row) for row in everything.tokens] == ["abc\n", "\ndef", "gh\n\n"]
    lines = Text(["ab\n", "cd\n"], "x", whole=True)
    running = consecutive_windows(lines, tokenizer, length=99, most=10)
    assert [tokenizer.decode(row) for row in running.tokens] == ["ab\ncd\n"]


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        ("a", 8, "text (x) has 1 tokens: nothing to predict"),
        ("", 8, "text (x) has 0 tokens: nothing to predict"),
        ("abcd", 1, "length is 1: a window needs two tokens to predict one"),
        ("abcd", 0, "length is 0: a window needs two tokens to predict one"),
    ],
)
def test_nothing_to_predict(tokenizer: Any, text: str, length: int, message: str) -> None:
    with pytest.raises(CalibrationError) as error:
        consecutive_windows(Text([text], "x"), tokenizer, length=length, most=None)
    assert str(error.value) == message


def test_vocabulary_must_fit_the_embedding(tokenizer: Any) -> None:
    largest = max(tokenizer.get_vocab().values())
    check_vocabulary(tokenizer, largest + 1)
    with pytest.raises(SourceError, match=f"ids up to {largest}, the embedding has {largest} rows"):
        check_vocabulary(tokenizer, largest)


# ---- built-in passages -----------------------------------------------------------------------


def test_builtin_passages() -> None:
    calibration = load_text("builtin", use="calibration").documents
    evaluation = load_text("builtin", use="evaluation").documents
    assert len(calibration) >= 48
    assert len(evaluation) >= 24
    assert min(len(passage.split()) for passage in calibration + evaluation) >= 120
    assert len({*calibration, *evaluation}) == len(calibration) + len(evaluation)


def test_builtin_passages_share_no_sentence() -> None:
    import re

    def sentences(use: Any) -> set[str]:
        found = load_text("builtin", use=use).documents
        return {s.strip() for d in found for s in re.split(r"(?<=[.!?])\s+", d) if len(s) > 30}

    assert not sentences("calibration") & sentences("evaluation")


# ---- files -----------------------------------------------------------------------------------


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "my text"
    path.write_text("One line.\n\nÄnother — 线.\n", encoding="utf-8")
    text = load_text(str(path), use="calibration")
    assert text == Text(["One line.\n\nÄnother — 线.\n"], "my text", whole=True)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_jsonl_file_with_a_field(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text('{"body": "a", "text": "no"}\n\n{"body": "b\\nc"}\r\n', encoding="utf-8")
    text = load_text(str(path), use="calibration", text_field="body")
    assert text == Text(["a", "b\nc"], path.name)


def test_other_ends_of_line_inside_a_json_string(tmp_path: Path) -> None:
    passage = "one\u2028two\x85three"
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"text": passage}, ensure_ascii=False)] * 2
    path.write_text("\n".join(rows), encoding="utf-8")
    assert load_text(str(path), use="calibration").documents == [passage] * 2


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c4").write_text("mine")
    assert load_text("c4", use="calibration").documents == ["mine"]


# ---- named sets ------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["calibration", "evaluation"])
@pytest.mark.parametrize("name", SETS)
def test_named_sets_on_disk(data_dir: Path, tokenizer: Any, name: str, use: Any) -> None:
    text = load_text(name, use=use, data_dir=data_dir)
    assert text.whole == SETS[name].whole
    assert all(isinstance(document, str) for document in text.documents)
    assert sum(map(len, text.documents)) > 100_000
    start = Text([document[:5000] for document in text.documents[:50]], text.origin)
    assert draw_windows(start, tokenizer, samples=4, length=128, seed=0).tokens.shape == (4, 128)


@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
def test_sides_of_a_named_set_differ(data_dir: Path, name: str) -> None:
    sides = [load_text(name, use=use, data_dir=data_dir) for use in ("calibration", "evaluation")]
    assert sides[0].origin != sides[1].origin
    assert sides[0].documents[0][:1000] not in sides[1].documents[0]


def test_alpaca_rows_are_joined(tmp_path: Path) -> None:
    (tmp_path / "alpaca").mkdir()
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
    ]
    (tmp_path / "alpaca" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = load_text("alpaca", use="calibration", data_dir=tmp_path)
    assert text.documents == ["Add.\n1 2\n3", "Greet.\nHello"]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("c4", "c4/a.jsonl", b'{"text": "\xe9"}', "{path} is not UTF-8 (byte 10)"),
        ("c4", "c4/a.jsonl", b" ", "{path} is empty"),
        ("c4", "c4/a.jsonl", b'{"txt": "x"}', "{path} line 1 has no text field 'text'"),
        ("alpaca", "alpaca/a.jsonl", b"[1]", "{path} line 1 has no text field 'instruction'"),
        ("alpaca", "alpaca/a.jsonl", b"\xff\xfe", "{path} is not UTF-8 (byte 0)"),
        ("ptb", "ptb/ptb.valid.txt", b"", "{path} is empty"),
    ],
)
def test_damaged_named_set(
    tmp_path: Path, name: str, file: str, content: bytes, message: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as error:
        load_text(name, use="calibration", data_dir=tmp_path)
    assert str(error.value).startswith(f"calibration file {message.format(path=path)}")


class FakeHub:
    """Stands for the package datasets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.rows: Any = []
        module = ModuleType("datasets")
        module.load_dataset = self.load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)

    def load_dataset(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((*args, kwargs))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(monkeypatch)


@pytest.mark.parametrize(
    ("name", "use", "rows", "documents", "split"),
    [
        ("c4", "calibration", [{"text": "a"}, {"text": "b"}], ["a", "b"], "train"),
        ("c4", "evaluation", [{"text": "a"}], ["a"], "validation"),
        ("wikitext2", "evaluation", [{"text": "a\n"}, {"text": ""}, {"text": "b\n"}],
         ["a\nb\n"], "test"),
        ("ptb", "calibration", [{"sentence": "a b"}, {"sentence": "c"}], ["a b\nc"], "train"),
        ("alpaca", "calibration", [{"instruction": "i", "input": "", "output": "o"}],
         ["i\no"], "train"),
    ],
)  # fmt: skip
def test_named_set_from_the_hub(
    hub: FakeHub, name: str, use: Any, rows: Any, documents: list[str], split: str
) -> None:
    hub.rows = rows
    text = load_text(name, use=use)
    described = SETS[name]
    assert text == Text(documents, described.repo, described.whole)
    wanted = {"split": split, "streaming": True}
    assert hub.calls == [(described.repo, described.config, wanted)]


def test_only_the_start_of_a_large_set_is_fetched(hub: FakeHub) -> None:
    def endless() -> Any:
        while True:
            yield {"text": "x"}

    hub.rows = endless()
    assert len(load_text("c4", use="calibration").documents) == HUB_DOCUMENTS


@pytest.mark.parametrize(
    ("failure", "reason"),
    [(ConnectionError("no route\nto host"), "no route"), (TimeoutError(), "TimeoutError")],
)
def test_hub_out_of_reach(hub: FakeHub, failure: Exception, reason: str) -> None:
    hub.rows = failure
    with pytest.raises(CalibrationError) as error:
        load_text("ptb", use="calibration")
    assert str(error.value) == (
        f"calibration ptb cannot be fetched from the hub (ptb-text-only/ptb_text_only: {reason}): "
        "name a local copy with --data-dir, or use --calibration builtin"
    )


def test_hub_rows_without_the_field(hub: FakeHub) -> None:
    hub.rows = [{"content": "x"}]
    with pytest.raises(CalibrationError) as error:
        load_text("c4", use="calibration")
    assert str(error.value) == (
        "calibration c4 on the hub (allenai/c4) has no field 'text' any more (it has: content): "
        "name a local copy with --data-dir, or use --calibration builtin"
    )


def test_package_for_the_hub_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError) as error:
        load_text("c4", use="calibration")
    assert str(error.value) == (
        "calibration c4 would be fetched with the package datasets, which is not installed: "
        "pip install secateur[data], or name a local copy with --data-dir"
    )
