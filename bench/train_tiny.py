"""Train a very small causal language model from scratch, for the test-suite.

A random model cannot show whether an importance ranking is any good: pruning it by any
rule is as harmless as by any other. The models made here are small enough to keep next to
the tests (below 4 MB in float16) and trained enough that the choice of what to prune matters.

Usage::

    python bench/train_tiny.py --family opt --data-dir DIR --out DIR [--steps 4800]
    python bench/train_tiny.py --family llama --data-dir DIR --out DIR --minutes 20
    python bench/train_tiny.py --family mamba --out DIR [--steps 2400]

``--minutes`` replaces ``--steps`` by as many steps as are expected to fit, from a short timing;
the number it chose is printed and recorded, so that ``--steps`` can repeat the run. The same
seed, steps, threads and package versions on the same kind of processor give the same weights.

Without ``--data-dir``, the text is the documentation in Python's standard library
(:mod:`stdlib_text`), measured on modules that were kept out, and the built-in passages for
calibration. Expected under ``--data-dir``:

- ``wikitext2/wiki.train.part.txt``, trained on;
- ``c4/c4_demo_300.jsonl``, trained on where the line index is even: the odd lines stay unseen,
  for calibration;
- ``wikitext2/wiki.valid.raw``, only measured on.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import linear_scan
import stdlib_text
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

HIDDEN = 128
BLOCKS = 6
HEADS = 8
FFN = 512
POSITIONS = 512

# As in OPT, one token begins, ends and separates documents, so that the beginning token is
# one that training has seen.
PAD, END = "<pad>", "</s>"
PAD_ID, END_ID = 0, 1

VALID_WINDOWS = 40

WARMUP = 0.05  # share of the steps
FINAL_LR = 0.05  # share of the peak
TIMED_STEPS = 24


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on what at a time.

    Few tokens can be afforded, and small batches learn more from each: after 655,000 tokens of
    the opt family, batches of 8, 4 and 2 had validation perplexities of 308, 229 and 208.

    Attributes:
        config: from the size of the vocabulary.
        window, batch: tokens of a window and windows of a step.
        long_every: one step in this many uses half as many windows of twice the length, so that
            learned positions above ``window`` are trained too; 0: none does.
        fast: what the training runs in.
    """

    config: Callable[[int], PreTrainedConfig]
    vocabulary: int = 2048
    window: int = 256
    batch: int = 4
    long_every: int = 4
    fast: Callable[[], AbstractContextManager[None]] = nullcontext


def opt_config(vocabulary: int) -> PreTrainedConfig:
    return OPTConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        ffn_dim=FFN,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=HIDDEN,
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )


def llama_config(vocabulary: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )


def mamba_config(vocabulary: int) -> PreTrainedConfig:
    return MambaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        num_hidden_layers=BLOCKS,
        state_size=8,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )


def mamba2_config(vocabulary: int) -> PreTrainedConfig:
    return Mamba2Config(
        vocab_size=vocabulary,
        hidden_size=96,
        num_hidden_layers=BLOCKS,
        state_size=32,
        n_groups=1,
        num_heads=12,
        head_dim=16,
        chunk_size=32,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )


FAMILIES = {
    "opt": Recipe(opt_config),
    "llama": Recipe(llama_config),
    # A scan goes through a window step by step, so short ones and more of them cost least.
    "mamba": Recipe(mamba_config, 1024, 128, 4, 0, linear_scan.in_place_of_the_slow_one),
    "mamba2": Recipe(mamba2_config, 1024, 128, 4, 0),
}


def texts(data_dir: Path | None) -> tuple[list[str], str]:
    """Documents to train on, and the text that is measured on."""
    if data_dir is None:
        train, held_out = stdlib_text.documents()
        return train, "\n\n".join(held_out)
    wiki = (data_dir / "wikitext2" / "wiki.train.part.txt").read_text(encoding="utf-8")
    # The part file has blank lines between paragraphs; the raw files, which the model is
    # measured on, have none.
    documents = [wiki.replace("\n\n", "\n")]
    with (data_dir / "c4" / "c4_demo_300.jsonl").open(encoding="utf-8") as lines:
        documents += [json.loads(line)["text"] for i, line in enumerate(lines) if i % 2 == 0]
    valid = (data_dir / "wikitext2" / "wiki.valid.raw").read_text(encoding="utf-8")
    return documents, valid


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END],
        # All 256 bytes, so that no text needs an unknown token.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD
    )


def encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for document in documents:
        ids += [END_ID, *tokenizer.encode(document, add_special_tokens=False)]
    return torch.tensor(ids)


def new_model(family: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    recipe = FAMILIES[family]
    return AutoModelForCausalLM.from_config(recipe.config(recipe.vocabulary), dtype=torch.float32)


def learning_rate_share(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: torch.Tensor,
    steps: int,
    lr: float,
    seed: int,
    every: int = 0,
) -> float:
    """Train in place; print a line each `every` steps; return the mean loss of the last tenth."""
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.dim() >= 2], "weight_decay": 0.1},
            {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, steps)
    )
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        factor = 2 if recipe.long_every and not step % recipe.long_every else 1
        length, count = recipe.window * factor, recipe.batch // factor
        offsets = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
        batch = tokens[offsets + torch.arange(length)]
        with recipe.fast():
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if every and (step % every == 0 or step == steps):
            elapsed = time.perf_counter() - start
            recent = losses[-every:]
            print(
                f"step {step}/{steps}  loss {sum(recent) / len(recent):.3f}  "
                f"elapsed {elapsed:.0f} s  remaining {elapsed / step * (steps - step):.0f} s",
                flush=True,
            )
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def steps_within(minutes: float, family: str, tokens: torch.Tensor, seed: int) -> int:
    """How many steps are expected to fit in `minutes`, from timing a model thrown away."""
    model, recipe = new_model(family, seed), FAMILIES[family]
    train(model, recipe, tokens, 4, 0.0, seed)  # the first steps allocate and are slower
    start = time.perf_counter()
    train(model, recipe, tokens, TIMED_STEPS, 0.0, seed)
    seconds = (time.perf_counter() - start) / TIMED_STEPS
    print(f"{recipe.batch * recipe.window / seconds:.0f} tokens/s", flush=True)
    return max(1, int(minutes * 60 / seconds))


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    model.eval()
    # One window at a time: every window has as many predictions, so the mean of means is right.
    losses = [model(input_ids=w[None], labels=w[None], use_cache=False).loss for w in windows]
    return math.exp(torch.stack(losses).mean().item())


def unigram_perplexity(tokens: torch.Tensor, windows: torch.Tensor, vocabulary: int) -> float:
    """Perplexity, on what the model has to predict, of token counts with add-one smoothing."""
    counts = torch.bincount(tokens, minlength=vocabulary).double() + 1
    log_p = (counts / counts.sum()).log()
    return math.exp(-log_p[windows[:, 1:]].mean().item())


README = """\
# {name}

A {parameters:,}-parameter {family} model for Secateur's tests, trained from scratch on a CPU.
It is of no other use.

    python bench/train_tiny.py --family {family} {data}--out OUT \\
        --steps {steps} --lr {lr} --seed {seed} --threads {threads}

- Text: {text}, {tokens:,} tokens of a byte-level
  BPE vocabulary of {vocab} trained on the same text.
- Training: {steps} steps of {step_tokens} tokens, {passes:.1f} passes over the text, in windows of
  {windows}; mean loss of the last tenth {loss:.3f}.
- Perplexity on {measured} (first {valid_windows} windows of
  {window} tokens, no beginning token, float32 arithmetic on the stored float16 weights):
  **{valid:.1f}**. Token counts of the training text (unigram, add-one smoothing) give
  **{unigram:.1f}** on the same tokens.
"""

#: What the README says of the text: given a data folder, and without one.
TEXTS = {
    True: (
        "WikiText-2 train part and half of a small C4 sample (the documents with an even line\n"
        "  index)",
        "WikiText-2 validation, raw",
    ),
    False: (
        "documentation in the standard library of Python {python} (Copyright Python Software\n"
        "  Foundation, PSF licence; `bench/stdlib_text.py`)",
        "that of modules kept out\n  ({modules})",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=sorted(FAMILIES), required=True)
    parser.add_argument("--data-dir", type=Path, help="text; without: Python's documentation")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--minutes", type=float, help="choose the steps by time instead")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    recipe = FAMILIES[args.family]
    documents, valid_text = texts(args.data_dir)
    tokenizer = train_tokenizer(documents, recipe.vocabulary)
    tokens = encode(tokenizer, documents)
    print(f"{len(documents)} documents, {len(tokens)} tokens", flush=True)

    steps = args.steps
    if args.minutes is not None:
        steps = steps_within(args.minutes, args.family, tokens, args.seed)
    model = new_model(args.family, args.seed)
    print(f"{model.num_parameters()} parameters, {steps} steps", flush=True)
    loss = train(model, recipe, tokens, steps, args.lr, args.seed, every=100)

    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    # Measure what was stored, the way a test opens it.
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    valid_ids = tokenizer.encode(valid_text, add_special_tokens=False)
    windows = torch.tensor(valid_ids[: VALID_WINDOWS * recipe.window]).view(VALID_WINDOWS, -1)
    valid = perplexity(model, windows)
    unigram = unigram_perplexity(tokens, windows, recipe.vocabulary)
    text, measured = TEXTS[args.data_dir is not None]
    readme = README.format(
        name=args.out.name,
        family=args.family,
        parameters=model.num_parameters(),
        steps=steps,
        lr=args.lr,
        seed=args.seed,
        threads=args.threads,
        tokens=len(tokens),
        data="--data-dir DIR " if args.data_dir else "",
        text=text.format(python=platform.python_version()),
        measured=measured.format(modules=", ".join(stdlib_text.HELD_OUT)),
        vocab=recipe.vocabulary,
        step_tokens=recipe.batch * recipe.window,
        passes=steps * recipe.batch * recipe.window / len(tokens),
        window=recipe.window,
        windows=f"{recipe.window} tokens"
        + (f" (one step in {recipe.long_every}: twice that)" if recipe.long_every else ""),
        loss=loss,
        valid_windows=VALID_WINDOWS,
        valid=valid,
        unigram=unigram,
    )
    (args.out / "README.md").write_text(readme, encoding="utf-8")
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"final loss {loss:.3f}  validation perplexity {valid:.1f}  unigram {unigram:.1f}")
    print(f"{size} bytes in {args.out}")


if __name__ == "__main__":
    main()
