"""What the training scripts share: an optimizer for matrices and one for the rest, a schedule, an average, a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_runtime.models import LanguageModel


def optimizers(objective: nn.Module, layers: str, lr: float, matrix_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest; AdamW for all where ``matrix_lr`` is 0.

    Args:
        objective: what is trained.
        layers: a word in the names of the layers' parameters.
        lr: of AdamW.
        matrix_lr: of Muon.
    """
    named = list(objective.named_parameters())
    matrices = [p for name, p in named if layers in name and p.ndim == 2 and matrix_lr > 0]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    if not matrices:
        return [adam]
    return [adam, Muon(matrices, lr=matrix_lr, weight_decay=0.01)]


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` (Jordan et al., 2024) with ``adjust_lr_fn="match_rms_adamw"``, in float32.

    Torch's orthogonalises in bfloat16, which many CPUs only emulate: for 3 million parameters 5 s instead of 0.2 s.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Matrices of one shape are orthogonalised together."""
        del closure
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                updates = []
                for matrix in matrices:
                    average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                    average.lerp_(matrix.grad, 1 - group["momentum"])
                    updates.append(matrix.grad.lerp(average, group["momentum"]))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(matrices[0].shape) ** 0.5
                torch._foreach_sub_(matrices, list(orthogonal(torch.stack(updates)) * (size * group["lr"])))


def orthogonal(x: Tensor, num_steps: int = 5) -> Tensor:
    """Near the closest matrix with orthogonal rows or columns, by Newton and Schulz: ``[count, rows, columns]``."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(num_steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Scheduled:
    """Optimizers that share a schedule: up linearly, then down a cosine to zero."""

    def __init__(self, steps: Iterable[torch.optim.Optimizer], warm_up: float) -> None:
        self.steps = list(steps)
        self.warm_up = warm_up
        self._groups = [group for step in self.steps for group in step.param_groups]
        self._peaks = [group["lr"] for group in self._groups]

    def step(self, parameters: Iterable[Tensor], progress: float) -> None:
        """One step along clipped gradients, which are then forgotten; ``progress`` is in [0, 1]."""
        factor = min(1.0, progress / self.warm_up) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for step in self.steps:
            step.step()
            step.zero_grad(set_to_none=True)


class Average:
    """A running average of a model's weights, which forgets the beginning sooner."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self._model, self._decay, self._num_steps = model, decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """After a step."""
        self._num_steps += 1
        decay = min(self._decay, self._num_steps / (self._num_steps + 10))
        torch._foreach_lerp_(list(self.weights.values()), [p.detach() for p in self._model.parameters()], 1 - decay)


def save(model: LanguageModel, folder: Path, more: dict[str, Any]) -> None:
    """Write ``config.json``, with further keys, and the weights rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {name: value for name, value in asdict(model.config).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(more | known | {"torch_dtype": "bfloat16"}, indent=2) + "\n")
    weights = {name: weight.detach().cpu().bfloat16().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
