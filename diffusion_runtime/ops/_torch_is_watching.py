"""When a call must go through its ``torch.library`` operator."""

from __future__ import annotations

import torch
from torch import Tensor


def torch_is_watching(*tensors: Tensor | None) -> bool:
    """Whether a graph is traced, a transform is active, or gradients are wanted: other eager calls need no operator."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    recording = torch.is_grad_enabled()
    return any(x is not None and (type(x) not in _PLAIN or (recording and x.requires_grad)) for x in tensors)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd would record what is done with these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)  # of a subclass torch must hear
