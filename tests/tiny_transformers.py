"""Tiny models of transformers with random weights, and batches for them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB, PAD = 64, 0
BATCH, LENGTH, WINDOW = 3, 12, 5
PADDED = (0, 4, 9)  # how many tokens of each sequence are padding

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 16}
SLIDING = GROUPED | {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

# name: (model, configuration, its arguments)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", COMMON | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        COMMON | {"local_attention": 2 * WINDOW, "layer_types": SLIDING["layer_types"], "cls_token_id": 1},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SLIDING | {"attn_logit_softcapping": 0.5}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SLIDING),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        SLIDING | {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": {"rope_type": "default"}},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        GROUPED
        | {
            "intermediate_size_mlp": 48,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "moe_layers": [],
            "num_local_experts": 2,
        },
    ),
}
ENCODERS = ("bert", "modernbert")
DECODERS = tuple(name for name in MODELS if name not in ENCODERS)


@functools.cache
def _config(name: str) -> Any:
    _, config, arguments = MODELS[name]
    return getattr(transformers, config)(**arguments)


def make(name: str, attention: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model with the same weights whenever it is made, wide enough that attention matters."""
    model, config, arguments = MODELS[name]
    return build(getattr(transformers, model), getattr(transformers, config)(**arguments | changes), attention, dtype)


def build(kind: Any, config: Any, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    model = kind._from_config(config, attn_implementation=attention).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or "sinks" in name:
            torch.nn.init.normal_(weight.data, std=0.4)
    return model.to(dtype)


def tokens(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(2))


def padding_mask(side: str, length: int = LENGTH) -> Tensor:
    """``[batch, length]``, 1 where a token is real."""
    place = torch.arange(length)
    counts = torch.tensor(PADDED)[:, None]
    return (place >= counts if side == "left" else place < length - counts).long()


def run(model: Any, **inputs: Any) -> Tensor:
    """Hidden states of an encoder, logits of a decoder."""
    out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state
