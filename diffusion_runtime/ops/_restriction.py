"""Which tokens a draw may take: ``allowed``, ``suppress``, ``top_k``, ``top_p`` and ``min_p``.

All of them come down to two things a kernel needs to know of a row: the packed mask of allowed tokens, and the smallest
logit that top-k, top-p and min-p leave. A cut by the logit's value takes equal logits together, so no order among them
can matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 32  # tokens in one word of ``allowed``


def allowed_words(
    leading: torch.Size, vocab: int, device: torch.device, allowed: Tensor | None, suppress: Sequence[int] | None
) -> Tensor | None:
    """``allowed`` without ``suppress`` as ``[rows, words]``, a view where it can be; None: every token."""
    num_words = -(-vocab // WORD)
    words = None
    if suppress is not None:
        words = _words_without(_suppressed_ids(suppress, vocab), num_words, device)
    if allowed is not None:
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.int32:
            raise TypeError(f"allowed must be an int32 tensor, got {getattr(allowed, 'dtype', type(allowed).__name__)}")
        if allowed.ndim == 0 or allowed.shape[-1] != num_words:
            raise ValueError(f"allowed must be [..., {num_words}] for {vocab} tokens, got {tuple(allowed.shape)}")
        if allowed.device != device:
            raise ValueError(f"the rows are on {device}, but allowed is on {allowed.device}")
        words = allowed if words is None else allowed & words
    if words is None:
        return None
    try:
        expanded = words.expand(*leading, num_words)
    except RuntimeError:
        got = tuple(words.shape)
        raise ValueError(f"allowed must broadcast to {(*leading, num_words)}, got {got}") from None
    rows = expanded.reshape(-1, num_words) if leading.numel() else expanded.new_empty(0, num_words)
    return rows if rows.stride(1) == 1 or num_words == 1 else rows.contiguous()


def _suppressed_ids(suppress: Sequence[int], vocab: int) -> tuple[int, ...]:
    ids = tuple(suppress)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"suppress must hold ints, got {type(token).__name__}")
        if not 0 <= token < vocab:
            raise ValueError(f"suppress must hold token ids in [0, {vocab}), got {token}")
    return ids


def _words_without(ids: tuple[int, ...], num_words: int, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return _pack_without(ids, num_words, device)
    key = (ids, num_words, device)
    if key not in _WORDS_WITHOUT:
        if len(_WORDS_WITHOUT) >= _KEPT_WORDS:
            _WORDS_WITHOUT.clear()
        _WORDS_WITHOUT[key] = _pack_without(*key)
    return _WORDS_WITHOUT[key]


# a loop asks for the same ids at every step, and a copy to a GPU would synchronise
_WORDS_WITHOUT: dict[tuple[tuple[int, ...], int, torch.device], Tensor] = {}
_KEPT_WORDS = 64  # a loop has one set of ids; a caller who has another at every step must not fill the memory


def _pack_without(ids: tuple[int, ...], num_words: int, device: torch.device) -> Tensor:
    mask = torch.ones(num_words * WORD, dtype=torch.bool)
    for token in ids:
        mask[token] = False
    return pack_allowed(mask).to(device)


def pack_allowed(mask: Tensor) -> Tensor:
    """Pack a ``[..., vocab]`` bool mask into the words of ``allowed``.

    Returns:
        ``[..., ceil(vocab / 32)]`` int32: token ``t`` is bit ``t % 32`` of word ``t // 32``, as grammar libraries have
        it. The bits behind the vocabulary are 0.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim == 0:
        raise TypeError(f"mask must be a [..., vocab] bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    bits = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    powers = torch.ones(WORD, dtype=torch.int64, device=mask.device) << torch.arange(WORD, device=mask.device)
    # the 32 bits as an unsigned number, then with bit 31 as the sign
    words: Tensor = ((bits * powers).sum(-1) + 2**31 & 0xFFFFFFFF) - 2**31
    return words.to(torch.int32)


def unpack_allowed(words: Tensor, vocab: int) -> Tensor:
    """The inverse of :func:`pack_allowed`: ``[..., vocab]`` bool."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & 1).flatten(-2)[..., :vocab].bool()


def kept(x: Tensor, y: Tensor, temperature: Tensor, allowed: Tensor | None, top_k: Tensor, top_p: Tensor,
         min_p: Tensor) -> Tensor:  # fmt: skip
    """The definition: which tokens of ``[rows, vocab]`` each row may draw, as bool.

    Args:
        x: logits; y: the same under the softcap.
        temperature, top_k, top_p, min_p: ``[rows]``. A row at temperature 0 is cut by ``allowed`` alone.
        allowed: ``[rows, words]`` or None.
    """
    mask = torch.ones_like(x, dtype=torch.bool) if allowed is None else unpack_allowed(allowed, x.shape[1])
    mask &= x > -torch.inf
    drawn = temperature > 0
    if not drawn.any():
        return mask
    ordered, order = x.masked_fill(~mask, -torch.inf).sort(-1, descending=True)
    k = torch.where(top_k > 0, top_k, x.shape[1]).clamp(max=x.shape[1])
    cutoff = ordered.gather(-1, k[:, None] - 1)  # the k-th largest; -inf if there are not as many
    scale = torch.where(drawn, temperature, 1)[:, None]
    top = y.gather(-1, order[:, :1])
    weight = ((y.gather(-1, order) - top) / scale).exp().double()
    weight = torch.where((ordered >= cutoff) & (ordered > -torch.inf), weight, 0)
    # a token stays while the mass of those before it is short of top_p; the first one always stays
    total = weight.sum(-1, keepdim=True)
    stays = weight.cumsum(-1) - weight < top_p.double()[:, None] * total
    stays[:, 0] = True
    stays |= top_p[:, None] >= 1
    cutoff = cutoff.maximum(torch.where(stays, ordered, torch.inf).amin(-1, keepdim=True))
    large = ((y - top) / scale).exp() >= min_p[:, None]
    return mask & ((x >= cutoff) & large | ~drawn[:, None])
