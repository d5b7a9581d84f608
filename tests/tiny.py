"""A tiny but real base: a transformers checkpoint with a byte-level tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": 256,
}


def config(architecture: str = "llama") -> PretrainedConfig:
    """`llama` (tied embeddings), `qwen2` (attention biases, untied), `gemma3` (sliding window, extra norms)."""
    shape = _SHAPE | {"vocab_size": 256 + len(_SPECIAL)}
    if architecture == "llama":
        return LlamaConfig(**shape, tie_word_embeddings=True)
    if architecture == "qwen2":
        return Qwen2Config(**shape, tie_word_embeddings=False)
    return Gemma3TextConfig(**shape, sliding_window=8, query_pre_attn_scalar=12, tie_word_embeddings=True)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(_SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_base(folder: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """Write a random base; weights are large enough that greedy answers are decided by clear margins."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_tuned(base: Path, folder: Path, seed: int = 1, scale: float = 0.05) -> Path:
    """Write a "fine-tune": every weight of the base, norms included, moved by seeded noise."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
