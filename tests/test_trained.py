"""The small trained Mambas: they have learned something, and it can be measured again."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import stdlib_text

from secateur.calibration import consecutive_windows, encode, load_text
from secateur.checkpoint import open_checkpoint
from secateur.evaluation.perplexity import perplexity_of
from secateur.progress import Progress
from secateur.streaming import Stream

MODELS = Path(__file__).parent / "models"
WINDOWS, LENGTH = 40, 128


def trained(name: str) -> Path:
    folder = MODELS / name
    if not folder.is_dir():
        family = name.removeprefix("tiny-")
        pytest.skip(
            f"no {folder.name}: python bench/train_tiny.py --family {family} --out {folder}"
        )
    return folder


def figures(folder: Path) -> tuple[float, float]:
    """Perplexity of the model and of token counts, as its README has them."""
    found = re.findall(r"\*\*([\d.]+)\*\*", (folder / "README.md").read_text(encoding="utf-8"))
    model, unigram = map(float, found)
    return model, unigram


@pytest.mark.parametrize("name", ["tiny-mamba", "tiny-mamba2"])
def test_perplexity_is_far_below_that_of_token_counts(name: str, tmp_path: Path) -> None:
    """On documentation of this Python, which may be of another version than was trained on."""
    folder = trained(name)
    train, held_out = stdlib_text.documents()
    (tmp_path / "text.txt").write_text("\n\n".join(held_out), encoding="utf-8")
    stream = Stream(open_checkpoint(folder))
    tokenizer = stream.checkpoint.tokenizer
    text = load_text(str(tmp_path / "text.txt"), use="evaluation")
    windows = consecutive_windows(text, tokenizer, length=LENGTH, most=WINDOWS)
    model = perplexity_of(stream, windows, Progress())

    tokens = torch.cat([encode(tokenizer, document) for document in train])
    counts = torch.bincount(tokens, minlength=stream.checkpoint.config.vocab_size).double() + 1
    log_p = (counts / counts.sum()).log()
    unigram = math.exp(-log_p[windows.tokens[:, 1:]].mean().item())

    stored, stored_unigram = figures(folder)
    assert model < unigram / 4
    assert model == pytest.approx(stored, rel=0.05)
    assert unigram == pytest.approx(stored_unigram, rel=0.05)


@pytest.mark.parametrize("name", ["tiny-mamba", "tiny-mamba2"])
def test_a_folder_is_small_and_says_where_it_comes_from(name: str) -> None:
    folder = trained(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_500_000
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"python bench/train_tiny.py --family {name.removeprefix('tiny-')} " in text
    assert "PSF licence" in text
