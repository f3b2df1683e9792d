"""A model as lm-eval wants it. Imports lm-eval, so it is imported only where that is used."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from secateur.progress import Progress


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods of continuations by a model that is open already.

    One sequence at a time: no padding, so a number does not depend on what it was batched with.

    Args:
        model: a transformers causal language model on ``device``.
        tokenizer: of that model; it adds special tokens as it does by itself.
        longest: positions of the model; longer inputs lose their beginning, as in lm-eval.

    Attributes:
        stage: what is shown of the work.
    """

    stage = "zero-shot"

    def __init__(
        self, model: Any, tokenizer: Any, longest: int, device: str, progress: Progress
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._model, self._longest, self._at, self._progress = model, longest, device, progress

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **given)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Sum of log p(continuation | context) and whether greedy decoding would give it."""
        found = []
        seen: list[int] = []
        logs = torch.empty(0)
        self._progress.stage(self.stage, len(requests))
        for _text, context, continuation in requests:
            # The last token is only predicted; what is too long is cut at the left.
            tokens = (context + continuation)[-(self._longest + 1) :][:-1]
            if tokens != seen:  # choices of one token share their input
                inputs = torch.tensor([tokens], device=self._at)
                with torch.no_grad():
                    logits = self._model(input_ids=inputs, use_cache=False).logits[0]
                logs = logits.float().log_softmax(-1)  # (tokens, vocabulary)
                seen = tokens
            wanted = torch.tensor(continuation[-len(tokens) :], device=self._at)
            rows = logs[len(tokens) - len(wanted) :]
            value = rows.gather(1, wanted[:, None]).sum()
            found.append((float(value), bool((rows.argmax(-1) == wanted).all())))
            self._progress.step()
        self._progress.finish()
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("the tasks here compare choices; perplexity is evaluate()'s")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("the tasks here compare choices and generate nothing")
