"""Our ways to run ``sample_tokens`` and its peers, as calls of one shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.check import SEED
from bench.peers import PEERS, READS, Answer, make_peer
from diffusion_runtime import ops
from diffusion_runtime.ops._rows import as_rows
from diffusion_runtime.ops._sample_tokens import run_cpp
from diffusion_runtime.ops._settings import Settings

OP = "sample_tokens"


@dataclass(frozen=True)
class Runner:
    name: str
    kind: str  # one of bench.record.KINDS
    call: Callable[[Tensor], Answer]


def default_backends(device: torch.device, dtype: torch.dtype, op: str = OP) -> list[str]:
    """What a user can get: not the reference, and not Triton's interpreter."""
    skipped = {"reference", "triton"} if device.type == "cpu" else {"reference"}
    return [name for name in ops.available_backends(op, device.type, dtype) if name not in skipped]


def our_runner(backend: str, temperature: float) -> Runner:
    def call(logits: Tensor) -> Answer:
        return ops.sample_tokens(logits, temperature=temperature, seed=SEED, backend=backend)._asdict()

    return Runner(backend, "ours", call)


def instruction_set_runners(temperature: float) -> list[Runner]:
    """The C++ backend with each instruction set that this CPU has; none where it is not built."""
    try:
        from diffusion_runtime import _C
    except ImportError:
        return []

    def call(logits: Tensor, instruction_set: str) -> Answer:
        settings = Settings(temperature=temperature, seed=SEED)
        ids, statistics = run_cpp(as_rows(logits), settings, instruction_set)
        return dict(zip(("token", "argmax"), ids, strict=True)) | dict(
            zip(("logprob", "confidence", "margin", "entropy", "logsumexp"), statistics, strict=True)
        )

    return [
        Runner(f"cpp {name}", "instruction set", partial(call, instruction_set=name)) for name in _C.instruction_sets()
    ]


def peer_runners(temperature: float, device: torch.device) -> list[Runner]:
    return [Runner(name, "peer", make_peer(name, temperature, device)) for name in PEERS]


def limit_runners(device: torch.device) -> list[Runner]:
    """Pure reads of the logits and, on a GPU, a copy of them."""

    def read(logits: Tensor, form: str) -> Answer:
        return {"read": READS[form](logits)}

    runners = [Runner(form, "read", partial(read, form=form)) for form in READS]
    if device.type == "cuda":
        targets: dict[torch.Size, Tensor] = {}

        def copy(logits: Tensor) -> Answer:
            if logits.shape not in targets:
                targets[logits.shape] = torch.empty_like(logits)
            return {"copy": targets[logits.shape].copy_(logits)}

        runners.append(Runner("copy", "copy", copy))
    return runners
