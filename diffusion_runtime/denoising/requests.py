"""What is asked of the loop, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_runtime.constraints import Automaton
from diffusion_runtime.decoding import Policy


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence to denoise. What is None is as the :class:`~diffusion_runtime.Denoiser` has it.

    Args:
        tokens: ``[length]`` int64, or a list: the prompt. Positions that hold the mask token are filled, wherever they
            are; all others are kept.
        max_new_tokens: so many undecided positions are put behind it.
        min_new_tokens: before so many of them no stop token is drawn.
        revisable: ``[length]`` bool: decided positions of ``tokens`` that a policy which revises may change: a draft.
        seed: of this request's draws, at most 64 bits.
        policy, num_steps, steps_per_block, temperature, top_k, top_p, min_p, suppress, stop_token_ids: see
            :class:`~diffusion_runtime.Denoiser`.
        stop: called after each block with the new tokens that are decided so far, from the left without a gap; returns
            how many of them to keep if that is the end, else None. See :func:`stop_strings`.
        allowed: ``[length + max_new_tokens, vocab]`` bool: which tokens each undecided position may be given.
        constraint: a language (:mod:`diffusion_runtime.constraints`) of which the text must be from the first undecided
            position to the last, or to a stop token. Whatever the order in which tokens are decided, one is only where
            the rest can be completed. The host then waits for the device once a step.
        name: anything, to know the result by.
    """

    tokens: Tensor | Sequence[int]
    max_new_tokens: int = 0
    min_new_tokens: int = 0
    revisable: Tensor | None = None
    seed: int = 0
    policy: str | Policy | None = None
    num_steps: int | None = None
    steps_per_block: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    suppress: Sequence[int] | None = None
    stop_token_ids: Sequence[int] | None = None
    stop: Callable[[list[int]], int | None] | None = None
    allowed: Tensor | None = None
    constraint: Automaton | None = None
    name: Any = None

    def __post_init__(self) -> None:
        tokens = torch.as_tensor(self.tokens)
        if tokens.ndim != 1 or (tokens.dtype != torch.int64 and len(tokens)):
            raise ValueError(f"tokens must be [length] int64, got {tuple(tokens.shape)} {tokens.dtype}")
        object.__setattr__(self, "tokens", tokens.long())
        for name in ("max_new_tokens", "min_new_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be at most max_new_tokens, got {self.min_new_tokens} and {self.max_new_tokens}"
            )
        if len(tokens) + self.max_new_tokens == 0:
            raise ValueError("there is nothing in tokens, and max_new_tokens is 0")
        for name in ("num_steps", "steps_per_block"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        check_draws(self.temperature, self.top_k, self.top_p, self.min_p)
        if self.revisable is not None and (self.revisable.dtype != torch.bool or self.revisable.shape != tokens.shape):
            raise ValueError(
                f"revisable must be {tuple(tokens.shape)} bool, got {tuple(self.revisable.shape)} "
                f"{self.revisable.dtype}"
            )
        if (allowed := self.allowed) is not None and (
            allowed.dtype != torch.bool or allowed.ndim != 2 or len(allowed) != len(tokens) + self.max_new_tokens
        ):
            raise ValueError(
                f"allowed must be [{len(tokens) + self.max_new_tokens}, vocab] bool, got {tuple(allowed.shape)} "
                f"{allowed.dtype}"
            )
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be an int of at most 64 bits, got {self.seed!r}")

    def with_masks(self, mask_token_id: int) -> Tensor:
        """``[length + max_new_tokens]`` int64: the prompt, and undecided positions behind it."""
        return torch.nn.functional.pad(torch.as_tensor(self.tokens), (0, self.max_new_tokens), value=mask_token_id)

    @property
    def signed_seed(self) -> int:
        """The seed as an int64 holds it."""
        return _signed(self.seed)


@dataclass(frozen=True, eq=False)
class Result:
    """What became of a request."""

    request: Request
    tokens: Tensor  # [length + max_new_tokens] int64; behind a stop token copies of it
    new_tokens: list[int]  # what was put behind the prompt, up to and without what ended it
    finish_reason: str  # "length", or "stop": a stop token or the request's own stop
    num_forwards: int  # of the model, that this request took part in


def stop_strings(decode: Callable[[list[int]], str], strings: Sequence[str]) -> Callable[[list[int]], int | None]:
    """A :attr:`Request.stop` that ends an answer before the first of these strings in its text.

    Args:
        decode: token ids to text, of a tokenizer.
        strings: at least one, none of them empty.

    Returns:
        a function of token ids that gives the most tokens whose text has none of the strings, or None.
    """
    if not strings or not all(strings):
        raise ValueError(f"strings must be at least one, and not empty, got {list(strings)}")

    def stop(tokens: list[int]) -> int | None:
        if not any(string in decode(tokens) for string in strings):
            return None
        # the text of a start of the tokens may end inside a character, so it is looked for from the left
        return next(n - 1 for n in range(1, len(tokens) + 1) if any(s in decode(tokens[:n]) for s in strings))

    return stop


def seeds_of(seed: Tensor | int, tokens: Tensor) -> Tensor:
    """The seed of each row of ``tokens``: ``[batch]`` int64.

    Raises:
        ValueError, TypeError: anything but an int of at most 64 bits or such a tensor.
    """
    if not isinstance(seed, Tensor | int):
        raise TypeError(f"seed must be an int or a tensor, got {type(seed).__name__}")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must have at most 64 bits, got {seed}")
        seed = torch.tensor(_signed(seed), device=tokens.device).expand(len(tokens))
    if seed.dtype != torch.int64 or seed.shape != tokens.shape[:1]:
        raise ValueError(f"seed must be an int or [{len(tokens)}] int64, got {tuple(seed.shape)} {seed.dtype}")
    return seed


def check_draws(temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    """Settings of draws, where they are said.

    Raises:
        ValueError: one that is outside of its range.
    """
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}")


def check_prompts(tokens: Tensor, max_new_tokens: int | None, mask_token_id: int) -> None:
    """Prompts of one length, and without masks where something is put behind them.

    Raises:
        ValueError: anything else.
    """
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be [batch, length] int64, got {tuple(tokens.shape)} {tokens.dtype}")
    if max_new_tokens is None:
        return
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if (tokens == mask_token_id).any():
        raise ValueError(f"the prompt holds the mask token {mask_token_id}; infill fills masked positions")


def _signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed
