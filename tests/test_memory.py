"""What a batch is said to take, against what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import CONFIG

from diffusion_runtime import memory, wrap
from diffusion_runtime.models import LLaDA, LLaDAConfig

# one process that hands all memory back at once, so that its high-water mark is what was alive
MEASURE = """
import json, torch
from bench.memory import peak_extra_mb
from diffusion_runtime import Denoiser, memory
from diffusion_runtime.models import LLaDA, LLaDAConfig, SDAR, SDARConfig
from diffusion_runtime.nn import decoder_layers

sizes = {"vocab_size": 20000, "mask_token_id": 19999}
both = LLaDA(LLaDAConfig(d_model=256, n_layers=2, n_heads=4, mlp_hidden_size=768, **sizes)).eval()
by_blocks = SDAR(SDARConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=768,
                            rope_theta=1e4, **sizes)).eval()
one_call, found = decoder_layers.in_one_call, []
for model, cache, guidance, batch, length in (
    (both, "none", False, 4, 1024), (both, "dual", False, 2, 2048), (both, "prefix", True, 2, 1024),
    (by_blocks, "block", False, 4, 1024),
):
    plan = memory.plan(model, batch=batch, length=length, cache=cache, guidance=guidance)
    measured = []
    for size, run in ((70, one_call), (length, one_call), (length, lambda *_: None)):  # the first loads code
        decoder_layers.in_one_call = run
        denoiser = Denoiser(model, steps_per_block=2, cache=cache, guidance_scale=float(guidance),
                            block_length=None if model is by_blocks else 8)
        prompt = torch.randint(0, 19999, (batch, size - 16))
        measured.append(peak_extra_mb(lambda: denoiser.generate(prompt, max_new_tokens=16), torch.device("cpu"))[1])
        del denoiser
    found.append((cache, plan.total / 1e6, *(plan.weights / 1e6 + peak for peak in measured[1:])))
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of memory")
def test_the_plan_is_what_is_taken():
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", MEASURE], env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for cache, planned, in_one_call, by_modules in json.loads(run.stdout):
        assert abs(planned / by_modules - 1) < 0.1, (cache, planned, by_modules)
        assert in_one_call < 1.1 * planned, (cache, planned, in_one_call)


def llada_8b() -> LLaDA:
    config = LLaDAConfig(4096, 32, 32, 12_288, 126_464, 126_336, rope_theta=500_000.0)
    with torch.device("meta"):
        return LLaDA(config).to(torch.bfloat16)


def test_a_model_that_is_not_there_yet():
    model = llada_8b()
    plan = memory.plan(model, batch=8, length=1280, cache="dual")
    assert plan.weights == 2 * 8_015_581_184
    assert plan.keys == 2 * 32 * 32 * 128 * 2 * (8 * 1280 + 64)
    assert plan.total == plan.weights + plan.keys + plan.step
    twice = memory.plan(model, batch=8, length=1280, cache="dual", guidance=True)
    assert twice.step > 1.9 * plan.step
    assert twice.keys > 1.9 * plan.keys


def test_refuses_what_does_not_fit_and_says_what_would():
    with torch.device("meta"):
        model = LLaDA(LLaDAConfig(4096, 2, 32, 12_288, 126_464, 126_336)).to(torch.bfloat16)
    room = 6_000_000_000
    says = "64 sequences of 4096 positions take .* what would fit: "
    with pytest.raises(MemoryError, match=says) as error:
        memory.require(model, batch=64, length=4096, cache="dual", available=room)
    sequences = int(str(error.value).split("what would fit: ")[1].split(" ")[0])
    fitting = memory.require(model, batch=sequences, length=4096, cache="dual", available=room)
    assert fitting.total <= room
    assert memory.plan(model, batch=sequences + 1, length=4096, cache="dual").total > room
    with pytest.raises(MemoryError, match="nothing, not even the weights with one position"):
        memory.require(model, batch=1, length=10, available=1_000_000)


def test_rejects_bad_input():
    model = LLaDA(CONFIG)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        memory.plan(model, batch=0, length=4)
    with pytest.raises(ValueError, match="cache 'block' needs attention that is causal"):
        memory.plan(model, batch=1, length=4, cache="block")
    with pytest.raises(ValueError, match="cache 'dual' needs a native model"):
        memory.plan(wrap(model, mask_token_id=60), batch=1, length=4, cache="dual")
    assert memory.require(model, batch=1, length=4).total < 100_000_000
