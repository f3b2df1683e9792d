"""The tokenizer inside a GGUF file: its keys, and that llama.cpp finds the ids of Hugging Face."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gguf import GGUFReader, GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from secateur.checkpoint import open_checkpoint
from secateur.errors import OutputError
from secateur.outputs.gguf_splits import GPT2, SPLITS, canonical
from secateur.outputs.gguf_tokenizer import add_tokenizer
from secateur.outputs.hf import copy_companions

TEXTS = (
    "", " ", "a", " a", "Hello, world!", "  two spaces  and three   ", "\n", "\n\n\n", " \n \n",
    "\t\tx", "It's what they'LL say, WE'VE heard; I'd don't 'tis 're.",
    "1 12 123 1234 12345 3.14 1,000,000", "x=1;y==2&&z||!w<<>>->::",
    "def f(x):\n    return x ** 2  # half\n\n\nclass A:\n\tpass\r\n",
    "snake_case camelCase PascalCase HTTPServer iPhone12",
    "...!!! ??? --- \"quoted\" (in) [out] {x}/y", "cafés naïve Zoë übergroße señor",
    "你好，世界！ 日本語", "한국어 русский ελλη", "😀 👨‍👩‍👧 ok",
    "<s>in the text</s>", "a <s> b</s> c",
    "<|im_start|>user\nHi<|im_end|>\n", "<think> so </think>", "half½ sq² ٣٤",
    "no-break\u00a0space\u3000wide\u2028line\u0085next", "a\x00b\x07c", "▁ a▁b",
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
)  # fmt: skip

#: Letters, digits, spaces and signs of all kinds; no combining marks, no capitals beyond A-Z.
LETTERS = st.sampled_from(
    [*"aAbBzZ0189 \n\t\r.,'-/_#(éßп你あ한😀½²٣", *"\u00a0\u3000\u200b", "'s", "'LL", "  ", "the"]
)
DRAWN = st.lists(LETTERS, max_size=16).map("".join)
#: Those too; and any text of signs that Unicode has had for long enough to be in every table.
BEYOND = st.lists(LETTERS | st.sampled_from("ÉЖ\u0301\u093f\u0928"), max_size=16).map("".join)
ANY = BEYOND | st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=("Cs", "Cn", "Co")))

TRAINING = [
    *TEXTS,
    *("the quick brown fox jumps over the lazy dog and the other dogs; 2024 2025 100 1000",) * 9,
    *("Their weather, whether rather: THE Weather. naïve cafés привет 你好世界",) * 9,
    *("    return self.value\n\n    def other(self, value):\n        self.value = value\n",) * 9,
]
SPECIAL = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")

#: Reads questions as lines of JSON. It is a process of its own, since a bad file may end it.
LLAMA_CPP = """
import json, sys
from cyllama.llama import llama_cpp as c
c.disable_logging()
c.llama_backend_init()
opened = {}
for line in sys.stdin:
    path, texts, special, parse = json.loads(line)
    if path not in opened:
        settings = c.LlamaModelParams()
        settings.n_gpu_layers = 0
        opened[path] = c.LlamaModel(path, settings)
    vocabulary = opened[path].get_vocab()
    ids = [vocabulary.tokenize(text, special, parse) for text in texts]
    print(json.dumps(ids), flush=True)
"""
Ids = list[list[int]]
Ask = Callable[..., Ids]


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[Ask]:
    """llama.cpp's own tokenizer: (path, texts, add_special=True, parse_special=True) -> ids."""
    if importlib.util.find_spec("cyllama") is None:
        pytest.skip("llama.cpp's tokenizer needs the package cyllama")
    process = subprocess.Popen(
        [sys.executable, "-c", LLAMA_CPP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(path: Path, texts: list[str], special: bool = True, parse: bool = True) -> Ids:
        stdin.write(json.dumps([str(path), texts, special, parse]) + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, f"llama.cpp could not read {path}"
        ids: Ids = json.loads(answer)
        return ids

    yield ask
    stdin.close()
    process.wait(timeout=30)


def write(path: Path, folder: Path, rows: int) -> list[str]:
    """The tokenizer in a whole file; llama.cpp opens none without a model. Returns the notes."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    notes = add_tokenizer(writer, folder, rows)
    square = [f"blk.0.attn_{part}" for part in ("q", "k", "v", "output")]
    square += [f"blk.0.ffn_{part}" for part in ("up", "gate", "down")]
    shapes = {"token_embd": (rows, 8), **dict.fromkeys(square, (8, 8))}
    shapes |= dict.fromkeys(["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"], (8,))
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def keys(path: Path) -> dict[str, Any]:
    """The tokenizer's keys in a file, without their common prefix."""
    fields = GGUFReader(path).fields
    found = {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}
    return {k.removeprefix("tokenizer.").removeprefix("ggml."): v for k, v in found.items()}


def save(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    named: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**named, **settings})
    made.save_pretrained(folder)
    return folder


def split(regex: str) -> Any:
    return pre.Split(Regex(regex), "isolated")


def steps_of(regexes: tuple[str, ...]) -> list[Any]:
    """The regular expressions as the pre-tokenizers that model authors write."""
    own = regexes[-1] == GPT2
    steps = [
        pre.Digits(individual_digits=True) if regex == r"\p{N}" else split(regex)
        for regex in (regexes[:-1] if own else regexes)
    ]
    return [*steps, pre.ByteLevel(add_prefix_space=False, use_regex=own)]


def byte_level(*steps: Any, whole: bool = False) -> Tokenizer:
    """A byte-level BPE trained on :data:`TRAINING`, which is cut by ``steps`` first."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer = pre.Sequence([*steps]) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=700,
        special_tokens=[*SPECIAL],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def ids_of(tokenizer: Any, texts: list[str]) -> Ids:
    ids: Ids = tokenizer(texts)["input_ids"]
    return ids


def check_drawn(ask: Ask, path: Path, tokenizer: Any, letters: Any = ANY) -> None:
    @settings(max_examples=80, deadline=None, database=None)
    @given(letters)
    def same(text: str) -> None:
        assert ask(path, [text]) == ids_of(tokenizer, [text])

    same()


@pytest.mark.parametrize(("regexes", "name"), SPLITS.items(), ids=SPLITS.values())
def test_byte_level_cuts_as_hugging_face(
    tmp_path: Path, llama_cpp: Ask, regexes: tuple[str, ...], name: str
) -> None:
    whole = name == "tekken"
    folder = save(tmp_path / "hf", byte_level(*steps_of(regexes), whole=whole))
    path = tmp_path / "t.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    notes = write(path, folder, len(tokenizer) + 3)
    assert (keys(path)["model"], keys(path)["pre"]) == ("gpt2", name)
    assert llama_cpp(path, [*TEXTS]) == ids_of(tokenizer, [*TEXTS])
    check_drawn(llama_cpp, path, tokenizer, DRAWN if name in ("tekken", "gpt-4o") else ANY)
    if name in ("tekken", "gpt-4o"):
        assert notes == [
            f"llama.cpp's {name} splits words with combining marks, or with capitals beyond A-Z "
            "inside, otherwise than the tokenizer"
        ]
    else:
        assert notes == []


def with_lost_word(name: str, whole: bool) -> Tokenizer:
    """A tokenizer with the token ``xylophone``, which no merges make."""
    made = byte_level(*steps_of(next(k for k, v in SPLITS.items() if v == name)))
    values = json.loads(made.to_str())
    values["added_tokens"].pop()
    values["model"]["ignore_merges"] = whole
    values["model"]["vocab"]["xylophone"] = len(values["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(values))


@pytest.mark.parametrize(("whole", "name"), [(False, "smaug-bpe"), (True, "llama-bpe")])
def test_words_that_are_tokens(tmp_path: Path, llama_cpp: Ask, whole: bool, name: str) -> None:
    folder = save(tmp_path / "hf", with_lost_word("smaug-bpe", whole))
    path = tmp_path / "t.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert write(path, folder, len(tokenizer)) == []
    assert keys(path)["pre"] == name
    texts = ["xylophone", " xylophone", "a xylophone", *TEXTS]
    assert llama_cpp(path, texts) == ids_of(tokenizer, texts)
    assert (len(llama_cpp(path, ["xylophone"])[0]) == 1) is whole


@pytest.mark.parametrize(
    ("name", "whole", "note"),
    [
        ("qwen2", True, "the tokenizer takes words whole that are tokens which no merges make "
                        "(1 of them), llama.cpp never does"),
        ("tekken", False, "llama.cpp takes words whole that are tokens which no merges make "
                          "(1 of them), the tokenizer never does"),
    ],
)  # fmt: skip
def test_note_on_whole_words(tmp_path: Path, name: str, whole: bool, note: str) -> None:
    folder = save(tmp_path / "hf", with_lost_word(name, whole))
    assert note in write(tmp_path / "t.gguf", folder, 800)


def test_tiny_byte_level_without_merges(tmp_path: Path, llama_cpp: Ask) -> None:
    folder, path = tmp_path / "hf", tmp_path / "t.gguf"
    tiny.make_tokenizer().save_pretrained(folder)
    assert write(path, folder, tiny.VOCABULARY) == []
    assert llama_cpp(path, [*TEXTS]) == ids_of(AutoTokenizer.from_pretrained(folder), [*TEXTS])
    found = keys(path)
    assert found["pre"] == "gpt-2"
    assert (found["bos_token_id"], found["eos_token_id"], found["padding_token_id"]) == (0, 1, 2)
    assert (found["add_bos_token"], found["add_eos_token"]) == (False, False)
    assert found["token_type"][:4] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL]
    assert found["tokens"][259:] == [f"[PAD{i}]" for i in range(259, tiny.VOCABULARY)]
    assert set(found["token_type"][259:]) == {TokenType.UNUSED}


def test_trained_opt(tmp_path: Path, tiny_opt: Path, llama_cpp: Ask) -> None:
    path = tmp_path / "t.gguf"
    assert write(path, tiny_opt, 2048) == []
    tokenizer = AutoTokenizer.from_pretrained(tiny_opt)
    assert llama_cpp(path, [*TEXTS]) == ids_of(tokenizer, [*TEXTS])
    check_drawn(llama_cpp, path, tokenizer)
    assert keys(path)["merges"][:3] == ["Ġ t", "h e", "Ġ a"]


def test_sentencepiece(tmp_path: Path, stories: Path, llama_cpp: Ask) -> None:
    path = tmp_path / "t.gguf"
    assert write(path, stories, 512) == []
    tokenizer = AutoTokenizer.from_pretrained(stories)
    assert llama_cpp(path, [*TEXTS]) == ids_of(tokenizer, [*TEXTS])
    check_drawn(llama_cpp, path, tokenizer)
    found = keys(path)
    assert (found["model"], found["pre"]) == ("llama", "default")
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)
    assert found["add_space_prefix"] is True
    assert found["token_type"][:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert found["token_type"][3:259] == [TokenType.BYTE] * 256
    assert set(found["token_type"][259:]) == {TokenType.NORMAL}
    assert "merges" not in found


@pytest.fixture
def pieces(tmp_path: Path, stories: Path) -> Callable[..., Path]:
    """A folder with the SentencePiece-like tokenizer, parts of its tokenizer.json replaced."""

    def make(**parts: Any) -> Path:
        folder = tmp_path / "pieces"
        folder.mkdir()
        values = json.loads((stories / "tokenizer.json").read_text(encoding="utf-8"))
        values["model"] |= parts.pop("model", {})
        (folder / "tokenizer.json").write_text(json.dumps(values | parts), encoding="utf-8")
        settings = (stories / "tokenizer_config.json").read_text(encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
        return folder

    return make


def metaspace(scheme: str, split: bool = False) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
GEMMA = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
         "invert": False}  # fmt: skip


def test_scores_follow_the_merges_and_not_the_ids(
    tmp_path: Path, stories: Path, pieces: Callable[..., Path], llama_cpp: Ask
) -> None:
    model = json.loads((stories / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    shuffled = [t for t in model["vocab"] if model["vocab"][t] >= 259]
    random.Random(0).shuffle(shuffled)
    order = [t for t in model["vocab"] if model["vocab"][t] < 259] + shuffled
    folder = pieces(model={"vocab": {token: i for i, token in enumerate(order)}})
    path = tmp_path / "t.gguf"
    assert write(path, folder, 512) == []
    assert llama_cpp(path, [*TEXTS]) == ids_of(AutoTokenizer.from_pretrained(folder), [*TEXTS])
    found = keys(path)
    ranks = {left + right: i for i, (left, right) in reversed(list(enumerate(model["merges"])))}
    scores = dict(zip(found["tokens"], found["scores"], strict=True))
    assert all(scores[token] == -rank for token, rank in ranks.items())
    assert {scores[t] for t in order if t not in ranks} == {-len(model["merges"])}


@pytest.mark.parametrize(
    ("normalizer", "splitter", "space"),
    [
        (None, metaspace("never"), False),
        (None, metaspace("never", split=True), False),
        (REPLACE, None, False),
        (REPLACE, GEMMA, False),
        ({"type": "Sequence", "normalizers": [REPLACE, {"type": "Prepend", "prepend": "▁"}]},
         metaspace("always"), True),
    ],
)  # fmt: skip
def test_sentencepiece_in_other_words(
    tmp_path: Path, pieces: Callable[..., Path], llama_cpp: Ask, normalizer: Any, splitter: Any,
    space: bool,
) -> None:  # fmt: skip
    folder, path = pieces(normalizer=normalizer, pre_tokenizer=splitter), tmp_path / "t.gguf"
    assert write(path, folder, 512) == []
    assert keys(path)["add_space_prefix"] is space
    assert llama_cpp(path, [*TEXTS]) == ids_of(AutoTokenizer.from_pretrained(folder), [*TEXTS])


@pytest.mark.parametrize(("scheme", "words"), [("always", ""), ("first", ", and after each special "
                                                                "token")])  # fmt: skip
def test_note_on_metaspace(
    tmp_path: Path, pieces: Callable[..., Path], llama_cpp: Ask, scheme: str, words: str
) -> None:
    folder, path = pieces(normalizer=None, pre_tokenizer=metaspace(scheme)), tmp_path / "t.gguf"
    assert write(path, folder, 512) == [
        f"llama.cpp puts a space also before text that begins with one{words}; the tokenizer does "
        "not"
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [t for t in TEXTS if t[:1] not in (" ", "▁") and "s>" not in t]
    assert llama_cpp(path, texts) == ids_of(tokenizer, texts)
    assert llama_cpp(path, [" a"]) != ids_of(tokenizer, [" a"])
    differs = llama_cpp(path, ["a<s>b"]) != ids_of(tokenizer, ["a<s>b"])
    assert differs == (scheme == "first")


@pytest.mark.parametrize(("moved", "missing", "returns"), [(True, 0, 1), (False, 1, 0)])
def test_note_on_pairs_that_only_llama_cpp_joins(
    tmp_path: Path, stories: Path, pieces: Callable[..., Path], moved: bool, missing: int,
    returns: int,
) -> None:  # fmt: skip
    merges = json.loads((stories / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert merges[6:8] == [["▁t", "he"], ["▁th", "e"]]
    folder = pieces(model={"merges": [*merges[:7], *merges[8:], *merges[7 : 7 + moved]]})
    assert write(tmp_path / "t.gguf", folder, 512) == [
        f"llama.cpp joins tokens by score, not by a list of merges: {missing} pairs that the "
        f"tokenizer does not join, and {returns} out of its order; rare texts differ"
    ]


def test_added_tokens(tmp_path: Path, pieces: Callable[..., Path], llama_cpp: Ask) -> None:
    def added(i: int, content: str, **flags: bool) -> dict[str, Any]:
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        return {"id": i, "content": content, **plain, **flags}

    tokens = [added(i, t, special=True) for i, t in enumerate(["<unk>", "<s>", "</s>"])]
    tokens += [added(512, "<tool>"), added(513, "▁▁", normalized=True)]
    folder, path = pieces(normalizer=REPLACE, added_tokens=tokens), tmp_path / "t.gguf"
    assert write(path, folder, 515) == []
    found = keys(path)
    assert found["tokens"][512:] == ["<tool>", "  ", "[PAD514]"]
    kinds = [TokenType.USER_DEFINED, TokenType.USER_DEFINED, TokenType.UNUSED]
    assert found["token_type"][512:] == kinds
    texts = ["a <tool> b", "<tool>a", "   a  b", "a   ", *TEXTS[:20]]
    assert llama_cpp(path, texts) == ids_of(AutoTokenizer.from_pretrained(folder), texts)


def test_special_tokens_as_plain_text(tmp_path: Path, llama_cpp: Ask) -> None:
    folder = save(tmp_path / "hf", byte_level(pre.ByteLevel(add_prefix_space=False)))
    write(tmp_path / "t.gguf", folder, 701)
    plain = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert llama_cpp(tmp_path / "t.gguf", [*TEXTS], parse=False) == ids_of(plain, [*TEXTS])


def around(single: str, *tokens: str) -> Callable[[Tokenizer], Any]:
    return lambda made: TemplateProcessing(
        single=single, special_tokens=[(token, made.token_to_id(token)) for token in tokens]
    )


@pytest.mark.parametrize(
    ("processor", "bos", "begins", "closes", "notes"),
    [
        (around("<s> $A", "<s>"), 0, True, False, []),
        (around("<s> $A </s>", "<s>", "</s>"), 0, True, True, []),
        (around("$A </s>", "</s>"), 0, False, True, []),
        (around("<pad> $A", "<pad>"), 2, True, False, []),
        (around("<s> <pad> $A", "<s>", "<pad>"), 0, False, False,
         ["the tokenizer puts <s><pad> before a text, llama.cpp nothing: it has place for one "
          "token"]),
        (around("$A <pad>", "<pad>"), 0, False, False,
         ["the tokenizer puts <pad> behind a text, llama.cpp nothing: it has place for the end "
          "token"]),
    ],
)  # fmt: skip
def test_what_is_put_around_a_text(
    tmp_path: Path, llama_cpp: Ask, processor: Callable[[Tokenizer], Any], bos: int, begins: bool,
    closes: bool, notes: list[str],
) -> None:  # fmt: skip
    made = byte_level(pre.ByteLevel(add_prefix_space=False))
    made.post_processor = processor(made)
    folder, path = save(tmp_path / "hf", made), tmp_path / "t.gguf"
    assert write(path, folder, 701) == notes
    found = keys(path)
    assert (found["bos_token_id"], found["add_bos_token"]) == (bos, begins)
    assert found["add_eos_token"] is closes
    if not notes:
        assert llama_cpp(path, [*TEXTS]) == ids_of(AutoTokenizer.from_pretrained(folder), [*TEXTS])


def test_ids_from_the_configs(tmp_path: Path) -> None:
    made = byte_level(pre.ByteLevel(add_prefix_space=False))
    folder = save(tmp_path / "hf", made, bos_token=None, eos_token=None, pad_token=None)
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 3, "pad_token_id": 9999}))
    ends = {"eos_token_id": [4, 1, 2, 0]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    assert write(tmp_path / "t.gguf", folder, 701) == [
        "generation ends also at <pad><s>, for which a GGUF file has no key"
    ]
    found = keys(tmp_path / "t.gguf")
    assert (found["bos_token_id"], found["eos_token_id"], found["eot_token_id"]) == (3, 4, 1)
    assert "padding_token_id" not in found


def test_without_any_end(tmp_path: Path) -> None:
    made = byte_level(pre.ByteLevel(add_prefix_space=False))
    folder = save(tmp_path / "hf", made, bos_token=None, eos_token=None)
    assert write(tmp_path / "t.gguf", folder, 701) == [
        "the tokenizer has no end token; llama.cpp takes one of its own choice"
    ]


def test_the_end_stands_in_for_a_missing_beginning(tmp_path: Path) -> None:
    made = byte_level(pre.ByteLevel(add_prefix_space=False))
    folder = save(tmp_path / "hf", made, bos_token=None)
    assert write(tmp_path / "t.gguf", folder, 701) == []
    found = keys(tmp_path / "t.gguf")
    assert (found["bos_token_id"], found["add_bos_token"]) == (1, False)


@pytest.mark.parametrize(
    "template", ["{{ messages }}", {"default": "{{ a }}", "tool_use": "{{ b }}"}]
)
def test_chat_template(tmp_path: Path, template: Any) -> None:
    folder = tmp_path / "hf"
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    write(tmp_path / "t.gguf", folder, tiny.VOCABULARY)
    found = keys(tmp_path / "t.gguf")
    if isinstance(template, str):
        assert found["chat_template"] == template
    else:
        assert found["chat_template"] == "{{ a }}"
        assert found["chat_template.tool_use"] == "{{ b }}"


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda made: setattr(made, "normalizer", normalizers.NFC()),
         "the tokenizer composes accents first (NFC), llama.cpp takes text as it is"),
        (lambda made: setattr(made, "pre_tokenizer", pre.ByteLevel(add_prefix_space=True)),
         "the tokenizer puts a space before a text, llama.cpp does not"),
        (lambda made: made.add_tokens([AddedToken(f"<{i}>", lstrip=True) for i in range(5)]),
         "the tokenizer takes <0>, <1>, <2> and 2 more together with the spaces beside, or only as "
         "whole words; llama.cpp does neither"),
    ],
)  # fmt: skip
def test_notes_on_bytes(tmp_path: Path, change: Callable[[Tokenizer], Any], note: str) -> None:
    made = byte_level(pre.ByteLevel(add_prefix_space=False))
    change(made)
    folder = save(tmp_path / "hf", made)
    assert write(tmp_path / "t.gguf", folder, 710) == [note]


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]++"
         "[\\r\\n]*|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+", "smaug-bpe"),
        ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\n\r\\p{N}\\p{L}]?\\p{L}+|"
         "\\p{N}{1}| ?[^\\p{L}\\s\\p{N}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+", "qwen2"),
        (GPT2, "gpt-2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("behavior", ["isolated", "removed"])
def test_other_spellings(
    tmp_path: Path, llama_cpp: Ask, spelling: str, name: str, behavior: str
) -> None:
    cut = pre.Split(Regex(spelling), behavior, invert=behavior == "removed")
    made = byte_level(cut, pre.ByteLevel(add_prefix_space=False, use_regex=False))
    folder, path = save(tmp_path / "hf", made), tmp_path / "t.gguf"
    assert write(path, folder, 701) == []
    assert keys(path)["pre"] == name
    assert llama_cpp(path, [*TEXTS]) == ids_of(AutoTokenizer.from_pretrained(folder), [*TEXTS])


def test_splits_stay_apart_in_their_one_spelling() -> None:
    assert len({tuple(map(canonical, regexes)) for regexes in SPLITS}) == len(SPLITS)
    assert canonical("a[c-db]\\p{L}") == "a[bc-d]\\p{L}"


KINDS = (
    "a GGUF file can be had with byte-level BPE, or with SentencePiece BPE that has a token for "
    "every byte; give --out a folder name instead"
)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "WordPiece"),
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), "Unigram"),
        (models.WordLevel({"a": 0}, unk_token="a"), "WordLevel"),
        (models.BPE({"a": 0}, []), "BPE without bytes"),
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, model: Any, kind: str) -> None:
    folder = save(tmp_path / "hf", Tokenizer(model))
    with pytest.raises(OutputError) as error:
        write(tmp_path / "t.gguf", folder, 100)
    assert str(error.value) == f"the tokenizer in {folder} is of the kind {kind}: {KINDS}"


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([split(r"\d+|\D+")], r"\d+|\D+"),
        ([split("ab"), pre.Digits(individual_digits=False)], r"ab then \p{N}+"),
        ([pre.Punctuation()], "<Punctuation>"),
        ([split("x" * 70)], f"{'x' * 60}..."),
        ([pre.Split(Regex("a"), "removed")], "<Split>"),
        ([], "nothing"),
    ],
)
def test_unknown_splits_are_refused(tmp_path: Path, steps: list[Any], found: str) -> None:
    made = byte_level(*steps, pre.ByteLevel(add_prefix_space=False, use_regex=False))
    folder = save(tmp_path / "hf", made)
    with pytest.raises(OutputError) as error:
        write(tmp_path / "t.gguf", folder, 701)
    assert str(error.value) == (
        f"the tokenizer in {folder} splits text by {found}, for which llama.cpp has no name that "
        "is known here: known are gpt-2, smollm, smaug-bpe, qwen2, qwen35, seed-coder, tekken, "
        "gpt-4o, llama-bpe; give --out a folder name instead"
    )


@pytest.mark.parametrize("byte", [True, False])
def test_other_normalizers_are_refused(
    tmp_path: Path, pieces: Callable[..., Path], byte: bool
) -> None:
    if byte:
        made = byte_level(pre.ByteLevel(add_prefix_space=False))
        made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        folder = save(tmp_path / "hf", made)
    else:
        folder = pieces(normalizer={"type": "Lowercase"})
    with pytest.raises(OutputError) as error:
        write(tmp_path / "t.gguf", folder, 701)
    assert str(error.value) == (
        f"the tokenizer in {folder} changes text by the normalizer Lowercase, which llama.cpp does "
        "not have: allowed are none and NFC; give --out a folder name instead"
    )


def test_other_splits_of_sentencepiece_are_refused(
    tmp_path: Path, pieces: Callable[..., Path]
) -> None:
    folder = pieces(pre_tokenizer={"type": "Digits", "individual_digits": True})
    with pytest.raises(OutputError) as error:
        write(tmp_path / "t.gguf", folder, 512)
    assert str(error.value) == (
        f"the tokenizer in {folder} splits text by Digits, which llama.cpp does not do with "
        "SentencePiece: allowed are none and Metaspace; give --out a folder name instead"
    )


def test_spaces_must_be_written(tmp_path: Path, pieces: Callable[..., Path]) -> None:
    folder = pieces(normalizer=None)
    with pytest.raises(OutputError) as error:
        write(tmp_path / "t.gguf", folder, 512)
    kind = "BPE that does not write spaces as ▁"
    assert str(error.value) == f"the tokenizer in {folder} is of the kind {kind}: {KINDS}"


def test_marks_at_the_edges_of_words_are_refused(tmp_path: Path) -> None:
    made = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre.ByteLevel()
    folder = save(tmp_path / "hf", made)
    with pytest.raises(OutputError) as error:
        write(tmp_path / "t.gguf", folder, 100)
    kind = "BPE with marks at the edges of words"
    assert str(error.value) == f"the tokenizer in {folder} is of the kind {kind}: {KINDS}"


def test_more_tokens_than_rows(tmp_path: Path, tiny_opt: Path) -> None:
    with pytest.raises(OutputError) as error:
        write(tmp_path / "t.gguf", tiny_opt, 2000)
    assert str(error.value) == (
        f"the tokenizer in {tiny_opt} has tokens up to id 2047, but the embedding has 2000 rows: "
        "take the 48 surplus tokens out of the tokenizer, or give the model rows for them with "
        "resize_token_embeddings"
    )


def test_tokens_that_transformers_adds_have_no_row(tmp_path: Path, llama_cpp: Ask) -> None:
    # A token named in the settings that the vocabulary lacks gets the next id when it is opened.
    folder, path = tmp_path / "hf", tmp_path / "t.gguf"
    tiny.make_tokenizer().save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["unk_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert AutoTokenizer.from_pretrained(folder).unk_token_id == 259
    assert write(path, folder, 259) == []
    assert len(keys(path)["tokens"]) == 259
    assert "unknown_token_id" not in keys(path)
    assert len(llama_cpp(path, ["<|endoftext|>"])[0]) == len("<|endoftext|>")


def test_a_row_never_gets_the_name_of_a_token(tmp_path: Path, llama_cpp: Ask) -> None:
    made = byte_level(pre.ByteLevel(add_prefix_space=False))
    size = made.get_vocab_size()
    made.add_tokens([AddedToken(f"[PAD{size + 1}]", normalized=False)])
    folder, path = save(tmp_path / "hf", made), tmp_path / "t.gguf"
    write(path, folder, size + 2)
    assert keys(path)["tokens"][-2:] == [f"[PAD{size + 1}]", f"[[PAD{size + 1}]]"]
    assert llama_cpp(path, ["a"])


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as error:
        write(tmp_path / "t.gguf", tmp_path, 10)
    text = str(error.value)
    assert text.startswith(f"{tmp_path} has no tokenizer that opens without Python code of its own")
    assert text.endswith("), and llama.cpp runs none: give --out a folder name instead")
    assert "\n" not in text


def test_a_byte_level_gguf_source(tmp_path: Path, llama_cpp: Ask) -> None:
    made = byte_level(pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False))
    made.post_processor = around("<s> $A", "<s>")(made)
    first, again = tmp_path / "first.gguf", tmp_path / "again.gguf"
    write(first, save(tmp_path / "hf", made), 701)
    checkpoint = open_checkpoint(str(first))
    found = json.loads((checkpoint.folder / "gguf_tokenizer.json").read_text(encoding="utf-8"))
    assert found == {
        "model": "gpt2", "pre": "smollm", "add_bos_token": True, "add_space_prefix": False,
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    copy_companions(tmp_path / "out", checkpoint)  # which a GGUF file can be made from in its turn
    assert write(again, tmp_path / "out", 701) == []
    assert keys(again) == keys(first)
    assert llama_cpp(again, [*TEXTS]) == llama_cpp(first, [*TEXTS])


@pytest.mark.slow
def test_smollm2_keeps_its_tokenizer(tmp_path: Path, smollm2: Path, llama_cpp: Ask) -> None:
    folder, path = open_checkpoint(str(smollm2)).folder, tmp_path / "t.gguf"
    assert write(path, folder, 49152) == []
    assert keys(path) == {**keys(smollm2), "add_eos_token": False}
    assert llama_cpp(path, [*TEXTS]) == llama_cpp(smollm2, [*TEXTS])
    # What transformers makes of the file does not know that digits stand alone.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    digits = pre.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [digits, pre.ByteLevel(add_prefix_space=False)]
    )
    assert llama_cpp(path, [*TEXTS]) == ids_of(tokenizer, [*TEXTS])
    check_drawn(llama_cpp, path, tokenizer)


def test_a_sentencepiece_gguf_source(tmp_path: Path, stories: Path, llama_cpp: Ask) -> None:
    first, again = tmp_path / "first.gguf", tmp_path / "again.gguf"
    write(first, stories, 514)
    assert write(again, open_checkpoint(str(first)).folder, 514) == []
    assert keys(again) == keys(first)
    assert llama_cpp(again, [*TEXTS]) == llama_cpp(first, [*TEXTS])


def test_a_gguf_source_of_another_kind(tmp_path: Path, tiny_opt: Path) -> None:
    folder = tmp_path / "hf"
    AutoTokenizer.from_pretrained(tiny_opt).save_pretrained(folder)
    (folder / "gguf_tokenizer.json").write_text(json.dumps({"model": "bert"}))
    with pytest.raises(OutputError) as error:
        write(tmp_path / "t.gguf", folder, 2048)
    assert str(error.value) == f"the tokenizer in {folder} is of the kind GGUF bert: {KINDS}"


def test_keys_that_a_gguf_source_lacks_stay_away(tmp_path: Path, tiny_opt: Path) -> None:
    folder = tmp_path / "hf"
    AutoTokenizer.from_pretrained(tiny_opt).save_pretrained(folder)
    (folder / "gguf_tokenizer.json").write_text(json.dumps({"model": "gpt2", "pre": "mpt"}))
    assert write(tmp_path / "t.gguf", folder, 2048) == []
    found = keys(tmp_path / "t.gguf")
    assert found["pre"] == "mpt"
    assert not {"add_bos_token", "add_space_prefix"} & found.keys()
