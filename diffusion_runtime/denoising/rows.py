"""A request on its way: the settings that hold for it and the blocks it has still to do, on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion_runtime.constraints import Automaton
from diffusion_runtime.decoding import Policy, UniformDiffusion, as_policy
from diffusion_runtime.denoising.constrained import Constrained
from diffusion_runtime.denoising.requests import Request, Result, check_draws


@dataclass(frozen=True, eq=False)
class Defaults:
    """What holds for requests that do not say otherwise; see :class:`diffusion_runtime.Denoiser`."""

    policy: Policy | UniformDiffusion
    num_steps: int | None
    steps_per_block: int | None
    block_length: int | None
    absolute: bool  # blocks lie on the grid that begins at the first token
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    suppress: Sequence[int]
    stop_token_ids: Sequence[int]
    constraint: Automaton | None

    def __post_init__(self) -> None:
        for name in ("num_steps", "steps_per_block", "block_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        check_draws(self.temperature, self.top_k, self.top_p, self.min_p)
        if isinstance(self.policy, Policy):
            check_num_steps(self.num_steps, self.steps_per_block, self.policy)


@dataclass(eq=False)
class Row:
    """A request on its way: the settings that hold for it, and its blocks, on the host."""

    request: Request
    policy: Policy
    length: int  # prompt and answer
    blocks: list[slice]  # still to do, the current one first
    steps_per_block: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    suppress: frozenset[int]
    stop_token_ids: frozenset[int]
    constrained: Constrained | None = None
    num_forwards: int = 0
    index: int = 0  # steps taken in the current block
    num_new_tokens: int | None = None  # where the answer stopped by itself
    pages: list[int] = field(default_factory=list)  # of the cache
    guide_pages: list[int] = field(default_factory=list)  # those of the branch without what is given
    kept: int = 0  # positions whose keys the cache has
    num_steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_steps = self._steps()

    def next_block(self) -> None:
        """On to the block behind the current one."""
        self.blocks = self.blocks[1:]
        self.index = 0
        self.num_steps = self._steps()

    def stop(self, tokens: Tensor, mask_token_id: int) -> None:
        """End here if what is decided so far, from the left without a gap, says so; a stop token is repeated behind."""
        if not self.stop_token_ids and self.request.stop is None:
            return
        new: list[int] = tokens[self.prompt_length : self.length].tolist()
        decided = new[: new.index(mask_token_id)] if mask_token_id in new else new
        place = next((i for i, token in enumerate(decided) if token in self.stop_token_ids), None)
        if place is not None:
            tokens[self.prompt_length + place : self.length] = decided[place]
        elif self.request.stop is not None:
            place = self.request.stop(decided)
        if place is not None:
            self.num_new_tokens = place
            self.blocks = []

    @property
    def fixed_steps(self) -> bool:
        """Whether a block is over after its steps; what a constraint left undecided takes further ones."""
        return self.policy.scheduled and self.constrained is None

    def check_progress(self, live: bool) -> None:
        """A policy that decides itself when it is done has to be done some time."""
        if live and self.blocks and not self.policy.scheduled and self.index > self.most_steps:
            raise RuntimeError(
                f"the policy has not finished the block from {self.blocks[0].start} to {self.blocks[0].stop} in "
                f"{self.index} steps: its rule must change something in every step, or say that it is finished"
            )

    @property
    def most_steps(self) -> int:
        """Of a block, before a policy that decides itself when it is done is taken to be stuck."""
        positions: int = self.blocks[0].stop - self.blocks[0].start
        return 64 * (1 + positions)

    def _steps(self) -> int:
        if not self.blocks:
            return 0
        return self.steps_per_block or self.blocks[0].stop - self.blocks[0].start

    @property
    def prompt(self) -> list[int]:
        """The tokens of the request."""
        tokens: list[int] = torch.as_tensor(self.request.tokens).tolist()
        return tokens

    @property
    def prompt_length(self) -> int:
        """Where the new tokens begin."""
        return self.length - self.request.max_new_tokens


def row_of(request: Request, defaults: Defaults, tokens: list[int], mask_token_id: int) -> Row:
    """A request with the settings that hold for it.

    Args:
        tokens: of its positions, the new ones included.
        mask_token_id: where undecided.
    """

    def own(name: str) -> Any:
        value = getattr(request, name)
        return getattr(defaults, name) if value is None else value

    policy = defaults.policy if request.policy is None else as_policy(request.policy)
    if not isinstance(policy, Policy):
        raise ValueError("a request cannot have uniform diffusion as its policy")
    num_steps, per_block = request.num_steps, request.steps_per_block
    if policy.scheduled and num_steps is None and per_block is None:
        num_steps, per_block = defaults.num_steps, defaults.steps_per_block
    check_num_steps(num_steps, per_block, policy)
    changing = [token == mask_token_id for token in tokens]
    prompt_length = len(tokens) - request.max_new_tokens
    if request.revisable is not None:
        if not (policy.revises or policy.remasks):
            raise ValueError("revisable needs a policy that changes what is decided: one that revises or remasks")
        for position in request.revisable.nonzero()[:, 0].tolist():
            changing[position] = True
    if request.min_new_tokens and not own("stop_token_ids"):
        raise ValueError("min_new_tokens needs stop_token_ids, which are what it holds back")
    start = 0 if any(changing[:prompt_length]) or not request.max_new_tokens else prompt_length
    suppress, stops = frozenset(own("suppress")), frozenset(own("stop_token_ids"))
    constrained = None
    if (constraint := own("constraint")) is not None and mask_token_id in tokens:
        constrained = Constrained(constraint, request, policy, tokens, mask_token_id, suppress, stops)
    blocks = blocks_between(start, len(tokens), defaults.block_length, absolute=defaults.absolute)
    return Row(
        request=request,
        policy=policy,
        length=len(tokens),
        blocks=[block for block in blocks if any(changing[block])],
        steps_per_block=per_block or num_steps_per_block(num_steps, len(blocks)),
        temperature=own("temperature"),
        top_k=own("top_k"),
        top_p=own("top_p"),
        min_p=own("min_p"),
        suppress=suppress,
        stop_token_ids=stops,
        constrained=constrained,
    )


def check_num_steps(num_steps: int | None, steps_per_block: int | None, policy: Policy) -> None:
    """Only a schedule has a number of steps, and it is said once."""
    if num_steps is not None and steps_per_block is not None:
        raise ValueError(f"num_steps and steps_per_block say the same: give one, got {num_steps} and {steps_per_block}")
    for name, value in (("num_steps", num_steps), ("steps_per_block", steps_per_block)):
        if value is not None and not policy.scheduled:
            raise ValueError(f"the policy decides itself when it is done: {name} must be None, got {value}")


def result_of(row: Row, tokens: Tensor) -> Result:
    """Of a row that has ended."""
    new: list[int] = tokens[row.prompt_length : row.length].tolist()
    return Result(
        request=row.request,
        tokens=tokens[: row.length].clone(),
        new_tokens=new[: row.num_new_tokens],
        finish_reason="length" if row.num_new_tokens is None else "stop",
        num_forwards=row.num_forwards,
    )


def num_steps_per_block(num_steps: int | None, num_blocks: int) -> int | None:
    """An even share of all steps."""
    if num_steps is None:
        return None
    if num_steps % num_blocks:
        raise ValueError(f"num_steps must be a multiple of the {num_blocks} blocks, got {num_steps}")
    return num_steps // num_blocks


def blocks_between(start: int, stop: int, length: int | None, *, absolute: bool) -> list[slice]:
    """The blocks that ``[start, stop)`` is cut into.

    Args:
        length: of a block; None for all of it.
        absolute: blocks begin at multiples of ``length``, so that the first may begin before ``start``; else the first
            begins at ``start``. The last may be shorter.
    """
    if length is None:
        return [slice(start, stop)]
    first = start // length * length if absolute else start
    count = math.ceil((stop - first) / length)
    return [slice(first + i * length, min(first + (i + 1) * length, stop)) for i in range(count)]
