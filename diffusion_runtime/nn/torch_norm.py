"""``torch.nn.RMSNorm``, computed by torch's own function."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.RMSNorm):
    """torch's module: ``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimensions, rounded once.

    Its arguments, parameters, state dict and outputs are torch's. For the norm of Llama, which rounds before the
    weight, see :class:`LlamaRMSNorm`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., *normalized_shape]`` in, the same shape out."""
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
