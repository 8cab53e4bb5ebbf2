"""``sample_tokens`` beside what people run today; and its draws among some of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.check import SEED, Truth, WrongAnswerError
from bench.comparison import Comparison
from bench.inputs import backends, dtype_name, instruction_sets, noise
from bench.peers import PEERS, fastest_read, make_peer
from bench.scope import Scope
from diffusion_runtime import ops
from diffusion_runtime.ops._rows import as_rows
from diffusion_runtime.ops._sample_tokens import run_cpp
from diffusion_runtime.ops._settings import Settings

SHAPES = ((64, 126_464), (64, 262_144), (256, 126_464))  # rows, vocab
RESTRICTED = (64, 131_072)
MODES = {"statistics": 0.0, "sampled at 1": 1.0, "sampled at 0.7": 0.7}
CUTS: tuple[dict[str, Any], ...] = ({"top_k": 50, "top_p": 0.9}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05})


def sample_tokens(scope: Scope) -> Iterator[Comparison]:
    """Statistics and draws of every row, beside eager and compiled torch and LLaDA's sampler."""
    for (rows, vocab), dtype in product(scope.some(SHAPES), scope.torch_dtypes()):
        logits = noise(rows, vocab, scope.device, dtype, scale=2.5)
        size = logits.numel() * logits.element_size()
        for mode in list(MODES)[: None if scope.full else 2]:
            torch._dynamo.reset()  # or it would count the variants of the chain, and give up on the ninth
            temperature = MODES[mode]
            mine = {
                name: partial(ours, logits, temperature, name)
                for name in backends("sample_tokens", scope.device, dtype)
            }
            if (rows, vocab) == SHAPES[0] and scope.device.type == "cpu":
                mine |= {
                    f"cpp {name}": partial(_with_instructions, logits, temperature, name)
                    for name in instruction_sets()[1:]
                }
            compiled = [] if scope.level == "quick" else ["torch.compile"]
            peers = {
                name: partial(make_peer(name, temperature, scope.device), logits)
                for name in PEERS
                if name != "torch.compile" or compiled
            }
            limits = {"a read": fastest_read(logits)}
            if scope.device.type == "cuda":
                limits["half a copy"] = partial(_half_a_copy, logits)
            yield Comparison(
                f"sample_tokens on [{rows}, {vocab}] {dtype_name(dtype)}",
                mode,
                mine,
                peers,
                partial(check, mine, peers, Truth(logits, temperature)),
                limits,
                num_bytes=size,
            )


def ours(logits: Tensor, temperature: float, backend: str) -> dict[str, Tensor]:
    """The public call, by a backend."""
    return ops.sample_tokens(logits, temperature=temperature, seed=SEED, backend=backend)._asdict()


def _with_instructions(logits: Tensor, temperature: float, instruction_set: str) -> dict[str, Tensor]:
    """The C++ backend as a CPU without the newest instructions has it."""
    ids, statistics = run_cpp(as_rows(logits), Settings(temperature=temperature, seed=SEED), instruction_set)
    names = ("logprob", "confidence", "margin", "entropy", "logsumexp")
    return dict(zip(("token", "argmax"), ids, strict=True)) | dict(zip(names, statistics, strict=True))


def _half_a_copy(logits: Tensor) -> Tensor:
    """Reads one half and writes it: as many bytes as one read of all."""
    return logits[: len(logits) // 2].clone()


def check(
    ours: Mapping[str, Callable[[], dict[str, Tensor]]],
    peers: Mapping[str, Callable[[], dict[str, Tensor]]],
    truth: Truth,
) -> None:
    """Hold every answer to that in float64."""
    for name, call in {**ours, **peers}.items():
        truth.check(name, call(), ours=name in ours)


def restricted(scope: Scope) -> Iterator[Comparison]:
    """Draws among some of the tokens, beside transformers' processors and ``multinomial``."""
    rows, vocab = RESTRICTED
    for dtype in scope.torch_dtypes():
        logits = noise(rows, vocab, scope.device, dtype, scale=2.5)
        for cut in scope.some(CUTS):
            sample = partial(ops.sample_tokens, logits, temperature=1.0, seed=SEED, **cut)
            calls = {name: partial(sample, backend=name) for name in backends("sample_tokens", scope.device, dtype)}
            yield Comparison(
                f"Restricted draws on [{rows}, {vocab}] {dtype_name(dtype)}",
                ", ".join(f"{name} {value}" for name, value in cut.items()),
                calls,
                {"transformers": partial(_transformers_draw, logits, **cut)},
                partial(_check_tokens, calls, logits, cut),
                {"a read": fastest_read(logits)},
                num_bytes=logits.numel() * logits.element_size(),
            )


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


def _check_tokens(calls: Mapping[str, Callable[[], ops.TokenSamples]], logits: Tensor, cut: dict[str, Any]) -> None:
    some = logits[:4].double().cpu()
    truth = ops.sample_tokens(some, temperature=1.0, seed=SEED, backend="reference", **cut)
    for name, call in calls.items():
        if not torch.equal(call().token[:4].cpu(), truth.token):
            raise WrongAnswerError(f"{name} is not timed, it draws other tokens than the reference")
