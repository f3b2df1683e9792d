"""SliceGPT step by step for one tiny model, in float64, with no code of the package.

Decoders written out by hand (LLaMA with grouped heads, OPT with LayerNorm), every matrix rotated
and sliced explicitly, in the order of Algorithm 1: the network that the signals come from is the
one with the sliced matrices.
"""

from __future__ import annotations

from typing import Any

import torch

Weights = dict[str, torch.Tensor]


def logits(
    model: Any, calibration: torch.Tensor, tokens: torch.Tensor, kept: int, last: int, alike: bool
) -> torch.Tensor:
    """Logits of ``tokens`` by ``model`` sliced to ``kept``, with statistics of ``calibration``."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    opt = model.config.model_type == "opt"
    d = model.config.hidden_size
    names = _opt_names if opt else _llama_names
    centre = torch.eye(d, dtype=torch.float64)
    if opt:
        centre -= torch.ones(d, d, dtype=torch.float64) / d

    def enter(ids: torch.Tensor) -> torch.Tensor:
        if not opt:
            return w["model.embed_tokens.weight"][ids]
        places = w["model.decoder.embed_positions.weight"][2 : 2 + ids.shape[1]]
        return w["model.decoder.embed_tokens.weight"][ids] + places

    both = [enter(calibration) @ centre, enter(tokens) @ centre]
    basis = _principal(both[0], alike)[:, :kept]
    z = [x @ basis for x in both]
    layers = model.config.num_hidden_layers
    for layer in range(layers):
        parts = names(layer)
        for number, (norm, readers, writer, run) in enumerate(parts):
            g = w[f"{norm}.weight"]
            b = w.get(f"{norm}.bias", torch.zeros_like(g))
            inner = {n: (w[f"{n}.weight"] * g) @ basis for n in readers}
            bias = {n: w[f"{n}.weight"] @ b + w.get(f"{n}.bias", 0.0) for n in readers}
            out = centre @ w[f"{writer}.weight"]
            shift = centre @ w.get(f"{writer}.bias", torch.zeros(d).double())
            full = []
            for x in z:
                eps = 1e-5 if opt else model.config.rms_norm_eps
                n = x / (x.pow(2).sum(-1, keepdim=True) / d + eps).sqrt()
                y = run(model.config, [n @ inner[r].T + bias[r] for r in readers])
                full.append(x @ basis.T + y @ out.T + shift)
            end = layer == layers - 1 and number == len(parts) - 1
            following = _principal(full[0], alike)[:, : last if end else kept]
            shortcut, out, shift = basis.T @ following, following.T @ out, shift @ following
            z = [x @ shortcut + (f - x @ basis.T) @ following for x, f in zip(z, full, strict=True)]
            basis = following
    norm = "model.decoder.final_layer_norm" if opt else "model.norm"
    head = w["lm_head.weight"]
    eps = 1e-5 if opt else model.config.rms_norm_eps
    n = z[1] / (z[1].pow(2).sum(-1, keepdim=True) / d + eps).sqrt()
    found = n @ ((head * w[f"{norm}.weight"]) @ basis).T
    return found + head @ w[f"{norm}.bias"] if opt else found


def _principal(x: torch.Tensor, alike: bool) -> torch.Tensor:
    """Right singular vectors of all tokens, largest first."""
    flat = x.reshape(-1, x.shape[-1])
    if alike:
        flat = flat / flat.pow(2).mean(-1, keepdim=True).sqrt()
    return torch.linalg.svd(flat, full_matrices=True).Vh.T


def _llama_names(layer: int) -> list[Any]:
    block = f"model.layers.{layer}"
    attention = [f"{block}.self_attn.{n}_proj" for n in "qkv"]
    ffn = [f"{block}.mlp.{n}_proj" for n in ("gate", "up")]
    return [
        (f"{block}.input_layernorm", attention, f"{block}.self_attn.o_proj", _rotary_attention),
        (f"{block}.post_attention_layernorm", ffn, f"{block}.mlp.down_proj", _gated),
    ]


def _opt_names(layer: int) -> list[Any]:
    block = f"model.decoder.layers.{layer}"
    attention = [f"{block}.self_attn.{n}_proj" for n in "qkv"]
    return [
        (f"{block}.self_attn_layer_norm", attention, f"{block}.self_attn.out_proj", _attention),
        (f"{block}.final_layer_norm", [f"{block}.fc1"], f"{block}.fc2", _relu),
    ]


def _gated(_: Any, parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.silu(parts[0]) * parts[1]


def _relu(_: Any, parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0].relu()


def _attention(config: Any, parts: list[torch.Tensor], theta: float = 0.0) -> torch.Tensor:
    windows, length, width = parts[0].shape
    size = width // config.num_attention_heads
    q, k, v = (p.reshape(windows, length, -1, size).transpose(1, 2) for p in parts)
    if theta:
        angle = torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2) / size)
        cos, sin = (f(angle.double()).repeat(1, 2) for f in (torch.cos, torch.sin))
        q, k = (
            x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin
            for x in (q, k)
        )
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / size**0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(windows, length, -1)


def _rotary_attention(config: Any, parts: list[torch.Tensor]) -> torch.Tensor:
    return _attention(config, parts, config.rope_parameters["rope_theta"])
