"""Train a very small causal language model from scratch, for the test-suite.

A random model cannot show whether an importance ranking is any good: pruning it by any
rule is as harmless as by any other. The models made here are small enough to keep next to
the tests (below 4 MB in float16) and trained enough that the choice of what to prune matters.

Usage::

    python bench/train_tiny.py --family opt --data-dir DIR --out DIR [--steps 4800]
    python bench/train_tiny.py --family llama --data-dir DIR --out DIR --minutes 20

``--minutes`` replaces ``--steps`` by as many steps as are expected to fit, from a short timing;
the number it chose is printed and recorded, so that ``--steps`` can repeat the run. The same
seed, steps, threads and package versions on the same kind of processor give the same weights.

Expected under ``--data-dir``:

- ``wikitext2/wiki.train.part.txt``, trained on;
- ``c4/c4_demo_300.jsonl``, trained on where the line index is even: the odd lines stay unseen,
  for calibration;
- ``wikitext2/wiki.valid.raw``, only measured on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 2048
HIDDEN = 128
BLOCKS = 6
HEADS = 8
FFN = 512
POSITIONS = 512

# As in OPT, one token begins, ends and separates documents, so that the beginning token is
# one that training has seen.
PAD, END = "<pad>", "</s>"
PAD_ID, END_ID = 0, 1

WINDOW = 256
# Few tokens can be afforded, and small batches learn more from each: after 655,000 tokens of
# the opt family, batches of 8, 4 and 2 had validation perplexities of 308, 229 and 208.
BATCH = 4
VALID_WINDOWS = 40
# One step in this many uses half as many windows of twice the length, so that the learned
# positions above WINDOW are trained too and the model can be used up to POSITIONS.
LONG_EVERY = 4

WARMUP = 0.05  # share of the steps
FINAL_LR = 0.05  # share of the peak
TIMED_STEPS = 24


def opt_config() -> PreTrainedConfig:
    return OPTConfig(
        vocab_size=VOCAB_SIZE,
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


def llama_config() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
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


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {"opt": opt_config, "llama": llama_config}


def training_documents(data_dir: Path) -> list[str]:
    wiki = (data_dir / "wikitext2" / "wiki.train.part.txt").read_text(encoding="utf-8")
    # The part file has blank lines between paragraphs; the raw files, which the model is
    # measured on, have none.
    documents = [wiki.replace("\n\n", "\n")]
    with (data_dir / "c4" / "c4_demo_300.jsonl").open(encoding="utf-8") as lines:
        documents += [json.loads(line)["text"] for i, line in enumerate(lines) if i % 2 == 0]
    return documents


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
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
    return AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)


def learning_rate_share(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: PreTrainedModel, tokens: torch.Tensor, steps: int, lr: float, seed: int, every: int = 0
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
        factor = 1 if step % LONG_EVERY else 2
        length, count = WINDOW * factor, BATCH // factor
        offsets = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
        batch = tokens[offsets + torch.arange(length)]
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
    model = new_model(family, seed)
    train(model, tokens, LONG_EVERY, 0.0, seed)  # the first steps allocate and are slower
    start = time.perf_counter()
    train(model, tokens, TIMED_STEPS, 0.0, seed)
    seconds = (time.perf_counter() - start) / TIMED_STEPS
    print(f"{BATCH * WINDOW / seconds:.0f} tokens/s", flush=True)
    return max(1, int(minutes * 60 / seconds))


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    model.eval()
    # One window at a time: every window has as many predictions, so the mean of means is right.
    losses = [model(input_ids=w[None], labels=w[None], use_cache=False).loss for w in windows]
    return math.exp(torch.stack(losses).mean().item())


def unigram_perplexity(tokens: torch.Tensor, windows: torch.Tensor) -> float:
    """Perplexity, on what the model has to predict, of token counts with add-one smoothing."""
    counts = torch.bincount(tokens, minlength=VOCAB_SIZE).double() + 1
    log_p = (counts / counts.sum()).log()
    return math.exp(-log_p[windows[:, 1:]].mean().item())


README = """\
# {name}

A {parameters:,}-parameter {family} model for Secateur's tests, trained from scratch on a CPU.
It is of no other use.

    python bench/train_tiny.py --family {family} --data-dir DIR --out OUT \\
        --steps {steps} --lr {lr} --seed {seed} --threads {threads}

- Text: WikiText-2 train part and half of a small C4 sample (the documents with an even line
  index), {tokens:,} tokens of a byte-level BPE vocabulary of {vocab} trained on the same text.
- Training: {steps} steps of {step_tokens} tokens, {passes:.1f} passes over the text, in windows of
  {window} tokens (one step in {long_every}: {long_window}); mean loss of the last tenth {loss:.3f}.
- Perplexity on WikiText-2 validation (raw; first {valid_windows} windows of {window} tokens, no
  beginning token, float32 arithmetic on the stored float16 weights): **{valid:.1f}**. Token counts
  of the training text (unigram, add-one smoothing) give {unigram:.1f} on the same tokens.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=sorted(FAMILIES), required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--minutes", type=float, help="choose the steps by time instead")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    documents = training_documents(args.data_dir)
    tokenizer = train_tokenizer(documents)
    tokens = encode(tokenizer, documents)
    print(f"{len(documents)} documents, {len(tokens)} tokens", flush=True)

    steps = args.steps
    if args.minutes is not None:
        steps = steps_within(args.minutes, args.family, tokens, args.seed)
    model = new_model(args.family, args.seed)
    print(f"{model.num_parameters()} parameters, {steps} steps", flush=True)
    loss = train(model, tokens, steps, args.lr, args.seed, every=100)

    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    # Measure what was stored, the way a test opens it.
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    text = (args.data_dir / "wikitext2" / "wiki.valid.raw").read_text(encoding="utf-8")
    valid_ids = tokenizer.encode(text, add_special_tokens=False)[: VALID_WINDOWS * WINDOW]
    windows = torch.tensor(valid_ids).view(VALID_WINDOWS, WINDOW)
    valid, unigram = perplexity(model, windows), unigram_perplexity(tokens, windows)
    readme = README.format(
        name=args.out.name,
        family=args.family,
        parameters=model.num_parameters(),
        steps=steps,
        lr=args.lr,
        seed=args.seed,
        threads=args.threads,
        tokens=len(tokens),
        vocab=VOCAB_SIZE,
        step_tokens=BATCH * WINDOW,
        passes=steps * BATCH * WINDOW / len(tokens),
        window=WINDOW,
        long_every=LONG_EVERY,
        long_window=2 * WINDOW,
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
