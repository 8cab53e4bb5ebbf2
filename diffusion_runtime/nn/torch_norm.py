"""``torch.nn.RMSNorm`` in one pass over its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusion_runtime import ops


class RMSNorm(nn.RMSNorm):
    """torch's module: ``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimensions, rounded once.

    Its arguments, parameters, state dict and outputs are torch's. For the norm of Llama, which rounds before the
    weight, see :class:`LlamaRMSNorm`. ``backend`` is as for :func:`ops.rms_norm`. Computed by torch itself: nested
    tensors, a weight of another dtype than ``x``, a half-precision ``x`` without ``eps`` (torch adds the machine
    epsilon of fp32 on some devices there and of ``x`` on others), shapes that do not match, and calls under autocast.
    """

    backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., *normalized_shape]`` in, the same shape out."""
        if not self._takes(x):
            out: Tensor = super().forward(x)
            return out
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        sizes = self.normalized_shape
        if len(sizes) == 1:
            return ops.rms_norm(x, self.weight, eps=eps, backend=self.backend)
        weight = None if self.weight is None else self.weight.flatten()
        return ops.rms_norm(x.flatten(-len(sizes)), weight, eps=eps, backend=self.backend).view_as(x)

    def _takes(self, x: Tensor) -> bool:
        if x.is_nested or not x.is_floating_point() or x.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            return False
        if (self.weight is not None and self.weight.dtype != x.dtype) or torch.is_autocast_enabled(x.device.type):
            return False
        return self.eps is not None or x.dtype in (torch.float32, torch.float64)
