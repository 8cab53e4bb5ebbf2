"""Where a loop of somebody else's and ours part, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_runtime.decoding import POLICIES, Canvas, Policy, Rule, linear, of_block_length, of_one, of_times
from diffusion_runtime.denoiser import Denoiser, Request
from diffusion_runtime.denoising.batch import complete
from diffusion_runtime.ops import TokenSamples

Cause = Literal["tie", "precision", "stale cache", "different rule", "different end"]
Loop = Callable[[Callable[..., Any], Tensor], Iterable[Tensor]]
_SCHEDULES = {"linear": linear, "of_block_length": of_block_length, "of_times": of_times, "of_one": of_one}
# policies that draw at any temperature: they agree with nobody, or by chance
_DRAWING = frozenset(
    "random dream_origin bd3lm_first_hitting mdlm remdm_cap remdm_rescale remdm_conf remdm_loop".split()
)


@dataclass(frozen=True)
class Parting:
    """The first difference between two runs."""

    step: int  # counted from 0
    row: int
    position: int  # the leftmost that differs
    cause: Cause
    detail: str

    def __str__(self) -> str:
        return f"step {self.step}, row {self.row}, position {self.position}: {self.cause}: {self.detail}"


class Recorded:
    """A module that remembers what it was asked and what it answered; anything else of it is as it was."""

    def __init__(self, module: Callable[..., Any]) -> None:
        self._module = module
        self.calls: list[tuple[Tensor | None, Tensor | None]] = []  # tokens, logits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._module(*args, **kwargs)
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        tokens = next((x for x in tensors if x.dtype == torch.int64 and x.ndim == 2), None)
        logits = getattr(out, "logits", out)
        whole = isinstance(logits, Tensor) and logits.ndim == 3
        # copies: loops write their next tokens over these
        self.calls.append((None if tokens is None else tokens.clone(), logits.detach().clone() if whole else None))
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Step(NamedTuple):
    """A step of ours, and what went into it."""

    before: Tensor  # [batch, length]
    after: Tensor
    committed: Tensor  # [batch, length]
    blocks: list[slice]
    canvas: Canvas
    samples: TokenSamples
    policy: Policy


def compare(reference: Loop, denoiser: Denoiser, tokens: Tensor, *, max_new_tokens: int = 0) -> Parting | None:
    """Run a loop of your own and ours side by side until they differ.

    Args:
        reference: called with the module of ``denoiser`` and with ``[batch, length + max_new_tokens]`` int64 tokens,
            the mask token where undecided; it yields (a copy of) all tokens after each of its steps. It may call the
            module with the whole sequence or a part of it. Our rows go on to their next block each by itself: give one
            row where a loop lets the rows of a batch wait for each other.
        denoiser: at temperature 0, so that there are no draws to differ in.
        tokens: ``[batch, length]`` int64.
        max_new_tokens: undecided positions behind them.

    Returns:
        the first difference and its cause; None if both do the same to the end.

    Raises:
        ValueError: a denoiser that draws, is of uniform diffusion, or has guidance, suppressed tokens or a constraint:
            its logits are not the module's own.
    """
    if not isinstance(denoiser.policy, Policy) or denoiser.defaults.temperature > 0:
        raise ValueError("the denoiser must be at temperature 0, and not of uniform diffusion: draws are not compared")
    if denoiser._forward.guidance_scale or denoiser.defaults.suppress or denoiser.defaults.constraint is not None:
        raise ValueError("the denoiser must have neither guidance_scale nor suppress nor constraint")
    model = denoiser.language_model
    recorded = Recorded(getattr(model, "module", model))
    start = functional.pad(tokens, (0, max_new_tokens), value=denoiser.mask_token_id)
    with torch.no_grad():
        theirs = iter(reference(recorded, start.clone()))
        num_calls = 0
        for index, step in enumerate(_steps(denoiser, tokens, max_new_tokens)):
            got = next(theirs, None)
            if got is None:
                return _at_first(
                    index, step.before, step.after, "different end", "the reference has ended, ours goes on"
                )
            if got.shape != step.after.shape:
                raise ValueError(f"the reference must yield {tuple(step.after.shape)} tokens, got {tuple(got.shape)}")
            if not torch.equal(got, step.after):
                cause, detail = _explain(denoiser, step, got, recorded.calls[num_calls:])
                return _at_first(index, got, step.after, cause, detail)
            num_calls, last = len(recorded.calls), step.after
        extra = next(theirs, None)
        if extra is not None and not torch.equal(extra, last):
            return _at_first(index + 1, extra, last, "different end", "ours has ended, the reference goes on")
    return None


def _steps(denoiser: Denoiser, tokens: Tensor, max_new_tokens: int) -> Iterator[_Step]:
    batch = denoiser._batch([Request(row, max_new_tokens=max_new_tokens) for row in tokens], tokens.device)
    try:
        while batch.width:
            before, canvas = batch.tokens.clone(), batch.canvas()
            blocks = [row.blocks[0] if row.blocks else slice(0, 0) for row in batch.rows]
            samples, commits = denoiser._step(batch)
            committed = batch.spread(commits)
            denoiser._advance(batch)
            assert isinstance(denoiser.policy, Policy)
            yield _Step(before, batch.tokens.clone(), committed, blocks, canvas, samples, denoiser.policy)
    finally:
        denoiser._forward.end(batch)


def _at_first(step: int, one: Tensor, other: Tensor, cause: Cause, detail: str) -> Parting:
    row, position = (one != other).nonzero()[0].tolist()
    return Parting(step, row, position, cause, detail)


def _explain(
    denoiser: Denoiser, step: _Step, theirs: Tensor, calls: list[tuple[Tensor | None, Tensor | None]]
) -> tuple[Cause, str]:
    exact = exact_logits(denoiser, step.before)
    row = int((theirs != step.after).nonzero()[0, 0])
    block = step.blocks[row]
    filled = (step.after[row] != step.before[row]) & ~step.committed[row]
    if (filled & (theirs[row] != step.after[row])).any():
        return "different end", "ours ended the answer at a stop token and repeated it"
    return (
        _stale(denoiser, step, exact, calls, row)
        or _other_token(step, theirs, exact, row)
        or _tied(step, theirs, row, block, exact.dtype)
        or _other_rule(step, theirs)
        or ("different rule", "no convention of ours that was tried does what the reference did")
    )


def exact_logits(denoiser: Denoiser, tokens: Tensor) -> Tensor:
    """``[batch, length, vocab]`` that belong to each position, of a forward without a cache; the mask token is -inf."""
    model = denoiser.language_model
    logits: Tensor = model(tokens)
    if model.shifted:
        logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
    if denoiser.mask_token_id < logits.shape[-1]:
        logits = logits.clone()
        logits[..., denoiser.mask_token_id] = -torch.inf
    return logits


def _tolerance(dtype: torch.dtype) -> float:
    """What the order of sums may do to a logit, relative to its size."""
    return 64 * torch.finfo(dtype).eps


def _stale(
    denoiser: Denoiser,
    step: _Step,
    exact: Tensor,
    calls: list[tuple[Tensor | None, Tensor | None]],
    row: int,
) -> tuple[Cause, str] | None:
    block, undecided = step.blocks[row], step.canvas.masked[row]
    if not undecided.any():
        return None
    places = step.canvas.position[row][undecided]
    size = exact[row, places].masked_fill(exact[row, places].isinf(), 0).abs().amax().double()
    tolerance = max(1e-4, _tolerance(exact.dtype)) * float(size)
    logprob = exact[row, places].double().log_softmax(-1)
    own = logprob.gather(1, step.samples.token[row][undecided][:, None])[:, 0]
    worst = float((own - step.samples.logprob[row][undecided].double()).abs().max())
    if worst > tolerance:
        return "stale cache", f"ours: log-probabilities are up to {worst:.3g} nats from those without a cache"
    if not calls:
        return "stale cache", "theirs: the module was not asked in this step; what it decided by is of an earlier one"
    asked, answered = calls[-1]
    if asked is None or answered is None or len(asked) <= row:
        return None
    start = _place_of(asked[row], step.before[row], block, shifted=denoiser.language_model.shifted)
    if start is None:
        return "stale cache", "theirs: the module was asked about other tokens than those that there were"
    shift = int(denoiser.language_model.shifted)
    inside = [int(p) for p in places if 0 <= int(p) - shift - start < answered.shape[1]]
    if answered.shape[-1] != exact.shape[-1] or not inside:
        return None
    got = answered[row, [p - shift - start for p in inside]].double()
    difference = (got - exact[row, inside].double()).masked_fill(exact[row, inside].isinf(), 0).abs()
    if float(difference.max()) > tolerance:
        where = inside[int(difference.amax(1).argmax())]
        return (
            "stale cache",
            f"theirs: logits at position {where} are up to {float(difference.max()):.3g} from those without a cache",
        )
    return None


def _place_of(asked: Tensor, before: Tensor, block: slice, *, shifted: bool) -> int | None:
    """Where the tokens of a call stand in the sequence: the whole, or a part that begins with the block or so."""
    for start in (0, block.start - int(shifted), block.start, *range(len(before))):
        part = before[max(start, 0) : max(start, 0) + len(asked)]
        if len(part) == len(asked) and torch.equal(part, asked):
            return int(max(start, 0))
    return None


def _other_token(step: _Step, theirs: Tensor, exact: Tensor, row: int) -> tuple[Cause, str] | None:
    """Both decided a position, with different tokens."""
    both = (theirs[row] != step.before[row]) & (step.after[row] != step.before[row]) & (theirs[row] != step.after[row])
    if not both.any():
        return None
    place = int(both.nonzero()[0, 0])
    ours, other = int(step.after[row, place]), int(theirs[row, place])
    one, two = float(exact[row, place, ours]), float(exact[row, place, other])
    named = f"at position {place} ours took token {ours} (logit {one:.6g}) and theirs {other} ({two:.6g})"
    if one == two:
        return "tie", named
    if abs(one - two) <= _tolerance(exact.dtype) * max(abs(one), abs(two)):
        return "precision", named
    return "different rule", named


def _tied(step: _Step, theirs: Tensor, row: int, block: slice, dtype: torch.dtype) -> tuple[Cause, str] | None:
    """Each decided a position that the other left; whether by some score both are as good."""
    ours_only, theirs_only = (
        ((a[row] != step.before[row]) & (b[row] == step.before[row])).nonzero()[:, 0].tolist()
        for a, b in ((step.after, theirs), (theirs, step.after))
    )
    if outside := [place for place in theirs_only if not block.start <= place < block.stop]:
        return "different rule", f"theirs changed position {outside[0]}, outside of the block that ours is at"
    if not ours_only or not theirs_only:
        return None
    one, two = ours_only[0], theirs_only[0]
    found: tuple[Cause, str] | None = None
    for name in ("logprob", "margin", "entropy"):
        a, b = (float(getattr(step.samples, name)[row, p - block.start]) for p in (one, two))
        said = f"ours decided position {one} and theirs {two}, whose {name} is {a:.7g} and {b:.7g}"
        if a == b:
            return "tie", said
        if abs(a - b) <= _tolerance(dtype) * max(abs(a), abs(b), 1e-3) and found is None:
            found = ("precision", said)
    return found


def _other_rule(step: _Step, theirs: Tensor) -> tuple[Cause, str] | None:
    """A convention that would have done what theirs did, in all rows."""
    width = step.canvas.tokens.shape[1]
    done = theirs.gather(1, step.canvas.position[:, :width]) != step.canvas.tokens
    for name, cause, rule, samples in _variants(step.policy, step.samples):
        decision = complete(rule(samples, step.canvas), samples, step.canvas)
        assert decision.remask is not None
        if torch.equal((decision.commit_mask & step.canvas.masked) | decision.remask, done & step.canvas.editable):
            return cause, f"with {name} ours would have done the same"
    return None


def _variants(policy: Policy, samples: TokenSamples) -> Iterator[tuple[str, Cause, Rule, TokenSamples]]:
    rule = policy.rule
    function, said = (rule.func, dict(rule.keywords)) if isinstance(rule, partial) else (rule, {})
    for name, parameter in inspect.signature(function).parameters.items():
        value = said.get(name, parameter.default)
        if isinstance(value, bool):
            yield f"{name}={not value}", "different rule", partial(function, **{**said, name: not value}), samples
        if name in ("schedule", "at_least"):
            for schedule_name, schedule in _SCHEDULES.items():
                other = partial(function, **{**said, name: schedule})
                yield f"{name}={schedule_name}", "different rule", other, samples
    for dtype in (torch.bfloat16, torch.float16):
        rounded = samples.logprob.exp().to(dtype).float().log()
        yield (
            f"confidences in {str(dtype).removeprefix('torch.')}",
            "precision",
            rule,
            samples._replace(logprob=rounded),
        )
    for name, other_policy in POLICIES.items():
        if other_policy is not policy and name not in _DRAWING:
            yield f"policy {name!r}", "different rule", other_policy.rule, samples
