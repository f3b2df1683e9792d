"""From text to windows of tokens: the built-in passages, files, and named public sets.

A window is ``length`` consecutive tokens of one document, without special tokens. Documents are
shuffled with the seed; each gives one window before any gives a second. Where too few documents
are long enough, all are joined, a blank line between them, and cut into windows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from secateur.checkpoint.base import first_line, is_panic
from secateur.errors import CalibrationError, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin"
Use = Literal["calibration", "evaluation"]
#: Documents taken from a set on the hub, which may hold hundreds of millions.
HUB_DOCUMENTS = 2000


@dataclass(frozen=True)
class NamedSet:
    """A public set: where it lies below ``--data-dir`` and on the hub, by use."""

    local: dict[Use, tuple[str, ...]]
    repo: str
    config: str | None
    splits: dict[Use, str]
    field: str = "text"
    whole: bool = False  # one running text, of which the rows are lines


SETS: dict[str, NamedSet] = {
    "c4": NamedSet(
        local={"calibration": ("c4/*.jsonl",), "evaluation": ("c4/*.jsonl",)},
        repo="allenai/c4",
        config="en",
        splits={"calibration": "train", "evaluation": "validation"},
    ),
    "wikitext2": NamedSet(
        local={
            "calibration": ("wikitext2/wiki.train.raw", "wikitext2/wiki.train*"),
            "evaluation": ("wikitext2/wiki.test.raw",),
        },
        repo="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        splits={"calibration": "train", "evaluation": "test"},
        whole=True,
    ),
    "ptb": NamedSet(
        local={
            "calibration": ("ptb/ptb.train.txt", "ptb/ptb.valid.txt"),
            "evaluation": ("ptb/ptb.test.txt",),
        },
        repo="ptb-text-only/ptb_text_only",
        config="penn_treebank",
        splits={"calibration": "train", "evaluation": "test"},
        field="sentence",
        whole=True,
    ),
    "alpaca": NamedSet(
        local={"calibration": ("alpaca/*.jsonl",), "evaluation": ("alpaca/*.jsonl",)},
        repo="tatsu-lab/alpaca",
        config=None,
        splits={"calibration": "train", "evaluation": "train"},
        field="instruction",
    ),
}


@dataclass(frozen=True)
class Text:
    """Documents and where they come from. ``whole`` means one running text."""

    documents: list[str]
    origin: str
    whole: bool = False


@dataclass(frozen=True)
class Windows:
    """Tokens (windows, length), where they come from, and the SHA-256 of their ids as int32."""

    tokens: torch.Tensor
    origin: str
    sha256: str

    @classmethod
    def of(cls, tokens: torch.Tensor, origin: str) -> Windows:
        data = tokens.to(torch.int32).contiguous().numpy().tobytes()
        return cls(tokens, origin, hashlib.sha256(data).hexdigest())


def load_text(
    name: str, *, use: Use, text_field: str = "text", data_dir: str | Path | None = None
) -> Text:
    """Read the text called ``name``.

    Args:
        name: ``builtin``, a name in :data:`SETS`, or a path to a text or JSONL file.
        use: which part of a named set: its training side, or its test side.
        text_field: key of the text in each line of a JSONL file.
        data_dir: folder with local copies of the named sets; without it they are fetched.

    Raises:
        CalibrationError: not there, empty, not UTF-8, not JSONL, or without the field.
    """
    if name == BUILTIN:
        raw = resources.files("secateur").joinpath("data", f"{use}.jsonl").read_text("utf-8")
        return Text([json.loads(line)["text"] for line in raw.splitlines()], "built-in passages")
    path = Path(name).expanduser()
    if path.is_file():
        return _from_file(path, text_field)
    if name in SETS:
        return _named(name, use, data_dir)
    raise CalibrationError(
        f"calibration {name} is neither a file nor a known name: give a text or JSONL file, or "
        f"one of {BUILTIN}, {', '.join(SETS)}"
    )


def hides_a_set(name: str) -> str | None:
    """A note for the user where a file has the name of a set, and is read in its place."""
    if name not in SETS or not Path(name).is_file():
        return None
    return (
        f"{name} is the file {Path(name).resolve()} here, not the set of that name: to get the "
        "set, rename the file or start in another folder"
    )


def draw_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int
) -> Windows:
    """Choose ``samples`` windows of ``length`` tokens, the same for the same seed.

    Raises:
        CalibrationError: the text has too few tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(text.documents), generator=generator).tolist()
    rounds: list[list[torch.Tensor]] = []
    for number in order:
        ids = encode(tokenizer, text.documents[number])
        count = len(ids) // length
        if count == 0:
            continue
        spare = len(ids) - count * length
        start = int(torch.randint(spare + 1, (1,), generator=generator))
        pieces = ids[start : start + count * length].view(count, length)
        for place, piece in enumerate(torch.randperm(count, generator=generator).tolist()):
            if place == len(rounds):
                rounds.append([])
            rounds[place].append(pieces[piece])
        if len(rounds[0]) >= samples:
            break
    chosen = [window for one_round in rounds for window in one_round][:samples]
    if len(chosen) < samples:
        joined = encode(tokenizer, "\n\n".join(text.documents[n] for n in order))
        count = len(joined) // length
        if count < samples:
            raise CalibrationError(
                f"calibration text ({text.origin}) has {len(joined)} tokens, enough for {count} "
                f"windows of {length}; asked were {samples}: give more text, or lower --samples "
                "or --length"
            )
        chosen = list(joined[: samples * length].view(samples, length))
    return Windows.of(torch.stack(chosen), text.origin)


def consecutive_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, length: int, most: int | None
) -> Windows:
    """The first ``most`` windows of ``length`` tokens of a running text, for perplexity.

    A text shorter than one window is taken as one short window.

    Raises:
        CalibrationError: fewer than two tokens.
    """
    ids = encode(tokenizer, ("" if text.whole else "\n\n").join(text.documents))
    if len(ids) < 2:
        raise CalibrationError(f"text ({text.origin}) has {len(ids)} tokens: nothing to predict")
    if length < 2:
        raise CalibrationError(f"length is {length}: a window needs two tokens to predict one")
    length = min(length, len(ids))
    count = len(ids) // length
    count = min(count, most) if most else count
    return Windows.of(ids[: count * length].view(count, length), text.origin)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Token ids of ``text``, without special tokens, (tokens,).

    Raises:
        SourceError: the tokenizer gives up; a damaged one may do so at one text and not at others.
    """
    # JSON may hold half of a surrogate pair, which no tokenizer takes.
    text = text.encode("utf-8", "replace").decode("utf-8")
    try:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)
    except BaseException as error:  # tokenizers itself raises plain Exception, or panics
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise SourceError(
            f"the tokenizer cannot cut a text into tokens ({first_line(error)}): put the model's "
            "own tokenizer files beside config.json"
        ) from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse a tokenizer that can give ids without a row in the embedding.

    Raises:
        SourceError: the tokenizer is of another model.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise SourceError(
            f"the tokenizer knows ids up to {largest}, the embedding has {rows} rows: tokenizer "
            "and weights are of different models; put the right tokenizer files beside config.json"
        )


# ---- reading ---------------------------------------------------------------------------------


def _from_file(path: Path, text_field: str) -> Text:
    raw = _read(path)
    if path.suffix in (".jsonl", ".ndjson"):
        documents = [_row_text(row, text_field, path, n) for n, row in _rows(raw, path)]
        return Text(documents, path.name)
    return Text([raw], path.name, whole=True)


def _read(path: Path) -> str:
    try:
        raw = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"calibration file {path} is not UTF-8 (byte {error.start}): convert it, for example "
            f"with iconv -f latin1 -t utf-8 {path.name}"
        ) from error
    except OSError as error:
        raise CalibrationError(f"calibration file {path} cannot be read: {error}") from error
    if not raw.strip():
        raise CalibrationError(f"calibration file {path} is empty")
    return raw


def _rows(raw: str, path: Path) -> Iterable[tuple[int, Any]]:
    # Not splitlines(): texts may hold other ends of line, such as U+2028, as they are.
    for number, line in enumerate(raw.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(
                    f"calibration file {path} line {number} is not JSON ({error}): a .jsonl file "
                    "has one object a line"
                ) from error


def _row_text(row: Any, field: str, path: Path, number: int) -> str:
    if isinstance(row, dict) and isinstance(row.get(field), str):
        return str(row[field])
    has = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
    raise CalibrationError(
        f"calibration file {path} line {number} has no text field {field!r} (it has: {has}): "
        "name the right one with --text-field"
    )


def _alpaca(row: dict[str, Any]) -> str:
    parts = (row.get("instruction"), row.get("input"), row.get("output"))
    return "\n".join(str(part) for part in parts if part)


def _named(name: str, use: Use, data_dir: str | Path | None) -> Text:
    described = SETS[name]
    if data_dir is None:
        return _from_hub(name, described, use)
    folder = Path(data_dir).expanduser()
    for pattern in described.local[use]:
        paths = sorted(folder.glob(pattern))
        if not paths:
            continue
        path = paths[0]
        if name != "alpaca":
            return _from_file(path, described.field)
        rows = list(_rows(_read(path), path))
        for number, row in rows:
            _row_text(row, described.field, path, number)
        return Text([_alpaca(row) for _, row in rows], path.name)
    raise CalibrationError(
        f"calibration {name} is not in {folder}: expected {' or '.join(described.local[use])} "
        "there; leave out --data-dir to fetch it from the hub"
    )


def _from_hub(name: str, described: NamedSet, use: Use) -> Text:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"calibration {name} would be fetched with the package datasets, which is not "
            "installed: pip install secateur[data], or name a local copy with --data-dir"
        ) from error
    try:
        rows = load_dataset(
            described.repo, described.config, split=described.splits[use], streaming=True
        )
        taken = [dict(row) for row, _ in zip(rows, range(HUB_DOCUMENTS), strict=False)]
    except Exception as error:  # network, hub and data errors are of many kinds
        raise CalibrationError(
            f"calibration {name} cannot be fetched from the hub ({described.repo}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}): name a local "
            f"copy with --data-dir, or use --calibration {BUILTIN}"
        ) from error
    if name == "alpaca":
        return Text([_alpaca(row) for row in taken], described.repo)
    for row in taken:
        if described.field not in row:
            raise CalibrationError(
                f"calibration {name} on the hub ({described.repo}) has no field "
                f"{described.field!r} any more (it has: {', '.join(sorted(row))}): name a local "
                f"copy with --data-dir, or use --calibration {BUILTIN}"
            )
    texts = [str(row[described.field]) for row in taken]
    if described.whole:
        glue = "" if described.field == "text" else "\n"
        return Text([glue.join(texts)], described.repo, whole=True)
    return Text(texts, described.repo)
