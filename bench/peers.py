"""What people run today, and the limits of the machine, in the forms that were fastest where we measured.

Each peer takes ``[rows, vocab]`` logits and gives what it finds under the names of ``TokenSamples``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.timing import CudaTimer, cpu_ms

Answer = dict[str, Tensor]
Peer = Callable[[Tensor], Answer]

PEERS = ("eager torch", "torch.compile", "LLaDA, float64", "Dream")


def make_peer(name: str, temperature: float, device: torch.device) -> Peer:
    if name == "eager torch":
        return partial(torch_chain, temperature=temperature, draw=multinomial)
    if name == "LLaDA, float64":
        return partial(float64_gumbel, temperature=temperature)
    if name == "Dream":
        return partial(dream_entropy, temperature=temperature)
    if name == "torch.compile":
        # The exponential race fuses with its neighbours; multinomial stays a call outside the generated code, which
        # took twice as long. On a CPU one compilation serves every number of rows: the code is as fast, and the
        # compiler is slow. On a GPU the number of rows decides how a reduction is split.
        chain = partial(torch_chain, temperature=temperature, draw=exponential_race)
        return torch.compile(chain, fullgraph=True, dynamic=None if device.type == "cpu" else False)
    raise ValueError(f"unknown peer {name!r}; expected one of {', '.join(PEERS)}")


def torch_chain(logits: Tensor, *, temperature: float, draw: Callable[[Tensor], Tensor]) -> Answer:
    """Everything that ``sample_tokens`` gives but the logsumexp, written with torch."""
    logprobs = torch.log_softmax(logits.float(), -1)
    probabilities = logprobs.exp()
    confidence, argmax = probabilities.max(-1)
    # faster than topk(2), by a lot where it is compiled
    second = probabilities.scatter(-1, argmax[:, None], 0.0).amax(-1)
    entropy = -(probabilities * logprobs).sum(-1)
    if temperature == 0:
        token = argmax
    elif temperature == 1:
        token = draw(probabilities)
    else:
        token = draw(torch.softmax(logits.float() / temperature, -1))
    return {
        "token": token,
        "logprob": logprobs.gather(-1, token[:, None])[:, 0],
        "argmax": argmax,
        "confidence": confidence,
        "margin": confidence - second,
        "entropy": entropy,
    }


def multinomial(probabilities: Tensor) -> Tensor:
    return probabilities.multinomial(1)[:, 0]


def exponential_race(probabilities: Tensor) -> Tensor:
    """The token whose exponential clock, of rate its probability, rings first."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def dream_entropy(logits: Tensor, *, temperature: float) -> Answer:
    """How Dream's published sampler picks a token, and its statistic where it ranks by entropy."""
    probabilities = torch.softmax(logits / temperature if temperature > 0 else logits, -1)
    if temperature > 0:
        token = torch.distributions.Categorical(probs=probabilities, validate_args=False).sample()
    else:
        token = probabilities.max(-1).indices
    entropy = -(probabilities * torch.log(probabilities + 1e-10)).sum(-1)
    # at another temperature it is that of another distribution than ours, and in 16 bits it is rounded at every step
    comparable = temperature in (0, 1) and logits.dtype == torch.float32
    return {"token": token, "entropy": entropy} if comparable else {"token": token}


def float64_gumbel(logits: Tensor, *, temperature: float) -> Answer:
    """How LLaDA's and Fast-dLLM's published samplers pick a token, and the one statistic they need, its probability."""
    wide = logits.double()
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        noise = (-torch.rand_like(wide).log()) ** temperature
        token = (wide.exp() / noise).argmax(-1)
    probability = torch.softmax(wide, -1).gather(-1, token[:, None])[:, 0]
    return {"token": token, "logprob": probability.log()}


# every byte once, and next to no arithmetic
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "amax of int32": lambda logits: logits.view(torch.int32).amax(-1),
    "amax of float32": lambda logits: logits.view(torch.float32).amax(-1),
    "sum of float32": lambda logits: logits.view(torch.float32).sum(),
}


def fastest_read(logits: Tensor) -> Callable[[], Tensor]:
    """The form of :data:`READS` that is the fastest on these logits, and so the strictest limit."""
    calls = {name: partial(read, logits) for name, read in READS.items()}
    timer = CudaTimer(logits.device) if logits.is_cuda else cpu_ms
    ms = {name: min(timer(call) for _ in range(3)) for name, call in calls.items()}
    return calls[min(ms, key=ms.__getitem__)]
