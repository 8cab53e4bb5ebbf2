"""What ``sample_tokens`` and ``sample_from_hidden`` are told about their rows, checked once for both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.ops._restriction import allowed_words
from diffusion_runtime.ops._rows import Setting, float_setting, int_setting, mask_setting


class Settings(NamedTuple):
    """The arguments as backends take them; a tensor has one element for each row, a number counts for every row."""

    masked: Tensor | None = None
    temperature: Tensor | float = 0.0
    seed: Tensor | int = 0
    position: Tensor | None = None
    step: Tensor | int = 0
    statistics_temperature: Tensor | float = 1.0
    softcap: float = 0.0  # 0: none
    allowed: Tensor | None = None  # [rows, ceil(vocab / 32)] int32, stride 1 along the words, any along the rows
    top_k: Tensor | int = 0  # 0: none
    top_p: Tensor | float = 1.0  # 1: none
    min_p: Tensor | float = 0.0  # 0: none
    restricted: bool = False  # the statistics are those of the tokens that may be drawn

    @property
    def cuts(self) -> bool:
        """Whether a row may be cut by the size of its logits: by top_k, top_p or min_p."""
        off = ((self.top_k, 0), (self.top_p, 1.0), (self.min_p, 0.0))
        return any(isinstance(value, Tensor) or value != nothing for value, nothing in off)

    @property
    def limits(self) -> bool:
        """Whether any row may be kept from drawing any token."""
        return self.allowed is not None or self.cuts

    def of_rows(self, rows: Tensor | slice) -> Settings:
        """The settings of some of the rows."""
        return Settings(*(value[rows] if isinstance(value, Tensor) else value for value in self))  # type: ignore[arg-type]


def read_settings(
    leading: torch.Size,
    vocab: int,
    device: torch.device,
    *,
    temperature: Tensor | float,
    seed: Tensor | int | None,
    position: Tensor | None,
    step: Tensor | int,
    masked: Tensor | None,
    statistics_temperature: Tensor | float,
    softcap: float | None,
    allowed: Tensor | None,
    suppress: Sequence[int] | None,
    top_k: Tensor | int | None,
    top_p: Tensor | float | None,
    min_p: Tensor | float | None,
    statistics: str,
) -> Settings:
    """Check every argument of that name of :func:`diffusion_runtime.ops.sample_tokens`."""
    if statistics not in ("unrestricted", "restricted"):
        raise ValueError(f"statistics must be 'unrestricted' or 'restricted', got {statistics!r}")
    settings = Settings(
        masked=mask_setting("masked", masked, leading, device),
        temperature=float_setting("temperature", temperature, leading, device),
        seed=0 if seed is None else int_setting("seed", seed, leading, device, 64),
        position=None if position is None else position_setting(position, leading, device),
        step=int_setting("step", step, leading, device, 32),
        statistics_temperature=float_setting(
            "statistics_temperature", statistics_temperature, leading, device, zero=False
        ),
        softcap=softcap_setting(softcap),
        allowed=allowed_words(leading, vocab, device, allowed, suppress),
        top_k=0 if top_k is None else int_setting("top_k", top_k, leading, device, 31),
        top_p=1.0 if top_p is None else float_setting("top_p", top_p, leading, device, most=1.0),
        min_p=0.0 if min_p is None else float_setting("min_p", min_p, leading, device, most=1.0),
        restricted=statistics == "restricted",
    )
    if seed is None and _may_draw(settings.temperature):
        raise ValueError(f"seed is needed to draw at temperature {temperature}")
    return settings


def softcap_setting(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    if isinstance(softcap, bool) or not isinstance(softcap, int | float):
        raise TypeError(f"softcap must be a float or None, got {type(softcap).__name__}")
    if not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be None or finite and above 0, got {softcap}")
    return float(softcap)


def position_setting(position: Tensor, leading: torch.Size, device: torch.device) -> Tensor:
    if not isinstance(position, Tensor):
        raise TypeError(f"position must be an int64 tensor, got {type(position).__name__}")
    return int_setting("position", position, leading, device, 32)  # type: ignore[return-value]


def _may_draw(temperature: Setting) -> bool:
    if not isinstance(temperature, Tensor):
        return temperature > 0
    if temperature.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return bool((temperature > 0).any())


def to_operator(settings: Settings) -> list[Any]:
    """Settings as an operator of ``_library.py`` takes them: a setting is a tensor or None, then a number."""
    arguments: list[Any] = []
    for name, value in zip(Settings._fields, settings, strict=True):
        if name in _TENSOR_OR_NUMBER:
            arguments += [value, 0] if isinstance(value, Tensor) else [None, value]
        else:
            arguments.append(value)
    return arguments


def from_operator(arguments: tuple[Any, ...]) -> Settings:
    """The inverse of :func:`to_operator`."""
    values = iter(arguments)
    settings = []
    for name in Settings._fields:
        value = next(values)
        if name in _TENSOR_OR_NUMBER:
            number = next(values)
            value = number if value is None else value
        settings.append(value)
    return Settings(*settings)


_TENSOR_OR_NUMBER = ("temperature", "seed", "step", "statistics_temperature", "top_k", "top_p", "min_p")
