"""How many kernels a step of the canvas launches after the head: counted on Triton's backend, under its interpreter."""

from __future__ import annotations

import pytest
import torch
from backends import device_of
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from diffusion_runtime import ops

interpreter = pytest.importorskip("triton.runtime.interpreter")

# of these no kernel comes; fill_ is that of poisoned memory
FREE = (
    "fill_",
    "empty",
    "view",
    "unbind",
    "detach",
    "expand",
    "reshape",
    "select",
    "slice",
    "alias",
    "as_strided",
    "permute",
)


class Launches(TorchDispatchMode):
    """Counts torch's operators that would launch a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        if not name.startswith(FREE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(device_of("triton").type == "cuda", reason="counts interpreted launches")
@pytest.mark.parametrize(
    ("rule", "bound", "noise"),
    [("threshold", 0.4, {}), ("entropy_bound", 0.1, {"renoise_vocab": 300, "seed": 5, "step": 3})],
)
def test_a_step_after_the_head_is_three_launches(rule, bound, noise, monkeypatch):
    launches = []
    execute = interpreter.GridExecutor.__call__

    def count(self, *args, **kwargs):
        launches.append(self)
        with _disable_current_modes():  # the interpreter computes with torch's operators, too
            return execute(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    logits, tokens = torch.randn(2, 40, 300) * 3, torch.zeros(2, 40, dtype=torch.int64)
    masked = torch.rand(2, 40) < 0.7

    def step():
        samples = ops.sample_tokens(logits, temperature=0.8, seed=5, step=3, masked=masked, backend="triton")
        score = samples.entropy if rule == "entropy_bound" else samples.confidence
        return ops.commit_step(tokens, samples.token, score, masked, rule=rule, bound=bound, backend="triton", **noise)

    step()
    launches.clear()
    # what a tensor on a CPU is checked for, and a GPU's is not, would count here
    monkeypatch.setattr("diffusion_runtime.ops._sample_tokens.check_distributions", lambda *_: None)
    with Launches() as torch_launches:
        committed = step().commit_mask
    assert committed.any()
    assert torch_launches.names == []
    assert len(launches) == 3
