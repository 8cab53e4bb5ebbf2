"""The requests that are denoised together: what the loop knows of each row, on the device and on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.cache import CachedContext
from diffusion_runtime.decoding import Canvas, Decision, Policy
from diffusion_runtime.denoising.constrained import allowed_by_constraints
from diffusion_runtime.denoising.rows import Row
from diffusion_runtime.ops import TokenSamples, pack_allowed


class Batch:
    """Rows that are denoised together, each at a block and a step of its own.

    Everything that a step reads is on the device and changes there; the host's numbers change between blocks only.
    """

    def __init__(self, rows: list[Row], tokens: list[Tensor], mask_token_id: int, device: torch.device) -> None:
        self.rows = rows
        self.mask_token_id = mask_token_id
        longest = max((row.length for row in rows), default=0)
        self.tokens = torch.full((len(rows), longest), mask_token_id, device=device)
        self.editable = torch.zeros(len(rows), longest, dtype=torch.bool, device=device)
        for i, (row, own) in enumerate(zip(rows, tokens, strict=True)):
            self.tokens[i, : row.length] = own
            if row.request.revisable is not None:
                self.editable[i, : row.prompt_length] = row.request.revisable.to(device)
        self.editable |= self.tokens == mask_token_id
        self.confidence = torch.ones(self.tokens.shape, device=device)
        self.step = torch.zeros(len(rows), 1, dtype=torch.int64, device=device)
        self.num_masked = torch.zeros(len(rows), dtype=torch.int64, device=device)
        self.num_mask_free = torch.zeros_like(self.num_masked)
        self.live = torch.ones(len(rows), dtype=torch.bool, device=device)
        # what was made on the host for a step, and holds until it changes something
        self.contexts: dict[tuple[int, ...], CachedContext] = {}
        self.indices: dict[tuple[int, ...], Tensor] = {}
        self.words: Tensor | None = None
        self.refresh()

    def refresh(self) -> None:
        """Bring to the device what the host knows of the rows; after it changed, and never within a block."""
        device, rows = self.tokens.device, self.rows
        self.contexts, self.indices, self.words = {}, {}, None
        blocks = [row.blocks[0] if row.blocks else slice(0, 0) for row in rows]
        widths = {block.stop - block.start for block in blocks}
        self.width = max(widths, default=0)
        self.even = len(widths) == 1  # every row's block is as wide

        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)[:, None]

        self.lengths = column([row.length for row in rows])
        self.ragged = len({row.length for row in rows}) > 1
        self.position = column([block.start for block in blocks]) + torch.arange(self.width, device=device)
        self.inside = self.position < column([block.stop for block in blocks])
        self.num_positions = self.inside.sum(1)
        self.position = self.position.clamp(max=self.tokens.shape[1] - 1)
        self.seed = column([row.request.signed_seed for row in rows])
        self.index = column([row.index for row in rows])[:, 0]
        self.num_steps = column([row.num_steps for row in rows])[:, 0]
        begins = torch.tensor([row.index == 0 for row in rows], dtype=torch.bool, device=device)
        self.num_masked = torch.where(begins, self.masked().sum(1), self.num_masked)
        self.num_mask_free = self.num_mask_free.masked_fill(begins, 0)
        self.live = (self.live | begins) & torch.tensor(
            [bool(row.blocks) for row in rows], dtype=torch.bool, device=device
        )
        self.settings = Settings.of(rows, device)

    def masked(self) -> Tensor:
        """``[rows, width]`` bool: undecided positions of the current blocks."""
        return self._masked(self.tokens.gather(1, self.position))

    def _masked(self, tokens: Tensor) -> Tensor:
        return (tokens == self.mask_token_id) & self.inside

    def canvas(self) -> Canvas:
        """The current blocks; rows that are done have nothing undecided and nothing editable."""
        live = self.live[:, None] & self.inside
        tokens = self.tokens.gather(1, self.position)
        return Canvas(
            tokens=tokens,
            masked=self._masked(tokens) & live,
            editable=self.editable.gather(1, self.position) & live,
            position=self.position,
            seed=self.seed,
            step=self.step,
            index=self.index,
            num_steps=self.num_steps,
            num_positions=self.num_positions,
            num_masked=self.num_masked,
            num_mask_free=self.num_mask_free,
            confidence=self.confidence.gather(1, self.position),
        )

    def draws(self, canvas: Canvas, vocab: int) -> dict[str, Any]:
        """How the current blocks are sampled: arguments of ``sample_tokens``."""
        settings = self.settings
        return {
            "temperature": settings.temperature,
            "statistics_temperature": settings.statistics_temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "min_p": settings.min_p,
            "seed": canvas.seed,
            "position": canvas.position,
            "step": canvas.step,
            "masked": canvas.masked | (canvas.editable & settings.revises[:, None]),
            "allowed": allowed_by_constraints(self, self.allowed(vocab), vocab),
            # a committed mask token would stay undecided for ever
            "suppress": [self.mask_token_id] if self.mask_token_id < vocab else None,
            "statistics": "restricted",
        }

    def apply(self, decision: Decision, samples: TokenSamples, canvas: Canvas) -> Tensor:
        """Change the tokens as a :func:`complete` decision says; returns what took its candidate."""
        commit_mask, candidates, remask, finished = decision
        assert candidates is not None
        assert remask is not None
        assert finished is not None
        tokens = torch.where(commit_mask, candidates, canvas.tokens)
        tokens = tokens.masked_fill(remask, self.mask_token_id)
        confidence = torch.where(commit_mask, samples.logprob.exp(), canvas.confidence)
        self.tokens, self.confidence = (
            self._put(whole, part) for whole, part in ((self.tokens, tokens), (self.confidence, confidence))
        )
        masked = canvas.masked.any(1)
        # a row counts the steps in which it had something to decide, or its draws would follow its neighbours
        self.step = self.step + (masked | (canvas.editable.any(1) & self.settings.redecides))[:, None]
        self.num_mask_free = self.num_mask_free + (self.live & ~masked)
        self.index = self.index + 1
        over = self.settings.scheduled & (self.index >= self.num_steps)
        self.live = self.live & ~(finished & ~self.settings.goes_on) & ~over
        return commit_mask

    def spread(self, mask: Tensor) -> Tensor:
        """A ``[rows, width]`` mask of the current blocks at its places: ``[rows, length]``."""
        return self._put(torch.zeros_like(self.editable), mask)

    def _put(self, whole: Tensor, part: Tensor) -> Tensor:
        """``whole`` with ``part`` at those positions that are inside of a row's block."""
        if self.even:
            return whole.scatter(1, self.position, part)
        places = torch.where(self.inside, self.position, whole.shape[1])
        wider = torch.nn.functional.pad(whole, (0, 1))
        return wider.scatter(1, places, part)[:, :-1]

    def keep(self, kept: list[int]) -> None:
        """Only these rows go on."""
        chosen = torch.tensor(kept, dtype=torch.int64, device=self.tokens.device)
        self.rows = [self.rows[i] for i in kept]
        for name in ("tokens", "editable", "confidence", "step", "num_mask_free", "live", "num_masked"):
            setattr(self, name, getattr(self, name)[chosen])
        longest = max((row.length for row in self.rows), default=0)
        for name in ("tokens", "editable", "confidence"):
            setattr(self, name, getattr(self, name)[:, :longest])
        self.refresh()

    def join(self, other: Batch) -> None:
        """The rows of another batch behind these."""
        self.rows = self.rows + other.rows
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        for name, value in (("tokens", self.mask_token_id), ("editable", False), ("confidence", 1.0)):
            padded = [
                torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)
                for x in (getattr(self, name), getattr(other, name))
            ]
            setattr(self, name, torch.cat(padded))
        for name in ("step", "num_mask_free", "live", "num_masked"):
            setattr(self, name, torch.cat((getattr(self, name), getattr(other, name))))
        self.refresh()

    def allowed(self, vocab: int) -> Tensor | None:
        """What each position of the current blocks may draw but for constraints, packed; None: everything."""
        rules = (row.suppress or row.request.min_new_tokens or row.request.allowed is not None for row in self.rows)
        if self.words is not None or not any(rules):
            return self.words
        allowed = torch.ones(len(self.rows), self.width, vocab, dtype=torch.bool)
        for i, row in enumerate(self.rows):
            if outside := [token for token in row.suppress if not 0 <= token < vocab]:
                raise ValueError(f"suppress holds token {outside[0]}, which is outside of the vocabulary of {vocab}")
            allowed[i, :, list(row.suppress)] = False
            if row.request.min_new_tokens and row.blocks:
                first = row.prompt_length + row.request.min_new_tokens - row.blocks[0].start
                stops = [token for token in row.stop_token_ids if token < vocab]
                allowed[i, : max(0, first)][:, stops] = False
            if row.request.allowed is not None and row.blocks:
                own = row.request.allowed[row.blocks[0]].cpu()
                if own.shape[1] != vocab:
                    raise ValueError(f"allowed must have {vocab} columns, one for each token, got {own.shape[1]}")
                allowed[i, : len(own)] &= own
        self.words = pack_allowed(allowed).to(self.tokens.device)
        return self.words

    def index_of(self, numbers: list[int]) -> Tensor:
        """These numbers on the device."""
        key = tuple(numbers)
        if key not in self.indices:
            self.indices[key] = torch.tensor(numbers, dtype=torch.int64, device=self.tokens.device)
        return self.indices[key]


def decide(batch: Batch, samples: TokenSamples, canvas: Canvas) -> Decision:
    """What each row's own policy decides, complete."""
    return Decision(*of_each_row(batch, lambda policy: complete(policy.rule(samples, canvas), samples, canvas)))


def noise_level(batch: Batch) -> Tensor:
    """``-log(1 - (1 - 1e-3) t)``, where ``t`` is the time of each row's canvas: ``[rows]`` float32.

    MDLM's total noise of the log-linear schedule, under which a share ``(1 - 1e-3) t`` is masked.
    """
    canvas = batch.canvas()
    (time,) = of_each_row(batch, lambda policy: (policy.time(canvas),))
    return -torch.log1p(-(1 - 1e-3) * time)


def of_each_row(batch: Batch, of: Callable[[Policy], Sequence[Any]]) -> Sequence[Any]:
    """From what each policy says of all rows, tensors ``[rows, ...]``, to what each row's own policy says of it."""
    rows = batch.rows
    policies = list(dict.fromkeys(row.policy for row in rows))
    said = [of(policy) for policy in policies]
    if len(policies) == 1:
        return said[0]
    which = batch.index_of([policies.index(row.policy) for row in rows])
    everyone = batch.index_of(list(range(len(rows))))
    return [torch.stack(parts)[which, everyone] for parts in zip(*said, strict=True)]


def complete(decided: Tensor | Decision, samples: TokenSamples, canvas: Canvas) -> Decision:
    """Every field said, and nothing changed that may not be."""
    decision = decided if isinstance(decided, Decision) else Decision(decided)
    commit_mask = decision.commit_mask & canvas.editable
    remask = torch.zeros_like(commit_mask) if decision.remask is None else decision.remask
    remask = remask & canvas.editable & ~commit_mask
    undecided = (canvas.masked & ~commit_mask) | remask
    return Decision(
        commit_mask,
        samples.token if decision.candidates is None else decision.candidates,
        remask,
        ~undecided.any(1) if decision.finished is None else decision.finished,
    )


class Settings(NamedTuple):
    """The rows' settings on the device."""

    temperature: Tensor | float  # [rows, 1] float32, or that of every row
    statistics_temperature: Tensor | float  # the same
    top_k: Tensor | None  # [rows, 1] int64
    top_p: Tensor | None  # [rows, 1] float32
    min_p: Tensor | None  # [rows, 1] float32
    revises: Tensor  # [rows] bool: decided positions get candidates
    redecides: Tensor  # [rows] bool: it also, or it masks again
    scheduled: Tensor  # [rows] bool: the block is over after its steps
    goes_on: Tensor  # [rows] bool: until then, whatever is undecided

    @classmethod
    def of(cls, rows: list[Row], device: torch.device) -> Settings:
        def floats(values: list[float]) -> Tensor | float:
            if len(set(values)) == 1:
                return float(values[0])
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        def bools(values: list[bool]) -> Tensor:
            return torch.tensor(values, dtype=torch.bool, device=device)

        cuts = {}
        for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            values = [getattr(row, name) for row in rows]
            said = [neutral if value is None else value for value in values]
            dtype = torch.int64 if name == "top_k" else torch.float32
            cuts[name] = (
                None if said.count(neutral) == len(said) else torch.tensor(said, dtype=dtype, device=device)[:, None]
            )
        scaled = [row.policy.confidence == "scaled" and row.temperature > 0 for row in rows]
        return cls(
            temperature=floats([row.temperature for row in rows]),
            statistics_temperature=floats(
                [row.temperature if own else 1.0 for row, own in zip(rows, scaled, strict=True)]
            ),
            **cuts,
            revises=bools([row.policy.revises for row in rows]),
            redecides=bools([row.policy.revises or row.policy.remasks for row in rows]),
            scheduled=bools([row.fixed_steps for row in rows]),
            goes_on=bools([row.policy.scheduled and row.policy.remasks for row in rows]),
        )
