"""Tiny random models, built in code: every family and every trait that matters to a writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 300
#: name -> (transformers model type, settings). Adding a family means adding an entry.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa-tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-mha-untied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama-biases": (
        "llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "opt-project": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 16, "dropout": 0.0}),
}
#: The same of families without attention.
STATE_SPACE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"state_size": 4, "time_step_rank": 5, "expand": 2}),
    "mamba-biases": ("mamba", {"state_size": 4, "use_bias": True, "use_conv_bias": False}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}),
    "mamba2-groups": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2}),
}


def make_model(name: str, layers: int = 4, seed: int = 0) -> Any:
    """A random model with weights large enough that its logits differ from token to token."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model_type, settings = {**MODELS, **STATE_SPACE}[name]
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if model_type.startswith("mamba"):
        for key in ("num_attention_heads", "max_position_embeddings"):
            del common[key]
        settings = {"chunk_size": 16, **settings} if model_type == "mamba2" else settings
    elif model_type != "opt":
        common["intermediate_size"] = 48
    config = CONFIG_MAPPING[model_type](**{**common, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_tokenizer() -> Any:
    """A byte-level tokenizer that knows every text and ids below :data:`VOCABULARY`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def write_model(folder: Path, name: str, **settings: Any) -> Path:
    """Write the model and the tokenizer as a user would have them on disk."""
    make_model(name, **settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
