"""A GGUF file, run by llama.cpp in a process of its own, against the torch model it stands for.

Nothing of the torch side needs the whole model in memory. Whether llama.cpp writes the text that
torch would write is asked the other way round: llama.cpp writes, and torch, block by block over all
texts at once, says for each of its tokens whether that had been its own choice too.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.calibration import check_vocabulary, consecutive_windows, encode, load_text
from secateur.errors import VerifyError
from secateur.outputs import llama_cpp
from secateur.progress import Progress
from secateur.streaming import Stream

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "To bake a loaf of bread, first",
    "The three largest planets are",
    "def add(a, b):\n    return",
)
#: Tokens that llama.cpp writes after each prompt.
NEW_TOKENS = 64
#: A token counts as torch's choice if its logit is this close to the largest, as a share of it:
#: float32 noise of deep sums.
TIE = 1e-3
#: Largest relative difference of perplexity by type of the weights; narrower types report theirs.
ALLOWED = {"F32": 0.001, "F16": 0.005, "BF16": 0.005, "Q8_0": 0.05}


@dataclass(frozen=True)
class GgufVerification:
    """What llama.cpp made of a file.

    Attributes:
        kind: type that most of the weights have.
        chosen, asked: tokens that were torch's choice too, of all that llama.cpp wrote.
        perplexity, reference: on the same windows, by llama.cpp and by torch.
        protocol: which windows.
        against: what the reference is.
    """

    kind: str
    chosen: int
    asked: int
    perplexity: float
    reference: float
    protocol: str
    against: str

    @property
    def loss(self) -> float:
        """Relative difference of perplexity."""
        return self.perplexity / self.reference - 1

    def text(self) -> str:
        """One line for the user."""
        return (
            f"run by llama.cpp ({self.kind.lower()}): {self.chosen} of {self.asked} greedy tokens "
            f"are torch's own choice, perplexity {self.perplexity:.3f} against "
            f"{self.reference:.3f} ({self.loss:+.2%}) of {self.against}; {self.protocol}"
        )


def verify_gguf(
    file: Path,
    reference: Stream,
    *,
    against: str,
    windows: int = 4,
    length: int = 256,
    progress: Progress | None = None,
) -> GgufVerification:
    """Run ``file`` in llama.cpp and compare it with a torch model.

    Args:
        reference: the torch model, for example of the folder that the file was exported from.
        against: what to call it.
        windows, length: of the built-in evaluation text, for the perplexity; windows are no longer
            than the model's positions.

    Raises:
        VerifyError: a float32 file does not write what torch would write, or the perplexity of a
            file of floats is off by more than half a percent.
        OutputError: llama.cpp refuses the file, or is not installed.
    """
    llama_cpp.require("verifying a GGUF file")
    progress = progress or Progress()
    tokenizer, config = reference.checkpoint.tokenizer, reference.checkpoint.config
    check_vocabulary(tokenizer, int(config.vocab_size))
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    prompts = [encode(tokenizer, text).tolist() for text in PROMPTS]
    if llama_cpp.tokenize(file, PROMPTS) != prompts:
        raise VerifyError(
            f"{file} splits text into other tokens than the tokenizer of {against}: it is of "
            "another model, or its tokenizer keys are wrong for this one; then please report"
        )
    progress.stage("verifying in llama.cpp", 4)
    written = llama_cpp.greedy(file, prompts, NEW_TOKENS)
    if max(map(max, written)) >= int(config.vocab_size):
        raise VerifyError(f"{file} writes tokens that {against} has not: it is of another model")
    progress.step("wrote texts")
    gaps, largest = _gaps(reference, prompts, written)
    progress.step("torch read them")
    found = consecutive_windows(
        load_text("builtin", use="evaluation"), tokenizer, length=length, most=windows
    )
    losses = llama_cpp.losses(file, found.tokens.tolist())
    mine = _perplexity(sum(map(sum, losses)) / sum(map(len, losses)))
    progress.step("perplexity in llama.cpp")
    hidden = reference.forward(found.tokens)
    theirs = _perplexity(float(reference.losses(hidden, found.tokens).mean()))
    progress.step("perplexity in torch")
    progress.finish()
    result = GgufVerification(
        kind=weight_type(file),
        chosen=int((gaps <= TIE * max(1.0, largest)).sum()),
        asked=gaps.numel(),
        perplexity=mine,
        reference=theirs,
        protocol=f"{found.origin}, {len(found.tokens)} windows of {length} tokens",
        against=against,
    )
    _judge(file, result)
    return result


def _perplexity(loss: float) -> float:
    """exp of a mean loss; of damaged weights it may be beyond all numbers."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf


def _judge(file: Path, found: GgufVerification) -> None:
    if found.kind == "F32" and found.chosen < found.asked:
        raise VerifyError(
            f"{file} writes another text than {found.against}: {found.asked - found.chosen} of "
            f"{found.asked} greedy tokens are not torch's choice"
        )
    if not (math.isfinite(found.perplexity) and math.isfinite(found.reference)):
        raise VerifyError(
            f"{file} has perplexity {found.perplexity:.3g} in llama.cpp, {found.against} "
            f"{found.reference:.3g} in torch: its weights are damaged"
        )
    allowed = ALLOWED.get(found.kind)
    if allowed is not None and not abs(found.loss) <= allowed:
        raise VerifyError(
            f"{file} has perplexity {found.perplexity:.3f} in llama.cpp, {found.against} "
            f"{found.reference:.3f} in torch: {found.loss:+.2%}, allowed are {allowed:.1%}"
        )


def _gaps(
    reference: Stream, prompts: list[list[int]], written: list[list[int]]
) -> tuple[torch.Tensor, float]:
    """How far below torch's largest logit each written token lies, and the largest logit of all.

    Texts of different lengths stand in one batch: what follows a token does not change it.
    """
    texts = [a + b for a, b in zip(prompts, written, strict=True)]
    longest = max(map(len, texts))
    tokens = torch.tensor([text + [text[-1]] * (longest - len(text)) for text in texts])
    gaps: list[torch.Tensor] = []
    largest = 0.0

    def look(window: int, logits: torch.Tensor) -> None:
        nonlocal largest
        start, made = len(prompts[window]), torch.tensor(written[window])
        rows = logits[start - 1 : start - 1 + len(made)].cpu()
        gaps.append(rows.max(-1).values - rows.gather(-1, made[:, None])[:, 0])
        largest = max(largest, float(rows.abs().max()))

    reference.head(reference.forward(tokens), tokens, look)
    return torch.cat(gaps), largest


def weight_type(file: Path) -> str:
    """The type that most values of the matrices have, such as ``F16`` or ``Q4_K``."""
    from gguf import GGUFReader

    counts: dict[str, int] = {}
    for tensor in GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            name = tensor.tensor_type.name
            counts[name] = counts.get(name, 0) + int(tensor.n_elements)
    return max(counts, key=lambda name: counts[name])
