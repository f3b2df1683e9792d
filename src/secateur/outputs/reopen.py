"""Run in a fresh process: open a folder as a user would and compute logits.

``python -m secateur.outputs.reopen FOLDER REFERENCE MODE`` where REFERENCE is a safetensors file
with ``tokens`` (windows, length) and ``logits`` (windows, length, vocabulary). Prints one JSON
object. MODE is ``opened``, or ``trusted`` to let Python code of the folder run; then nothing of the
pruning code is imported. Where the whole model is too much for this machine it is ``streamed``:
read from the files block by block.
"""

from __future__ import annotations

import json
import sys


def opened(folder: str, reference: str, *, trust: bool) -> None:
    """Print the largest difference of logits, and whether cached generation agrees with them."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wanted = load_file(reference)
    tokens, logits = wanted["tokens"], wanted["logits"]
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust, output_loading_info=True
    )
    model.eval()
    with torch.no_grad():
        got = model(input_ids=tokens, use_cache=False).logits
        # Greedy steps with the cache must pick what the full forward pass picks.
        prompt = tokens[:1, : min(16, tokens.shape[1])]
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
        )
        again = model(input_ids=made, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
        chosen = made[0, prompt.shape[1] :]
        gap = again.max(-1).values - again.gather(-1, chosen[:, None])[:, 0]
    result = {
        "max_difference": float((got - logits).abs().max()),
        "max_logit": float(logits.abs().max()),
        "cache_gap": float(gap.max()),
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "model_class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(result))


def streamed(folder: str, reference: str) -> None:
    """The same, one block in memory at a time, and without generation."""
    import torch
    from safetensors.torch import load_file

    from secateur.checkpoint import open_checkpoint
    from secateur.streaming import Stream

    wanted = load_file(reference)
    tokens, logits = wanted["tokens"], wanted["logits"]
    stream = Stream(open_checkpoint(folder))
    parameters = sum(p.numel() for p in stream.model.parameters())  # tied ones once
    hidden = stream.forward(tokens)
    got: list[torch.Tensor] = []
    stream.head(hidden, tokens, lambda _, window: got.append(window))
    result = {
        "max_difference": float((torch.stack(got) - logits).abs().max()),
        "max_logit": float(logits.abs().max()),
        "cache_gap": 0.0,
        "missing": [],
        "unexpected": [],
        "model_class": f"{type(stream.model).__name__}, streamed",
        "parameters": parameters,
    }
    print(json.dumps(result))


def main(folder: str, reference: str, mode: str) -> None:
    """See the top of this file."""
    if mode == "streamed":
        streamed(folder, reference)
    else:
        opened(folder, reference, trust=mode == "trusted")


if __name__ == "__main__":
    main(*sys.argv[1:])
