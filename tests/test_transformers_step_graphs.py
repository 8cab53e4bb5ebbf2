"""Steps of DiffusionGemma that are recorded and replayed: the same as those that are not.

A CUDA graph is stood in for by a tape of torch's operations, so that every op runs its reference.
"""

from __future__ import annotations

import functools
import gc
import logging

import pytest
import torch

pytest.importorskip("transformers", reason="needs the transformers extra")

from tape import Tape
from test_transformers_diffusion_gemma import CANVAS, VOCAB, make
from test_transformers_diffusion_gemma import pytestmark as needs_diffusion_gemma
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.models.diffusion_gemma import generation_diffusion_gemma as stock

from diffusion_runtime import ops
from diffusion_runtime.integrations import _transformers_step_graphs as step_graphs
from diffusion_runtime.integrations import transformers as bridge

pytestmark = [
    needs_diffusion_gemma,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch's own, of its compiler
]


@pytest.fixture(autouse=True)
def _references_only(monkeypatch):
    for name in ("rms_norm", "qk_norm_rope", "commit_step"):
        monkeypatch.setattr(ops, name, functools.partial(getattr(ops, name), backend="reference"))
    sample = ops.sample_with_soft_embedding

    def of_all_rows(*tensors, masked, **settings):
        """On a GPU the kernel counts rows on the device; on a CPU the op gathers them, which a graph cannot."""
        samples, signal = sample(*tensors, backend="reference", **settings)
        kept = (torch.where(masked, x, 0 if x.is_floating_point() else -1) for x in samples)
        return ops.TokenSamples(*kept), torch.where(masked[..., None], signal, 0)

    monkeypatch.setattr(ops, "sample_with_soft_embedding", of_all_rows)
    yield
    bridge.unregister()


def accelerated():
    torch.manual_seed(0)
    model = make("sdpa")
    for name, weight in model.named_parameters():
        if weight.ndim > 1:  # sure of some tokens, so that rows finish, each in its time
            weight.data *= 0.6 if "embed_tokens" in name else 0.15
    bridge.accelerate(model, backend="reference")
    return model


def generate(model, *, batch: int = 3, length: int = 11, **settings):
    """The whole generation of two canvases, and copies of what each step left."""
    step, taken = model._denoising_step, []

    def watched(**arguments):
        live = ~arguments["finished_denoising"].clone()
        canvas, argmax, carried, finished = step(**arguments)
        left = [canvas, argmax, finished, arguments["sampler"].accepted_token_mask & live[:, None]]
        if not isinstance(carried, torch.Tensor):
            left += [carried.signal, carried.hidden, carried.temperature]
        history = arguments["diffusion_stopping_criteria"].argmax_canvas_history
        taken.append([x.clone() for x in (*left, *([] if history is None else [history]))])
        return canvas, argmax, carried, finished

    settings = {
        "sampler_config": stock.EntropyBoundSamplerConfig(entropy_bound=5.0),
        "stability_threshold": 0,
        "confidence_threshold": 2.9,
        "max_denoising_steps": 7,
        **settings,
    }
    prompt = torch.randint(2, VOCAB - 3, (batch, length), generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([0, 4, 2])[:batch]
    mask = (torch.arange(length) >= padding[:, None]).long()
    model._denoising_step = watched
    torch.manual_seed(0)
    try:
        prompt, mask = prompt.to(model.device), mask.to(model.device)
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=2 * CANVAS, eos_token_id=None, **settings)
    finally:
        model._denoising_step = step
    return out, taken


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(all(map(torch.equal, *pair)) for pair in zip(ours, theirs, strict=True))


class Recorder:
    """Tapes, counted."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0
        self.waiting: set[str] = set()

    def __call__(self, run):
        self.num_recorded += 1
        tape = Tape(run)
        self.waiting |= tape.waiting

        def counted():
            self.num_replayed += 1
            tape.replay()

        return counted


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stability", [0, 2])
def test_replayed_steps_are_the_same(cache, batch, stability):
    model, record = accelerated(), Recorder()
    settings = {"batch": batch, "cache_implementation": cache, "stability_threshold": stability}
    expected, steps = generate(model, **settings)
    model._step_graphs = step_graphs.StepGraphs(record, required=True)
    got, replayed = generate(model, **settings)
    assert same(replayed, steps)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(got.tokens_per_forward, expected.tokens_per_forward)
    assert record.num_recorded == 2
    # nothing but what only a CPU checks, and the draw's reference, looks at a result
    assert record.waiting <= {"_rows.py", "_attention_arguments.py", "_sample_tokens.py", "_restriction.py"}
    assert record.num_replayed == len(steps) - 2 * step_graphs.NUM_EAGER


def test_what_is_recorded_goes_with_the_generation():
    model = accelerated()
    model._step_graphs = step_graphs.StepGraphs(Recorder(), required=True)
    generate(model)
    gc.collect()
    assert not model._step_graphs.canvases
    bridge.restore(model)
    assert not hasattr(model, "_step_graphs")


def test_a_step_that_cannot_be_recorded_is_taken_as_it_comes(caplog):
    def refuses(run):
        raise RuntimeError("not while a stream is being captured")

    model = accelerated()
    expected, steps = generate(model)
    model._step_graphs = step_graphs.StepGraphs(refuses, required=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            got, taken = generate(model)
            assert same(taken, steps)
            assert torch.equal(got.sequences, expected.sequences)
    assert [record.message for record in caplog.records if "recorded" in record.message] == [
        "the denoising step cannot be recorded, and is not replayed from now on: not while a stream is being captured"
    ]
    model._step_graphs = step_graphs.StepGraphs(refuses, required=True)
    with pytest.raises(RuntimeError, match="not while a stream is being captured"):
        generate(model)


class Unchanged(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


def test_steps_that_make_logits_are_not_recorded():
    model, record = accelerated(), Recorder()
    model._step_graphs = step_graphs.StepGraphs(record, required=True)
    _, steps = generate(model, logits_processor=LogitsProcessorList([Unchanged()]))
    assert len(steps) > 2 * step_graphs.NUM_EAGER
    assert record.num_recorded == 0


def test_a_state_that_somebody_changed_is_heard():
    """A step may be given other tensors than the step before returned."""

    def changed(model):
        step = model._denoising_step

        def other(**arguments):
            arguments["current_canvas"] = (arguments["current_canvas"] + 1) % VOCAB
            return step(**arguments)

        model._denoising_step = other
        try:
            return generate(model)
        finally:
            model._denoising_step = step

    model = accelerated()
    expected, steps = changed(model)
    model._step_graphs = step_graphs.StepGraphs(Recorder(), required=True)
    got, taken = changed(model)
    assert same(taken, steps)
    assert torch.equal(got.sequences, expected.sequences)


def test_refuses_graphs_that_cannot_be():
    model = accelerated()
    bridge.restore(model)
    with pytest.raises(ValueError, match="graphs need sampler=True and a model on a GPU, got sampler=True on cpu"):
        bridge.accelerate(model, graphs=True)
    with pytest.raises(ValueError, match="graphs must be \"auto\", True or False, got 'yes'"):
        bridge.accelerate(model, graphs="yes")
    assert not bridge.accelerate(model, graphs=False).graphs


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_cuda_graphs_are_the_same(batch, monkeypatch):
    monkeypatch.undo()  # our kernels, not their references
    model = accelerated()
    bridge.restore(model)
    model.cuda()
    bridge.accelerate(model, graphs=False)
    expected, steps = generate(model, batch=batch)
    bridge.restore(model)
    assert bridge.accelerate(model, graphs=True).graphs
    got, taken = generate(model, batch=batch)
    assert same(taken, steps)
    assert torch.equal(got.sequences, expected.sequences)
