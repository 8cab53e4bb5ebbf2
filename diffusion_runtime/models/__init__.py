"""Native model families, by the ``model_type`` of their ``config.json``.

A family is a class of :class:`LanguageModel` and one of :class:`ModelConfig`. Put the pair into :data:`MODELS`, and
:func:`diffusion_runtime.load` knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusion_runtime.models._config import ModelConfig
from diffusion_runtime.models._language_model import Head, KeyShape, LanguageModel
from diffusion_runtime.models.wrapped import Wrapped, wrap

if TYPE_CHECKING:
    from diffusion_runtime.models.bd3lm import BD3LM, BD3LMConfig
    from diffusion_runtime.models.dream import Dream, DreamConfig
    from diffusion_runtime.models.fast_dllm import FastDLLM, FastDLLMConfig
    from diffusion_runtime.models.llada import LLaDA, LLaDAConfig
    from diffusion_runtime.models.llada2 import LLaDA2, LLaDA2Config
    from diffusion_runtime.models.llada_moe import LLaDAMoE, LLaDAMoEConfig
    from diffusion_runtime.models.mdlm import MDLM, MDLMConfig
    from diffusion_runtime.models.sdar import SDAR, SDARConfig, SDARMoE, SDARMoEConfig

Family = tuple[type[LanguageModel], type[ModelConfig]]

# a family, or the name of its model's class, which is imported when it is asked for
MODELS: dict[str, Family | str] = {
    "Dream": "Dream",
    "Fast_dLLM_Qwen": "FastDLLM",
    "bd3lm": "BD3LM",
    "llada": "LLaDA",
    "llada2_moe": "LLaDA2",
    "lladamoe": "LLaDAMoE",
    "mdlm": "MDLM",
    "sdar": "SDAR",
    "sdar_moe": "SDARMoE",
}
_FILES = {
    "BD3LM": "bd3lm",
    "Dream": "dream",
    "FastDLLM": "fast_dllm",
    "LLaDA": "llada",
    "LLaDA2": "llada2",
    "LLaDAMoE": "llada_moe",
    "MDLM": "mdlm",
    "SDAR": "sdar",
    "SDARMoE": "sdar",
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a ``config.json`` belongs to.

    Raises:
        ValueError: an unknown ``model_type``; the message lists those that are known.
    """
    model_type = config.get("model_type")
    if model_type == "llada" and "num_experts" in config:  # the name of two families
        model_type = "lladamoe"
    if model_type not in MODELS:
        raise ValueError(f"unknown model_type {model_type!r}; known are {', '.join(MODELS)}")
    family = MODELS[model_type]
    return (__getattr__(family), __getattr__(f"{family}Config")) if isinstance(family, str) else family


def __getattr__(name: str) -> Any:
    model = name.removesuffix("Config")
    if model not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[model]}"), name)


__all__ = [
    "BD3LM",
    "MDLM",
    "MODELS",
    "SDAR",
    "BD3LMConfig",
    "Dream",
    "DreamConfig",
    "Family",
    "FastDLLM",
    "FastDLLMConfig",
    "Head",
    "KeyShape",
    "LLaDA",
    "LLaDA2",
    "LLaDA2Config",
    "LLaDAConfig",
    "LLaDAMoE",
    "LLaDAMoEConfig",
    "LanguageModel",
    "MDLMConfig",
    "ModelConfig",
    "SDARConfig",
    "SDARMoE",
    "SDARMoEConfig",
    "Wrapped",
    "family_of",
    "wrap",
]
