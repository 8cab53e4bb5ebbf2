"""The CUDA backend of ``attention``: one kernel for Hopper, one for every GPU since Ampere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_runtime.ops._attention_problem import AttentionProblem


def load_cuda() -> Callable[[AttentionProblem], tuple[Tensor, Tensor]]:
    from diffusion_runtime import _C_cuda

    def run(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        out, logsumexp = found = problem.outputs()
        with torch.cuda.device(out.device):
            arguments = [*problem.for_kernel().to_operator(), out, logsumexp]
            call = _C_cuda.Attention(*arguments)
            stream = torch.cuda.current_stream().cuda_stream
            call.run(workspace(call.workspace(), out.device, stream), stream)
        return found

    return run


def refuses(problem: AttentionProblem) -> str | None:
    widest = max(problem.query.shape[3], problem.value.shape[3])
    if widest > 512:
        return f"takes heads of up to 512, got {widest}"
    if widest > 256 and problem.query.dtype == torch.float32:
        return f"takes heads of up to 256 in float32, got {widest}"
    capability = torch.cuda.get_device_capability(problem.query.device)
    return f"needs compute capability 8.0, got {capability[0]}.{capability[1]}" if capability < (8, 0) else None


_WORKSPACES: dict[tuple[torch.device, int], Tensor] = {}


def workspace(size: int, device: torch.device, stream: int) -> Tensor:
    """At least ``size`` bytes that were zeroed once and that launches leave ready for the next: one for each stream."""
    if torch.cuda.is_current_stream_capturing():  # a graph keeps its own, as it may be replayed on any stream
        return torch.zeros(size, dtype=torch.uint8, device=device)
    kept = _WORKSPACES.get((device, stream))
    if kept is None or kept.numel() < size:
        kept = _WORKSPACES[device, stream] = torch.zeros(size, dtype=torch.uint8, device=device)
    return kept
