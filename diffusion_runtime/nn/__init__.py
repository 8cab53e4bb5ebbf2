"""Modules over ops: drop-ins for PyTorch's, and the parts that model families are made of."""

from diffusion_runtime.nn.attention_context import AttentionContext, self_attention
from diffusion_runtime.nn.experts import Experts
from diffusion_runtime.nn.multihead_attention import MultiheadAttention
from diffusion_runtime.nn.norm import LlamaRMSNorm
from diffusion_runtime.nn.replace_modules import Replacement, replace_modules
from diffusion_runtime.nn.rotary import apply_rotary, rotary_angles, rotary_table
from diffusion_runtime.nn.swiglu import SwiGLU
from diffusion_runtime.nn.torch_norm import RMSNorm
from diffusion_runtime.nn.transformer_encoder_layer import TransformerEncoderLayer

__all__ = [
    "AttentionContext",
    "Experts",
    "LlamaRMSNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Replacement",
    "SwiGLU",
    "TransformerEncoderLayer",
    "apply_rotary",
    "replace_modules",
    "rotary_angles",
    "rotary_table",
    "self_attention",
]
