"""A Hugging Face tokenizer taken apart: vocabulary, merges, splitters, added tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from secateur.checkpoint.base import first_line
from secateur.checkpoint.gguf_file import TOKENIZER_KEYS
from secateur.checkpoint.safetensors_folder import load_config
from secateur.errors import OutputError
from secateur.modules import MODEL_TYPE_PREFIX

ADVICE = "give --out a folder name instead"


@dataclass(frozen=True)
class Opened:
    """A tokenizer, as transformers opens it.

    Attributes:
        folder: where its files are.
        tokenizer: the transformers tokenizer.
        spec: its parts, laid out as in ``tokenizer.json``. A class of transformers may put parts
            of its own in the place of those in the file; what is here is what runs.
        vocabulary: tokens and their ids, all below ``rows``.
        rows: rows of the embedding.
        keys: how llama.cpp was told to tokenize by the GGUF file that the files were made from;
            empty where they were not.
    """

    folder: Path
    tokenizer: Any
    spec: dict[str, Any]
    vocabulary: dict[str, int]
    rows: int
    keys: dict[str, Any]

    @property
    def model(self) -> dict[str, Any]:
        return dict(self.spec["model"])

    @property
    def merges(self) -> list[tuple[str, str]]:
        return [(left, right) for left, right in self.model.get("merges", ())]

    @property
    def added(self) -> list[dict[str, Any]]:
        """The added tokens that have a row."""
        return [token for token in self.spec["added_tokens"] if token["id"] < self.rows]

    @property
    def normalizers(self) -> list[dict[str, Any]]:
        return _steps(self.spec["normalizer"], "normalizers")

    @property
    def splitters(self) -> list[dict[str, Any]]:
        return _steps(self.spec["pre_tokenizer"], "pretokenizers")

    def text(self, ids: list[int]) -> str:
        return "".join(self.tokenizer.convert_ids_to_tokens(ids))


def open_tokenizer(folder: Path, rows: int) -> Opened:
    """The tokenizer and its parts.

    Raises:
        OutputError: it does not open, has no such parts, or has tokens without a row.
    """
    from transformers import AutoTokenizer

    try:
        config = None
        kind = str(read_json(folder / "config.json").get("model_type", ""))
        if kind.startswith(MODEL_TYPE_PREFIX):
            # transformers does not know our types, and reads not every config without its class.
            config = load_config(folder, str(folder), trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        tokenizer("a", verbose=False)  # its settings are believed until they are needed
    except Exception as error:  # of many kinds; tokenizers itself raises plain Exception
        raise OutputError(
            f"{folder} has no tokenizer that opens without Python code of its own "
            f"({first_line(error)}), and llama.cpp runs none: {ADVICE}"
        ) from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        refuse_kind(folder, type(tokenizer).__name__)
    # First: to write a vocabulary, tokenizers counts up to its largest id, be that 2^31.
    vocabulary = _vocabulary(tokenizer, folder, rows)
    return Opened(
        folder,
        tokenizer,
        json.loads(tokenizer.backend_tokenizer.to_str()),
        vocabulary,
        rows,
        read_json(folder / TOKENIZER_KEYS),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The values of a file; none where there is no file."""
    if not path.is_file():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _vocabulary(tokenizer: Any, folder: Path, rows: int) -> dict[str, int]:
    """Tokens and their ids, all below ``rows``.

    Raises:
        OutputError: the files have ids that the embedding has no row for.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if max(vocabulary.values(), default=0) < rows:
        return vocabulary
    # A class of transformers may add special tokens of its own; those are no fault of the files
    # and never stood for a row.
    stored = read_json(folder / "tokenizer.json")
    listed = {token["id"] for token in stored.get("added_tokens", ())}
    inside = stored.get("model", {}).get("vocab")
    listed |= set(inside.values()) if isinstance(inside, dict) else set()
    surplus = [i for i in vocabulary.values() if i >= rows and (i in listed or not listed)]
    if surplus:
        raise OutputError(
            f"the tokenizer in {folder} has tokens up to id {max(surplus)}, but the embedding has "
            f"{rows} rows: take the {len(surplus)} surplus tokens out of the tokenizer, or give "
            "the model rows for them with resize_token_embeddings"
        )
    return {token: i for token, i in vocabulary.items() if i < rows}


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list of its steps."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for piece in part[inner] for step in _steps(piece, inner)]
    return [part]


def refuse_kind(folder: Path, kind: str) -> NoReturn:
    raise OutputError(
        f"the tokenizer in {folder} is of the kind {kind}: a GGUF file can be had with byte-level "
        f"BPE, or with SentencePiece BPE that has a token for every byte; {ADVICE}"
    )


def refuse_normalizer(folder: Path, step: dict[str, Any]) -> NoReturn:
    raise OutputError(
        f"the tokenizer in {folder} changes text by the normalizer {step['type']}, which llama.cpp "
        f"does not have: allowed are none and NFC; {ADVICE}"
    )
