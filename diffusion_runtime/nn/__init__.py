"""Modules over ops: drop-ins for PyTorch's, and the parts that model families are made of."""

from diffusion_runtime.nn.norm import RMSNorm
from diffusion_runtime.nn.rotary import apply_rotary, rotary_table

__all__ = ["RMSNorm", "apply_rotary", "rotary_table"]
