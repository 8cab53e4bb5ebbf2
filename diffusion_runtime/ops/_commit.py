"""Which candidates a step commits, and the tokens after it: one launch on a GPU, which waits for nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.ops._commit_backends import run
from diffusion_runtime.ops._commit_reference import RULES, Problem
from diffusion_runtime.ops._rows import Setting, broadcast, float_setting, int_setting


class CommitStep(NamedTuple):
    """What :func:`commit_step` gives."""

    tokens: Tensor  # [batch, length] int64
    commit_mask: Tensor  # [batch, length] bool


def select_commits(
    score: Tensor, masked: Tensor, *, rule: str, bound: Tensor | float, backend: str | None = None
) -> Tensor:
    """Pick the positions whose candidates a step commits.

    The masked positions of a row are put in order, the best first; the positions that are committed are the first n of
    that order, n the largest number for which the rule holds. With the scores in order ``c_1, c_2, ...``:

    * ``"quota"``: ``n <= bound``, highest score first. LLaDA's and Dream's schedules.
    * ``"threshold"``: ``c_n >= bound``, highest score first. Fast-dLLM (Wu et al., 2025); there the score is the
      probability of the candidate.
    * ``"factor"``: ``(n + 1) * (1 - c_n) < bound``, highest score first. Fast-dLLM's paper, of probabilities; its
      published code commits one position more where the last one of a block fails.
    * ``"entropy_bound"``: ``c_1 + ... + c_(n-1) <= bound``, lowest score first: the scores are entropies in nats. The
      EB sampler (Ben-Hamu et al., 2025), as DiffusionGemma has it. The sum is in float64.

    Each rule but the quota commits the first position in any case. Positions of equal score come in their own order,
    and NaN scores last. A row without masked positions commits nothing.

    Args:
        score: ``[batch, length]`` float32; or float64, which only the reference takes. Scores of positions that are not
            masked do not matter.
        masked: ``[batch, length]`` bool: which positions are undecided.
        rule: one of the four.
        bound: for the quota an int in [0, 2^31), or an int64 tensor; else a finite float, or a float tensor. It is
            compared in the dtype of the score. A tensor broadcasts to ``[batch]``; its values are checked on the CPU
            only, and a negative quota in it commits nothing.
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``; None picks the fastest that can run.

    Returns:
        ``[batch, length]`` bool, True at masked positions only.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        BackendUnavailableError: a named backend that cannot run this call.
    """
    _check_selection(score, masked, rule)
    problem = Problem(
        masked=_with_stride_1(masked),
        score=_with_stride_1(score.detach()),
        rule=RULES.index(rule),
        bound=_bound(rule, bound, masked),
    )
    return run(problem, backend)[0]


def commit_step(
    tokens: Tensor,
    candidates: Tensor,
    score: Tensor,
    masked: Tensor,
    *,
    rule: str,
    bound: Tensor | float,
    renoise_vocab: int | None = None,
    seed: Tensor | int | None = None,
    position: Tensor | None = None,
    step: Tensor | int | None = None,
    backend: str | None = None,
) -> CommitStep:
    """Pick positions as :func:`select_commits` does, and write their candidates.

    With ``renoise_vocab``, masked positions that are not committed get a new token, as :func:`renoise` draws it: a step
    of uniform diffusion, where every position can be masked at every step. All other positions keep their token.

    Args:
        tokens: ``[batch, length]`` int64, not written to. The rows of this and of the next three arguments may be
            slices: a canvas needs no copy.
        candidates: ``[batch, length]`` int64.
        score, masked, rule, bound: as in :func:`select_commits`.
        renoise_vocab: new tokens are below it; in [1, 2^31). None: masked positions keep their token.
        seed: as in :func:`renoise`; needed with ``renoise_vocab``, and like ``position`` and ``step`` refused without.
        position, step: as in :func:`renoise`; None for the index along the length and for 0.
        backend: as in :func:`select_commits`.

    Returns:
        the tokens after the step, a new tensor, and the ``commit_mask``.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as :func:`select_commits`.
    """
    _check_selection(score, masked, rule)
    _check("tokens", tokens, torch.int64, masked)
    _check("candidates", candidates, torch.int64, masked)
    if renoise_vocab is not None and seed is None:
        raise ValueError("seed is needed to draw new tokens: renoise_vocab is not None")
    if renoise_vocab is None and any(given is not None for given in (seed, position, step)):
        raise ValueError("seed, position and step are those of new tokens, and renoise_vocab is None: none are drawn")
    problem = Problem(
        masked=_with_stride_1(masked),
        score=_with_stride_1(score.detach()),
        rule=RULES.index(rule),
        bound=_bound(rule, bound, masked),
        tokens=_with_stride_1(tokens),
        candidates=_with_stride_1(candidates),
    )
    if renoise_vocab is not None:
        assert seed is not None
        places = _places(masked, seed=seed, position=position, step=0 if step is None else step)
        problem = problem._replace(vocab=_vocab("renoise_vocab", renoise_vocab), **places)
    commit_mask, after = run(problem, backend)
    return CommitStep(after, commit_mask)


def renoise(
    tokens: Tensor,
    renoise_mask: Tensor,
    *,
    vocab: int,
    seed: Tensor | int,
    position: Tensor | None = None,
    step: Tensor | int = 0,
    backend: str | None = None,
) -> Tensor:
    """Replace tokens by uniform ones where the mask says so.

    The new token is ``floor(u * vocab)``, ``u`` the first uniform of Philox4x32-10 with key ``seed`` and counter
    ``(position, step, DRAW_NOISE, 0)``, in float64: the same on every backend, alone or in a batch, and independent of
    the tokens that :func:`sample_tokens` draws at that place and step.

    Args:
        tokens: ``[batch, length]`` int64, not written to.
        renoise_mask: ``[batch, length]`` bool.
        vocab: new tokens are below it; in [1, 2^31).
        seed: 64 bits; an int or an int64 tensor that broadcasts to ``[batch, length]``.
        position: int64, broadcastable to ``[batch, length]``, in [0, 2^32): place in the sequence. Default: the index
            along the length.
        step: denoising step in [0, 2^32); an int or an int64 tensor.
        backend: as in :func:`select_commits`; the kernel is that of :func:`commit_step`.

    Returns:
        ``[batch, length]`` int64, a new tensor.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as :func:`select_commits`.
    """
    _check_canvas("renoise_mask", renoise_mask, torch.bool)
    _check("tokens", tokens, torch.int64, renoise_mask, beside="renoise_mask")
    problem = Problem(
        masked=_with_stride_1(renoise_mask),
        score=None,
        tokens=_with_stride_1(tokens),
        vocab=_vocab("vocab", vocab),
        **_places(renoise_mask, seed=seed, position=position, step=step),
    )
    return run(problem, backend)[1]


def commit_tokens(tokens: Tensor, candidates: Tensor, commit_mask: Tensor) -> Tensor:
    """``candidates`` where ``commit_mask`` is True, ``tokens`` elsewhere: a new tensor.

    Args:
        tokens, candidates: ``[batch, length]`` int64.
        commit_mask: ``[batch, length]`` bool.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device.
    """
    _check_canvas("commit_mask", commit_mask, torch.bool)
    _check("tokens", tokens, torch.int64, commit_mask, beside="commit_mask")
    _check("candidates", candidates, torch.int64, commit_mask, beside="commit_mask")
    return torch.where(commit_mask, candidates, tokens)


def remask(tokens: Tensor, remask_mask: Tensor, *, mask_token_id: Tensor | int) -> Tensor:
    """``mask_token_id`` where ``remask_mask`` is True, ``tokens`` elsewhere: a new tensor.

    Args:
        tokens: ``[batch, length]`` int64.
        remask_mask: ``[batch, length]`` bool.
        mask_token_id: an int in [0, 2^63), or an int64 tensor that broadcasts to ``[batch, length]``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
    """
    _check_canvas("remask_mask", remask_mask, torch.bool)
    _check("tokens", tokens, torch.int64, remask_mask, beside="remask_mask")
    token = int_setting("mask_token_id", mask_token_id, tokens.shape, tokens.device, 63, flat=False)
    # torch.where would copy a number to a GPU, and wait
    return (
        torch.where(remask_mask, token, tokens) if isinstance(token, Tensor) else tokens.masked_fill(remask_mask, token)
    )


def _check_selection(score: Tensor, masked: Tensor, rule: str) -> None:
    _check_canvas("masked", masked, torch.bool)
    if not isinstance(score, Tensor) or score.dtype not in (torch.float32, torch.float64):
        got = getattr(score, "dtype", type(score).__name__)
        raise TypeError(f"score must be a float32 tensor (the reference takes float64, too), got {got}")
    _check("score", score, score.dtype, masked)
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; expected one of {', '.join(RULES)}")


def _check_canvas(name: str, value: Tensor, dtype: torch.dtype) -> None:
    kind = str(dtype).removeprefix("torch.")
    if not isinstance(value, Tensor) or value.dtype != dtype:
        got = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{name} must be {'an' if kind[0] == 'i' else 'a'} {kind} tensor, got {got}")
    if value.ndim != 2 or value.shape[1] >= 2**31:
        raise ValueError(f"{name} must be [batch, length] with length below 2^31, got {tuple(value.shape)}")


def _check(name: str, value: Tensor, dtype: torch.dtype, like: Tensor, *, beside: str = "masked") -> None:
    _check_canvas(name, value, dtype)
    if value.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {beside}, {tuple(like.shape)}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{beside} is on {like.device}, but {name} is on {value.device}")


def _bound(rule: str, value: Tensor | float, masked: Tensor) -> Setting:
    rows = masked.shape[:1]
    if rule == "quota":
        return int_setting("bound", value, rows, masked.device, 31, flat=False)  # type: ignore[arg-type]
    return float_setting("bound", value, rows, masked.device, signed=True, flat=False)


def _vocab(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 1 <= value < 2**31:
        raise ValueError(f"{name} must be in [1, 2^31), got {value}")
    return value


def _places(masked: Tensor, *, seed: Tensor | int, position: Tensor | None, step: Tensor | int) -> dict[str, Any]:
    """The key of each position's draw, as fields of a Problem."""
    shape, device = masked.shape, masked.device
    if position is not None:
        if not isinstance(position, Tensor) or position.dtype != torch.int64:
            got = getattr(position, "dtype", type(position).__name__)
            raise TypeError(f"position must be an int64 tensor, got {got}")
        position = broadcast("position", position, shape, device, torch.int64)
    return {
        "seed": int_setting("seed", seed, shape, device, 64, flat=False),
        "position": position,
        "step": int_setting("step", step, shape, device, 32, flat=False),
    }


def _with_stride_1(values: Tensor) -> Tensor:
    """Copied only if the positions of a row do not lie side by side."""
    return values if values.stride(1) == 1 or values.shape[1] <= 1 else values.contiguous()
