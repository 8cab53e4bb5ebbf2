"""Native model families, by the ``model_type`` of their ``config.json``."""

from diffusion_runtime.models.llada import LLaDA, LLaDAConfig

MODELS = {"llada": (LLaDA, LLaDAConfig)}

__all__ = ["MODELS", "LLaDA", "LLaDAConfig"]
