"""The tokenizer of a GGUF file, from Hugging Face files, so that llama.cpp cuts text as they do.

llama.cpp has two tokenizers for what is described here. ``gpt2`` splits text by regular expressions
that it knows by name (``tokenizer.ggml.pre``) and joins bytes by a list of merges. ``llama`` has no
merges: of all neighbors that together are a token it joins those whose token has the best score.
What both do in addition to that is fixed in its ``src/llama-vocab.cpp``; where a Hugging Face
tokenizer does something else, a note says so.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.checkpoint.exported_gguf import NO_MERGES
from secateur.errors import OutputError
from secateur.outputs.gguf_splits import SPLITS, name_of, regexes_of, shown
from secateur.outputs.tokenizer_parts import (
    ADVICE,
    Opened,
    open_tokenizer,
    read_json,
    refuse_kind,
    refuse_normalizer,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter

#: How SentencePiece writes a space.
SPACE = "▁"
#: The same split for vocabularies that take a word which is a token whole, without any merge.
WHOLE_WORDS = {"smaug-bpe": "llama-bpe", "tekken": "tekken"}
#: llama.cpp tells the case of letters in these by the ranges a-z and A-Z.
ASCII_CASE = ("tekken", "gpt-4o")
COMPOSES = "the tokenizer composes accents first (NFC), llama.cpp takes text as it is"
#: Tokens that end a text in llama.cpp, whatever the keys say.
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>",
    "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>",
)  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """How llama.cpp is told to cut a text.

    Attributes:
        model: ``gpt2`` or ``llama``, its names of byte-level BPE and of SentencePiece.
        pre: its name of the regular expressions that split a text first.
        space: whether it puts a space before a text.
    """

    model: str
    pre: str
    space: bool


def add_tokenizer(writer: GGUFWriter, folder: Path, rows: int) -> list[str]:
    """Add every ``tokenizer.`` key that llama.cpp needs to tokenize as Hugging Face does.

    Args:
        writer: takes the keys; nothing else is done with it.
        folder: tokenizer files, with config and generation config where there are any.
        rows: rows of the embedding. The list of tokens becomes as long.

    Returns:
        Notes for the user, a line each, about what llama.cpp does otherwise.

    Raises:
        OutputError: llama.cpp has no such tokenizer, or there are more tokens than rows.
    """
    opened = open_tokenizer(folder, rows)
    notes: list[str] = []
    cut = _cut(opened, notes)
    tokens, types = _token_list(opened, cut)
    writer.add_tokenizer_model(cut.model)
    writer.add_tokenizer_pre(cut.pre)
    writer.add_token_list(tokens)
    if cut.model == "llama":
        writer.add_token_scores(_scores(opened.merges, tokens, notes))
    else:
        writer.add_token_merges(_spaced(opened.merges))
    writer.add_token_types(types)
    notes += _odd_added_tokens(opened)
    notes += _add_roles(writer, opened, cut)
    template = opened.tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    named = isinstance(template, list) and all(isinstance(t["template"], str) for t in template)
    if template and not (named or isinstance(template, str)):
        notes.append("the chat template is no text and is left out")
    elif template:
        writer.add_chat_template(template)
    return notes


def _cut(opened: Opened, notes: list[str]) -> Cut:
    """What llama.cpp is told; ``notes`` grows by what it cannot be told.

    Raises:
        OutputError: it has nothing like this tokenizer.
    """
    kind, bpe = str(opened.model["type"]), opened.model["type"] == "BPE"
    if bpe and any(step["type"] == "ByteLevel" for step in opened.splitters):
        model = "gpt2"
    # llama.cpp ends itself where a byte is met that has no token.
    elif bpe and all(f"<0x{byte:02X}>" in opened.vocabulary for byte in range(256)):
        model = "llama"
    else:
        refuse_kind(opened.folder, f"{kind} without bytes" if bpe else kind)
    if not opened.keys:
        return _cut_of_bytes(opened, notes) if model == "gpt2" else _cut_of_pieces(opened, notes)
    # What was made from a GGUF file only resembles it; its keys are the truth.
    if opened.keys.get("model", model) != model:
        refuse_kind(opened.folder, f"GGUF {opened.keys['model']}")
    return Cut(model, str(opened.keys.get("pre", "default")), model == "llama")


def _cut_of_bytes(opened: Opened, notes: list[str]) -> Cut:
    """Byte-level BPE: the name of its regular expressions, and what llama.cpp leaves out."""
    model = opened.model
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        refuse_kind(opened.folder, "BPE with marks at the edges of words")
    for step in opened.normalizers:
        if step["type"] != "NFC":
            refuse_normalizer(opened.folder, step)
        notes.append(COMPOSES)
    regexes = regexes_of(opened.splitters)
    pre = name_of(regexes)
    if pre is None:
        known = ", ".join((*SPLITS.values(), "llama-bpe"))
        raise OutputError(
            f"the tokenizer in {opened.folder} splits text by {shown(regexes)}, for which "
            f"llama.cpp has no name that is known here: known are {known}; {ADVICE}"
        )
    pre = _with_whole_words(opened, pre, notes)
    if pre in ASCII_CASE:
        notes.append(
            f"llama.cpp's {pre} splits words with combining marks, or with capitals beyond A-Z "
            "inside, otherwise than the tokenizer"
        )
    if any(step.get("add_prefix_space") for step in opened.splitters):
        notes.append("the tokenizer puts a space before a text, llama.cpp does not")
    return Cut("gpt2", pre, False)


def _with_whole_words(opened: Opened, pre: str, notes: list[str]) -> str:
    """The name of the same split that fits ``ignore_merges``; a note where there is none."""
    whole = bool(opened.model.get("ignore_merges"))
    named = WHOLE_WORDS.get(pre, pre) if whole else pre
    if (named in WHOLE_WORDS.values()) != whole and (lost := _out_of_reach(opened)):
        names = ("the tokenizer", "llama.cpp")
        does, does_not = names if whole else names[::-1]
        notes.append(
            f"{does} takes words whole that are tokens which no merges make ({lost} of them), "
            f"{does_not} never does"
        )
    return named


def _out_of_reach(opened: Opened) -> int:
    """How many tokens of the vocabulary no merges lead to."""
    from tokenizers import Tokenizer

    plain = {**opened.spec, "model": {**opened.model, "ignore_merges": False}, "added_tokens": []}
    model = Tokenizer.from_str(json.dumps(plain)).model
    added = {token["content"] for token in opened.added}
    return sum(len(model.tokenize(t)) != 1 for t in opened.model["vocab"] if t not in added)


def _cut_of_pieces(opened: Opened, notes: list[str]) -> Cut:
    """SentencePiece BPE: whether a space comes before a text, and what llama.cpp does otherwise."""
    for step in opened.normalizers:
        if step["type"] == "NFC":
            notes.append(COMPOSES)
        elif not (_prepends(step) or _escapes(step)):
            refuse_normalizer(opened.folder, step)
    escapes, scheme = any(map(_escapes, opened.normalizers)), "never"
    for step in opened.splitters:
        if step["type"] == "Metaspace" and step["replacement"] == SPACE:
            escapes, scheme = True, step["prepend_scheme"]
            if step["split"] and any(SPACE in token[1:] for token in opened.model["vocab"]):
                notes.append("llama.cpp joins words to one token where the tokenizer never does")
        elif not (escapes and step["type"] == "Split" and step["pattern"] == {"String": " "}):
            # (a split at spaces finds none that are left)
            raise OutputError(
                f"the tokenizer in {opened.folder} splits text by {step['type']}, which llama.cpp "
                f"does not do with SentencePiece: allowed are none and Metaspace; {ADVICE}"
            )
    if not escapes:
        refuse_kind(opened.folder, f"BPE that does not write spaces as {SPACE}")
    if any(map(_prepends, opened.normalizers)):
        scheme = "everywhere"
        if any(token["normalized"] for token in opened.added):
            notes.append(
                "the tokenizer finds some added tokens only where words begin, llama.cpp anywhere"
            )
    if scheme in ("first", "always"):
        where = "" if scheme == "always" else ", and after each special token"
        notes.append(
            f"llama.cpp puts a space also before text that begins with one{where}; the tokenizer "
            "does not"
        )
    return Cut("llama", "default", scheme != "never")


def _prepends(step: dict[str, Any]) -> bool:
    """Whether a normalizer puts a space before a text, as SentencePiece does."""
    return step["type"] == "Prepend" and step["prepend"] == SPACE


def _escapes(step: dict[str, Any]) -> bool:
    """Whether a normalizer writes spaces as SentencePiece does."""
    wanted = ("Replace", {"String": " "}, SPACE)
    return (step["type"], step.get("pattern"), step.get("content")) == wanted


def _token_list(opened: Opened, cut: Cut) -> tuple[list[str], list[int]]:
    """Text and type of every row; rows without a token are unused."""
    from gguf import TokenType

    pieces = cut.model == "llama"
    texts = dict.fromkeys(range(opened.rows), "")
    types = [int(TokenType.UNUSED)] * opened.rows
    for token, i in opened.vocabulary.items():
        texts[i] = token
        if token != f"[PAD{i}]":
            byte = pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            types[i] = int(TokenType.BYTE if byte else TokenType.NORMAL)
    escaped = pieces and any(map(_escapes, opened.normalizers))
    for added in opened.added:
        i, plain = added["id"], added["content"].replace(SPACE, " ")
        types[i] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
        if escaped and added["normalized"] and plain not in opened.vocabulary:
            texts[i] = plain  # llama.cpp looks for added tokens before it writes spaces otherwise
    unknown = opened.vocabulary.get(opened.model["unk_token"] or opened.tokenizer.unk_token or "")
    if pieces and unknown is not None:
        types[unknown] = int(TokenType.UNKNOWN)
    taken = set(opened.vocabulary)
    for i in set(range(opened.rows)) - set(opened.vocabulary.values()):
        texts[i] = f"[PAD{i}]"
        while texts[i] in taken:  # llama.cpp refuses a file with two equal tokens
            texts[i] = f"[{texts[i]}]"
        taken.add(texts[i])
    return list(texts.values()), types


def _spaced(merges: list[tuple[str, str]]) -> list[str]:
    """Merges as GGUF has them, both parts with a space between.

    A part with a space inside cannot be told from that, nor does it occur in text of bytes.
    """
    found = [f"{left} {right}" for left, right in merges if " " not in left + right]
    return found or [NO_MERGES]


def _scores(merges: list[tuple[str, str]], tokens: list[str], notes: list[str]) -> list[float]:
    """Score of every row: minus the rank of the first merge that makes it; the worst where none.

    llama.cpp joins any neighbors that together are a token, best token first, leftmost first;
    Hugging Face joins only the pairs that are listed, lowest rank first. Both do the same when all
    merges of a token stand together in the list and no pair is missing from it.
    """
    rank: dict[str, int] = {}
    returns, last = 0, ""
    for number, (left, right) in enumerate(merges):
        token = left + right
        returns += token in rank and token != last
        rank.setdefault(token, number)
        last = token
    listed = set(merges)
    made: set[str] = set()
    missing = 0
    for token in sorted((t for t in tokens if " " not in t), key=len):
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if (at == 1 or left in made) and (len(right) == 1 or right in made):
                made.add(token)
                missing += (left, right) not in listed
    if returns or missing:
        notes.append(
            f"llama.cpp joins tokens by score, not by a list of merges: {missing} pairs that the "
            f"tokenizer does not join, and {returns} out of its order; rare texts differ"
        )
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _odd_added_tokens(opened: Opened) -> list[str]:
    """A note for added tokens that take the spaces beside them, or stand only as whole words."""
    odd = [t["content"] for t in opened.added if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if not odd:
        return []
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    return [
        f"the tokenizer takes {', '.join(odd[:3])}{more} together with the spaces beside, or only "
        "as whole words; llama.cpp does neither"
    ]


def _add_roles(writer: GGUFWriter, opened: Opened, cut: Cut) -> list[str]:
    """Add the ids with a part to play and what is put around a text; note what cannot be."""
    notes: list[str] = []
    ids = _special_ids(opened)
    before, behind = _around(opened.tokenizer)
    begins = len(before) == 1 and before[0] < opened.rows
    if begins:
        ids["bos"] = before[0]  # llama.cpp can put only this one before a text
    elif before:
        notes.append(
            f"the tokenizer puts {opened.text(before)} before a text, llama.cpp nothing: it has "
            "place for one token"
        )
    closes = behind == [ids.get("eos")]
    if behind and not closes:
        notes.append(
            f"the tokenizer puts {opened.text(behind)} behind a text, llama.cpp nothing: it has "
            "place for the end token"
        )
    if "eos" not in ids:
        notes.append("the tokenizer has no end token; llama.cpp takes one of its own choice")
    elif "bos" not in ids:
        ids["bos"] = ids["eos"]  # without the key llama.cpp takes token 1 or 11, whatever that is
    for name, i in ids.items():
        getattr(writer, f"add_{name}_token_id")(i)
    # A key that a GGUF source lacks has a default in llama.cpp, which then holds here too.
    flags = opened.keys or {"add_bos_token": begins, "add_space_prefix": cut.space}
    if "add_bos_token" in flags:
        writer.add_add_bos_token(bool(flags["add_bos_token"]))
    if "add_space_prefix" in flags:
        writer.add_add_space_prefix(bool(flags["add_space_prefix"]))
    writer.add_add_eos_token(closes)
    return notes + _add_further_end(writer, opened, ids)


def _special_ids(opened: Opened) -> dict[str, int]:
    """Ids of the tokens with a part to play: of the tokenizer, else of the configs."""
    configs = [
        read_json(opened.folder / name) for name in ("generation_config.json", "config.json")
    ]
    ids: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "sep", "pad", "mask"):
        for found in (
            getattr(opened.tokenizer, f"{name}_token_id", None),
            *(config.get(f"{name}_token_id") for config in configs),
        ):
            first = found[0] if isinstance(found, list) and found else found
            if isinstance(first, int) and 0 <= first < opened.rows:
                ids[name] = first
                break
    return ids


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer really puts before and behind a text."""
    for text in ("a", "0", ".", "\n"):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text, add_special_tokens=True)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
    return [], []


def _add_further_end(writer: GGUFWriter, opened: Opened, ids: dict[str, int]) -> list[str]:
    """Add the second token at which generation ends, if any; note what is left over."""
    ends = read_json(opened.folder / "generation_config.json").get("eos_token_id")
    further = [
        i
        for i in (ends if isinstance(ends, list) else [ends])
        if isinstance(i, int)
        and 0 <= i < opened.rows
        and i != ids.get("eos")
        and opened.text([i]) not in ENDS
    ]
    if further:
        writer.add_eot_token_id(further[0])
    if len(further) > 1:
        return [
            f"generation ends also at {opened.text(further[1:])}, for which a GGUF file has no key"
        ]
    return []
