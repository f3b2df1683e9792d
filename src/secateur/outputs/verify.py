"""The definition of done: reopen in a fresh process, compare with the plan applied as zeros."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.calibration import encode, load_text
from secateur.errors import VerifyError
from secateur.estimate import BASE
from secateur.masking import masked_hidden
from secateur.plans import Plan
from secateur.rotation.original import ProjectedOriginal
from secateur.rotation.plan import RotationPlan
from secateur.scratch import scratch
from secateur.streaming import Stream

#: Largest difference allowed, as a share of the largest logit: float32 noise of deep sums.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verification:
    """What the fresh process found.

    Attributes:
        max_difference: largest difference of a logit.
        max_logit: largest logit, for scale.
        model_class: class that transformers opened the folder with.
        parameters: its number of parameters.
    """

    max_difference: float
    max_logit: float
    model_class: str
    parameters: int

    def text(self) -> str:
        return (
            f"reopened in a fresh process as {self.model_class}: largest logit difference "
            f"{self.max_difference:.2e} (logits up to {self.max_logit:.1f})"
        )


def verify_folder(
    folder: Path,
    stream: Stream,
    plan: Plan,
    dtype: torch.dtype,
    *,
    memory: int | None = None,
    trust_remote_code: bool = True,
) -> Verification:
    """Open ``folder`` in a fresh process and compare it with the plan in the original's shapes.

    That is zeros and scales, or for a sliced hidden width projections of the stream.

    Args:
        memory: bytes that the fresh process may use; by default what is free now. Where the whole
            model in float32 does not fit, it is streamed instead of opened by transformers.
        trust_remote_code: whether the fresh process may run Python code of the folder.

    Raises:
        VerifyError: it does not open, weights are missing, or logits differ.
    """
    tokens = _tokens(stream)
    logits: list[torch.Tensor] = []
    if isinstance(plan, RotationPlan):
        stream = ProjectedOriginal(stream, plan, dtype)
        hidden = stream.forward(tokens)
    else:
        hidden = masked_hidden(stream, plan, tokens, dtype)
    stream.head(hidden, tokens, lambda _, window: logits.append(window.cpu()), dtype=dtype)
    parameters = plan.sizes().parameters
    return _compare(folder, tokens, torch.stack(logits), parameters, memory, trust_remote_code)


def verify_itself(
    folder: Path, stream: Stream, *, memory: int | None = None, trust_remote_code: bool = False
) -> Verification:
    """Open ``folder`` in a fresh process and compare it with the same files read block by block.

    Args:
        stream: of the same folder.
        memory, trust_remote_code: as for :func:`verify_folder`.

    Raises:
        VerifyError: it does not open, weights are missing, or logits differ.
    """
    tokens = _tokens(stream)
    logits: list[torch.Tensor] = []
    hidden = stream.forward(tokens)
    stream.head(hidden, tokens, lambda _, window: logits.append(window.cpu()))
    parameters = sum(p.numel() for p in stream.stored_parameters().values())
    return _compare(folder, tokens, torch.stack(logits), parameters, memory, trust_remote_code)


def _compare(
    folder: Path,
    tokens: torch.Tensor,
    logits: torch.Tensor,
    parameters: int,
    memory: int | None,
    trust: bool,
) -> Verification:
    """Let a fresh process open the folder and compare its logits with these."""
    with scratch() as temporary:
        from safetensors.torch import save_file

        reference = temporary / "reference.safetensors"
        save_file({"tokens": tokens, "logits": logits}, reference)
        # The shipped modelling file is copied by transformers; not into the user's cache.
        whole = 4 * parameters + BASE
        mode = "streamed" if whole > (memory or _free_memory()) else "opened"
        if trust and mode == "opened":
            mode = "trusted"
        environment = {**os.environ, "HF_MODULES_CACHE": str(temporary), "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(
            [sys.executable, "-m", "secateur.outputs.reopen", str(folder), str(reference), mode],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    if run.returncode != 0:
        reason = (run.stderr.strip().splitlines() or ["no output"])[-1]
        raise VerifyError(f"the written model {folder} does not open in a fresh process: {reason}")
    found = json.loads(run.stdout.strip().splitlines()[-1])
    if found["missing"] or found["unexpected"]:
        raise VerifyError(
            f"the written model {folder} opens, but transformers misses {found['missing'][:3]} and "
            f"does not expect {found['unexpected'][:3]}"
        )
    worst = max(found["max_difference"], found["cache_gap"])
    if not worst <= TOLERANCE * max(1.0, found["max_logit"]):
        raise VerifyError(
            f"the written model {folder} computes something else than its plan: logits differ by "
            f"{found['max_difference']:.3g}, cached generation by {found['cache_gap']:.3g} "
            f"(largest logit {found['max_logit']:.3g})"
        )
    if found["parameters"] != parameters:
        raise VerifyError(
            f"the written model {folder} has {found['parameters']:,} parameters, its plan says "
            f"{parameters:,}"
        )
    return Verification(
        found["max_difference"], found["max_logit"], found["model_class"], found["parameters"]
    )


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _tokens(stream: Stream) -> torch.Tensor:
    """Two windows of up to 48 tokens of the evaluation passages."""
    text = load_text("builtin", use="evaluation")
    pieces = [encode(stream.checkpoint.tokenizer, t)[:48] for t in text.documents[:2]]
    length = min(len(piece) for piece in pieces)
    return torch.stack([piece[:length] for piece in pieces])
