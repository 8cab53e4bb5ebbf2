"""What ``python -m bench --suite NAME`` compares: draws, the fused head, soft embeddings, attention and around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench import attention_suites, diffusion_gemma_suite, generate_suite, norm_suites
from bench.check import SEED, WrongAnswerError
from bench.comparison import Comparison
from bench.peers import READS
from bench.runners import default_backends
from diffusion_runtime import ops
from diffusion_runtime.ops._sample_with_soft_embedding import one_after_the_other

DTYPES = (torch.float32, torch.bfloat16)
RESTRICTED = (64, 131_072)  # rows, vocab
HEADS = ((256, 1024, 262_144), (64, 4096, 126_464), (32, 4096, 126_464))  # rows, dim, vocab
SOFT = (256, 1024, 262_144)
CANVASES = ((1, 64), (16, 256))  # batch, length
Suite = Callable[[torch.device], Iterator[Comparison]]


def restricted(device: torch.device) -> Iterator[Comparison]:
    """Draws among some of the tokens, beside transformers' processors and ``multinomial``."""
    rows, vocab = RESTRICTED
    for dtype in DTYPES:
        logits = _noise(rows, vocab, device, dtype, scale=2.5)
        for cut in ({"top_k": 50, "top_p": 0.9}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}):
            sample = partial(ops.sample_tokens, logits, temperature=1.0, seed=SEED, **cut)
            calls = {name: partial(sample, backend=name) for name in default_backends(device, dtype)}
            yield Comparison(
                f"Restricted draws on [{rows}, {vocab}] {_name(dtype)}",
                ", ".join(f"{name} {value}" for name, value in cut.items()),
                calls,
                {"transformers": partial(_transformers_draw, logits, **cut)},
                partial(_check_tokens, calls, logits, cut),
                {"a read": partial(READS["amax of int32"], logits)},
            )


def head(device: torch.device) -> Iterator[Comparison]:
    """``sample_from_hidden`` beside the product, its softmax and what is read off it."""
    for (rows, dim, vocab), dtype in product(HEADS, DTYPES):
        hidden = _noise(rows, dim, device, dtype, scale=2.5 * dim**-0.5)
        weight = _noise(vocab, dim, device, dtype)
        for case, settings in (("statistics", {}), ("sampled at 1", {"temperature": 1.0, "seed": SEED})):
            sample = partial(ops.sample_from_hidden, hidden, weight, **settings)  # type: ignore[arg-type]
            names = _backends("sample_from_hidden", device, dtype)
            calls = {name: partial(sample, backend=name) for name in names}
            yield Comparison(
                f"[{rows}, {dim}] x [{vocab}, {dim}] {_name(dtype)}",
                case,
                calls,
                {
                    "eager torch": partial(_eager_head, hidden, weight, draws=bool(settings)),
                    "product + sample_tokens": lambda h=hidden, w=weight, s=settings: ops.sample_tokens(h @ w.T, **s),  # type: ignore[misc]
                },
                partial(_check_head, calls, hidden, weight, settings),
                {
                    "the product": lambda h=hidden, w=weight: h @ w.T,  # type: ignore[misc]
                    "a read of the weight": partial(READS["amax of int32"], weight),
                },
            )


def soft(device: torch.device) -> Iterator[Comparison]:
    """``soft_embedding`` of known and unknown logsumexp, beside ``softmax(...) @ embedding``."""
    rows, dim, vocab = SOFT
    for dtype in DTYPES:
        logits = _noise(rows, vocab, device, torch.float32, scale=2.5)
        embedding = _noise(vocab, dim, device, dtype)
        logsumexp = ops.sample_tokens(logits, statistics_temperature=0.7).logsumexp
        names = _backends("soft_embedding", device, dtype)
        for case, known in (("logsumexp known", logsumexp), ("unknown", None)):
            embed = partial(ops.soft_embedding, logits, embedding, temperature=0.7, logsumexp=known)
            calls = {name: partial(embed, backend=name) for name in names}
            yield Comparison(
                f"soft_embedding [{rows}, {vocab}] float32 @ [{vocab}, {dim}] {_name(dtype)}",
                case,
                calls,
                {"eager torch": partial(_eager_soft, logits, embedding)},
                partial(_check_soft, calls, logits, embedding),
                {"the product": partial(torch.mm, logits.to(dtype), embedding)},
            )


def both(device: torch.device) -> Iterator[Comparison]:
    """``sample_with_soft_embedding`` beside its two ops, and beside the logits and what is made of them."""
    rows, dim, vocab = SOFT
    for dtype in DTYPES:
        hidden = _noise(rows, dim, device, dtype, scale=2.5 * dim**-0.5)
        weight = _noise(vocab, dim, device, dtype)
        settings: dict[str, Any] = {"temperature": 0.7, "seed": SEED}
        sample = partial(ops.sample_with_soft_embedding, hidden, weight, **settings)
        names = _backends("sample_with_soft_embedding", device, dtype)
        calls = {name: partial(sample, backend=name) for name in names}
        first = {name: lambda call=call: call()[0] for name, call in calls.items()}
        yield Comparison(
            f"sampled and embedded, [{rows}, {dim}] x [{vocab}, {dim}] {_name(dtype)}",
            "tied",
            calls,
            {
                "the two ops": partial(
                    one_after_the_other,
                    hidden,
                    weight,
                    weight,
                    bias=None,
                    backend=None,
                    statistics_temperature=0.7,
                    softcap=None,
                    masked=None,
                    **settings,
                ),
                "eager torch": partial(_eager_both, hidden, weight),
            },
            partial(_check_head, first, hidden, weight, settings | {"statistics_temperature": 0.7}),
            {"the two products": lambda h=hidden, w=weight: (h @ w.T) @ w},  # type: ignore[misc]
        )


def commit(device: torch.device) -> Iterator[Comparison]:
    """``commit_step`` by each rule, beside the sort and the sums that it replaces."""
    for batch, length in CANVASES:
        generator = torch.Generator(device).manual_seed(length)
        score = torch.rand(batch, length, generator=generator, device=device)
        masked = torch.rand(batch, length, generator=generator, device=device) < 0.8
        tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
        for rule, bound in (("quota", 8), ("threshold", 0.9), ("entropy_bound", 0.5)):
            step = partial(ops.commit_step, tokens, tokens + 1, score, masked, rule=rule, bound=bound)
            calls = {name: partial(step, backend=name) for name in _backends("commit_step", device, torch.float32)}
            yield Comparison(
                f"A commit of [{batch}, {length}]",
                rule,
                calls,
                {"eager torch": partial(_eager_commit, tokens, tokens + 1, score, masked, rule, bound)},
                partial(_check_commit, calls, partial(step, backend="reference")),
            )


SUITES: dict[str, Suite] = {
    "restricted": restricted,
    "head": head,
    "soft": soft,
    "both": both,
    "commit": commit,
    "square": attention_suites.square,
    "canvas": attention_suites.canvas,
    "prefill": attention_suites.prefill,
    "norm": norm_suites.norm,
    "rope": norm_suites.rope,
    "diffusion_gemma": diffusion_gemma_suite.diffusion_gemma,
    "generate": generate_suite.generate,
    "pycode": generate_suite.pycode,
}


def _noise(rows: int, columns: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(columns)
    return torch.randn(rows, columns, generator=generator, device=device).mul_(scale).to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    skipped = {"reference", "triton"} if device.type == "cpu" else {"reference"}
    return [name for name in ops.available_backends(op, device.type, dtype) if name not in skipped]


def _transformers_draw(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    from transformers.generation import logits_process as processors

    scores, none = logits.float(), torch.empty(0)
    if top_k:
        scores = processors.TopKLogitsWarper(top_k)(none, scores)
    if top_p < 1:
        scores = processors.TopPLogitsWarper(top_p)(none, scores)
    if min_p:
        scores = processors.MinPLogitsWarper(min_p)(none, scores)
    return scores.softmax(-1).multinomial(1)[:, 0]


def _eager_head(hidden: Tensor, weight: Tensor, draws: bool) -> tuple[Tensor, ...]:
    logits = hidden @ weight.T
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    confidence, argmax = probabilities.max(-1)
    entropy = torch.special.entr(probabilities).sum(-1)
    token = probabilities.multinomial(1)[:, 0] if draws else argmax
    return token, confidence, entropy


def _eager_commit(tokens: Tensor, candidates: Tensor, score: Tensor, masked: Tensor, rule: str, bound: float) -> Tensor:
    if rule == "threshold":
        ordered = score.masked_fill(~masked, -torch.inf)
        chosen = (ordered >= bound) | (torch.arange(score.shape[1], device=score.device) == ordered.argmax(1)[:, None])
    else:
        last = -torch.inf if rule == "quota" else torch.inf
        ordered, places = score.masked_fill(~masked, last).sort(dim=1, descending=rule == "quota", stable=True)
        if rule == "quota":
            kept = torch.arange(score.shape[1], device=score.device).expand_as(places) < bound
        else:
            kept = ordered.cumsum(1) - ordered <= bound
        chosen = torch.zeros_like(masked).scatter(1, places, kept)
    return torch.where(chosen & masked, candidates, tokens)


def _eager_both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    logits = (hidden @ weight.T).float() / 0.7
    probabilities = logits.softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1)
    token, argmax = probabilities.multinomial(1)[:, 0], probabilities.argmax(-1)
    return token, argmax, entropy, probabilities.to(weight.dtype) @ weight


def _eager_soft(logits: Tensor, embedding: Tensor) -> Tensor:
    return (logits / 0.7).softmax(-1).to(embedding.dtype) @ embedding


def _check_tokens(calls: Mapping[str, Callable[[], ops.TokenSamples]], logits: Tensor, cut: dict[str, Any]) -> None:
    some = logits[:4].double().cpu()
    truth = ops.sample_tokens(some, temperature=1.0, seed=SEED, backend="reference", **cut)
    for name, call in calls.items():
        if not torch.equal(call().token[:4].cpu(), truth.token):
            raise WrongAnswerError(f"{name} is not timed, it draws other tokens than the reference")


def _check_head(
    calls: Mapping[str, Callable[[], ops.TokenSamples]], hidden: Tensor, weight: Tensor, settings: dict[str, Any]
) -> None:
    rows = slice(0, 4)
    logits = (hidden[rows] @ weight.T).double().cpu()
    truth = ops.sample_tokens(logits, backend="reference", **settings)
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 3e-2
    for name, call in calls.items():
        samples = call()
        # products of 4 rows and of all round differently, so that two near logits may change places
        behind = logits.amax(1) - logits.gather(1, samples.argmax[rows, None].cpu())[:, 0]
        if (behind > tolerance * logits.abs().amax()).any():
            raise WrongAnswerError(f"{name} is not timed, its best tokens are behind the best by {behind}")
        entropy = samples.entropy[rows].cpu().double()
        if not torch.allclose(entropy, truth.entropy, rtol=tolerance, atol=tolerance):
            raise WrongAnswerError(f"{name} is not timed, entropy is {entropy}, in float64 {truth.entropy}")


def _check_commit(calls: Mapping[str, Callable[[], ops.CommitStep]], truth: Callable[[], ops.CommitStep]) -> None:
    for name, call in calls.items():
        if not torch.equal(call().tokens, truth().tokens):
            raise WrongAnswerError(f"{name} is not timed, it commits other tokens than the reference")


def _check_soft(calls: Mapping[str, Callable[[], Tensor]], logits: Tensor, embedding: Tensor) -> None:
    truth = (logits[:4].double() / 0.7).softmax(-1) @ embedding.double()
    tolerance = 1e-4 if embedding.dtype == torch.float32 else 1e-2
    for name, call in calls.items():
        error = (call()[:4].double() - truth).abs().max() / truth.abs().max()
        if error > tolerance:
            raise WrongAnswerError(f"{name} is not timed, its soft embedding is off by {error:.1e}")
