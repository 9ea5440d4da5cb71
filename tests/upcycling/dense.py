"""Tiny random dense models, one for each way in which a family can differ, saved as a user would have them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

COMMON = {
    "vocab_size": 258,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

# name → model type and what differs from COMMON.
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 16}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": 8, "head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "layer_types": LAYERS,
            "sliding_window": 8,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "layer_types": LAYERS,
            "sliding_window": 8,
            "query_pre_attn_scalar": 10,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", {}),
    "phi3_partial": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "phi3_longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
            },
        },
    ),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.22,
            "logits_scaling": 2.0,
        },
    ),
    "granite_biases": ("granite", {"attention_bias": True, "residual_multiplier": 0.5}),
}


def dense_model(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random model in evaluation mode, with norms and biases that are not their neutral values."""
    model_type, differences = DENSE[name]
    config = AutoConfig.for_model(model_type, **{**COMMON, **differences, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save_dense(folder: Path, name: str = "llama3", tokenizer: bool = False, dtype: Any = None, **changes: Any) -> Path:
    """Save such a model, with a byte tokenizer and chat template on request."""
    shards = changes.pop("max_shard_size", "1GB")
    dense_model(name, **changes).to(dtype or torch.float32).save_pretrained(folder, max_shard_size=shards)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def random_ids(length: int = 24, batch: int = 2) -> torch.Tensor:
    """Token ids of a tiny model."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(7))
