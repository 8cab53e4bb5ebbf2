"""Our drop-ins in the place of torch's modules, in a model that exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from diffusion_runtime.nn.multihead_attention import MultiheadAttention
from diffusion_runtime.nn.torch_norm import RMSNorm
from diffusion_runtime.nn.transformer_encoder_layer import TransformerEncoderLayer

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.RMSNorm: RMSNorm,
}


@dataclass
class Replacement:
    """What :func:`replace_modules` did. Printing it says so, a line per module."""

    swapped: dict[str, nn.Module] = field(default_factory=dict)
    """The modules that run our code now, by name; the model itself has the name ``""``."""
    left: dict[str, str] = field(default_factory=dict)
    """Why the others of these kinds were left as they are, by name."""

    def undo(self) -> None:
        """Give every module that was swapped torch's code back. A second call does nothing."""
        for module in self.swapped.values():
            for theirs, ours in OURS.items():
                if type(module) is ours:
                    module.__class__ = theirs
                    vars(module).pop("backend", None)
        self.swapped = {}

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}: {type(module).__name__}" for name, module in self.swapped.items()]
        return "\n".join(lines + [f"{name or '(the model)'}: left, {reason}" for name, reason in self.left.items()])


def replace_modules(
    model: nn.Module, *, skip: Callable[[str, nn.Module], bool] | None = None, backend: str | None = None
) -> Replacement:
    """Let every ``MultiheadAttention``, ``TransformerEncoderLayer`` and ``RMSNorm`` of torch in a model run our code.

    Each module stays the object that it is and changes its class only, for our subclass of it: parameters, buffers,
    hooks, modes, places in the model (of shared modules too, and the model itself) and what an optimizer or a wrapper
    holds of them stay as they were. A module is left, with the reason in the result, if its type is a subclass of
    torch's or parametrized, if its ``forward`` was replaced on the instance, or if a part that torch reads directly is
    of another type than torch's (quantized, or wrapped by an adapter).

    Args:
        model: any module; changed in place.
        skip: given the name and the module, True for one to be left.
        backend: sets ``module.backend``: the backend of their ops; None for the first that can run each call.

    Returns:
        what was swapped, what was left and why, and :meth:`Replacement.undo`.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Replacement()
    # every name of a shared module is reported
    modules: list[tuple[str, nn.Module]] = list(model.named_modules(remove_duplicate=False))
    for name, module in modules:
        if not isinstance(module, tuple(OURS)) or type(module) in OURS.values():
            continue
        reason = "skip said so" if skip is not None and skip(name, module) else _why_not(module)
        if reason is None:
            report.swapped[name] = module
        else:
            report.left[name] = reason
    for module in report.swapped.values():
        if type(module) in OURS:
            module.__class__ = OURS[type(module)]
            if backend is not None and hasattr(type(module), "backend"):
                module.backend = backend  # type: ignore[assignment]
    return report


def _why_not(module: nn.Module) -> str | None:
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "is parametrized"
    if kind not in OURS:
        return f"is a subclass, {kind.__module__}.{kind.__qualname__}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if isinstance(module, nn.MultiheadAttention):
        return _other_part(module, "out_proj", NonDynamicallyQuantizableLinear, nn.Linear)
    if isinstance(module, nn.TransformerEncoderLayer):
        for name in ("linear1", "linear2"):
            if (reason := _other_part(module, name, nn.Linear)) is not None:
                return reason
        attention = module.self_attn
        if type(attention) is not MultiheadAttention and (reason := _why_not(attention)) is not None:
            return f"its self_attn {reason}"
    return None


def _other_part(module: nn.Module, name: str, *expected: type) -> str | None:
    kind = type(getattr(module, name))
    return None if kind in expected else f"its {name} is a {kind.__module__}.{kind.__qualname__}"
