"""Google's DiffusionGemma of transformers: encoder, decoder over the cache, and whole generations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the transformers extra")

import tiny_transformers as tiny
import transformers

from diffusion_runtime.integrations import _transformers_diffusion_gemma as internals
from diffusion_runtime.integrations import transformers as bridge
from diffusion_runtime.integrations._transformers_attention import Segments

CANVAS, VOCAB = 8, 96
pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"), reason="this transformers has no DiffusionGemma"
)


@pytest.fixture(autouse=True)
def _registered():
    bridge.register()
    yield
    bridge.unregister()


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 6,  # five slide, the last does not
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "top_k_experts": 2,
    "sliding_window": 6,
    "use_bidirectional_attention": "vision",
    "pad_token_id": 0,
}


def make(attention: str, **changes):
    text = transformers.DiffusionGemmaTextConfig(**TEXT | changes)
    vision = transformers.Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    config = transformers.DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=CANVAS,
        image_token_id=VOCAB - 3,
        boi_token_id=VOCAB - 2,
        eoi_token_id=VOCAB - 1,
    )
    model = tiny.build(transformers.DiffusionGemmaForBlockDiffusion, config, attention)
    for weight in model.parameters():
        if weight.ndim == 1:  # of norms, which begin as ones
            weight.data.uniform_(0.7, 1.3)
    return model


def inputs(side: str | None):
    generator = torch.Generator().manual_seed(4)
    prompt = torch.randint(2, VOCAB - 3, (tiny.BATCH, tiny.LENGTH), generator=generator)
    canvas = torch.randint(2, VOCAB - 3, (tiny.BATCH, CANVAS), generator=generator)
    found = {"input_ids": prompt, "decoder_input_ids": canvas}
    if side is not None:
        mask = tiny.padding_mask(side)
        found |= {"attention_mask": mask, "decoder_attention_mask": torch.cat((mask, torch.ones_like(canvas)), 1)}
    return found


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits(side):
    given = inputs(side)
    expected = make("eager")(**given).logits
    torch.testing.assert_close(make(bridge.NAME)(**given).logits, expected, rtol=2e-4, atol=2e-4)


def test_a_second_canvas_over_the_cache():
    """A whole generation draws tokens, and a rounding may flip one: transformers' own two attentions already differ."""
    given, found = inputs(None), []
    for attention in ("eager", bridge.NAME):
        model = make(attention)
        first = model(**given)
        second = model(
            input_ids=given["decoder_input_ids"],
            decoder_input_ids=given["decoder_input_ids"].flip(1),
            past_key_values=first.past_key_values,
        )
        found.append(second.logits)
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
def test_generates():
    model = make(bridge.NAME)
    out = model.generate(input_ids=inputs(None)["input_ids"][:1], max_new_tokens=2 * CANVAS, max_denoising_steps=4)
    assert out.sequences.shape == (1, tiny.LENGTH + 2 * CANVAS)


@pytest.mark.parametrize("parts", [{}, {"norms": False}, {"attention": False, "sampler": False}], ids=str)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_accelerated_logits(side, parts):
    given, model = inputs(side), make("sdpa")
    expected = model(**given).logits
    report = bridge.accelerate(model, **parts)
    assert report.attention == (6 if parts.get("attention", True) else 0)
    assert (report.norms > 60) == parts.get("norms", True)
    assert report.rotary == (12 if parts.get("norms", True) else 0)
    torch.testing.assert_close(model(**given).logits, expected, rtol=2e-4, atol=2e-4)
    bridge.restore(model)
    bridge.restore(model)
    assert torch.equal(model(**given).logits, expected)
    assert not any(isinstance(x, internals.RMSNorm) for x in model.modules())
    assert "_denoising_step" not in vars(model)
    assert not any("forward" in vars(layer) for layer in internals.attention_layers(model))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_attention_that_is_set_to_another_afterwards(cache):
    """An accelerated model whose attention somebody changes reads its cache as that attention does."""
    given, model = inputs(None), make("sdpa")
    expected = model(**given).logits
    bridge.accelerate(model)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(**given).logits, expected, rtol=2e-4, atol=2e-4)
    settings = {"cache_implementation": cache, "disable_compile": True, "max_denoising_steps": 2}
    assert (
        model.generate(input_ids=given["input_ids"][:, :3], max_new_tokens=CANVAS, **settings).sequences.shape[1] == 11
    )


def test_positions_of_each_sequence():
    """Given, they differ from row to row, and so do the angles of queries and keys."""
    given, model = inputs(None), make("sdpa")
    shift = torch.tensor([[0], [7], [100]])
    given |= {
        "position_ids": torch.arange(tiny.LENGTH) + shift,
        "decoder_position_ids": torch.arange(CANVAS) + tiny.LENGTH + 2 * shift,
    }
    expected = model(**given).logits
    bridge.accelerate(model)
    torch.testing.assert_close(model(**given).logits, expected, rtol=2e-4, atol=2e-4)


def test_gradients():
    """Training runs through what was swapped."""
    model = make("sdpa")
    names = [name for name, _ in model.named_parameters() if "layers.0." in name or "layers.5." in name]
    weights = [dict(model.named_parameters())[name] for name in names]
    gradients = []
    for accelerated in (False, True):
        if accelerated:
            bridge.accelerate(model)
        loss = model(**inputs("left")).logits.square().mean()
        gradients.append(torch.autograd.grad(loss, weights, allow_unused=True))
    for name, expected, got in zip(names, *gradients, strict=True):
        assert (expected is None) == (got is None), name
        if expected is not None:
            scale = expected.abs().max().item()
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * scale, msg=name)


def two_canvases(model, cache, side, length):
    """Logits of a canvas behind a prompt, and of one more behind both."""
    generator = torch.Generator().manual_seed(5)
    prompt, *canvases = (torch.randint(2, 90, (tiny.BATCH, n), generator=generator) for n in (length, CANVAS, CANVAS))
    real = torch.ones(tiny.BATCH, length) if side is None else tiny.padding_mask(side, length)
    found = []
    for canvas in canvases:
        if found:
            real = torch.cat((real, torch.ones(tiny.BATCH, prompt.shape[1])), 1)
        found.append(
            model(
                input_ids=prompt,
                attention_mask=real,
                decoder_input_ids=canvas,
                decoder_attention_mask=torch.cat((real, torch.ones_like(canvas)), 1),
                past_key_values=cache,
            ).logits
        )
        prompt = canvases[0]
    return found


@pytest.mark.parametrize("length", [4, 5, 6, 20])  # the window is 6 tokens
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_no_key_is_joined_and_a_static_cache_is_right(monkeypatch, static, side, length):
    """Padded, and past the sliding window: what transformers gives with its dynamic cache."""
    if side is not None and length < 10:
        monkeypatch.setattr(tiny, "PADDED", (0, 1, 3))
    model = make("sdpa")
    text = model.config.get_text_config()
    expected = two_canvases(model, transformers.DynamicCache(config=text), side, length)
    bridge.accelerate(model)

    def join(self):
        raise AssertionError("joined")

    monkeypatch.setattr(Segments, "join", join)
    cache = (
        transformers.StaticCache(config=text, max_cache_len=40) if static else transformers.DynamicCache(config=text)
    )
    got = two_canvases(model, cache, side, length)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def test_a_canvas_that_ends_in_padding(monkeypatch):
    given, model = inputs("left"), make("sdpa")
    given["decoder_attention_mask"][:, -3:] = 0
    expected = model(**given).logits
    bridge.accelerate(model)
    monkeypatch.setattr(Segments, "join", None)
    torch.testing.assert_close(model(**given).logits, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("side", [None, "left"])
def test_generates_the_same_with_either_cache(side):
    """Past the window, padded, twice with one model: nothing is compiled, and nothing kept of the call before."""
    model = make("sdpa")
    for weight in model.parameters():
        weight.data *= 0.5  # or a rounding would grow to another token within a few steps
    bridge.accelerate(model)
    given = {"input_ids": inputs(None)["input_ids"]} if side is None else inputs(side)
    given.pop("decoder_input_ids", None), given.pop("decoder_attention_mask", None)
    for bound in (0.1, 5.0):
        settings = {
            "max_new_tokens": 3 * CANVAS,
            "max_denoising_steps": 3,
            "sampler_config": transformers.models.diffusion_gemma.generation_diffusion_gemma.EntropyBoundSamplerConfig(
                entropy_bound=bound
            ),
        }
        found = []
        for cache in ("dynamic", "static"):
            torch.manual_seed(7)
            found.append(model.generate(**given, cache_implementation=cache, **settings).sequences)
        assert found[0].shape == (tiny.BATCH, tiny.LENGTH + 3 * CANVAS)
        assert torch.equal(*found)


def test_refuses_what_it_does_not_know(monkeypatch):
    with pytest.raises(ValueError, match="the model is a LlamaForCausalLM"):
        bridge.accelerate(tiny.make("llama"))
    model = make("sdpa")
    bridge.accelerate(model)
    with pytest.raises(ValueError, match="accelerated already"):
        bridge.accelerate(model)
    bridge.restore(model)
    monkeypatch.setattr(
        type(model.model.decoder.layers[0].self_attn), "append_to_cache", lambda self, cache, k, v: (k, v)
    )
    with pytest.raises(ValueError, match="joins its decoder's keys in another way"):
        bridge.accelerate(model)
    assert not any("append_to_cache" in vars(layer.self_attn) for layer in model.model.decoder.layers)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    layer = model.model.encoder.language_model.layers[2]
    del layer.self_attn.q_norm
    with pytest.raises(ValueError, match="rotates its heads in another way"):
        bridge.accelerate(model)
    del layer.self_attn
    with pytest.raises(ValueError, match="rotates its heads in another way"):
        bridge.accelerate(model)
    assert not any("forward" in vars(layer) for layer in internals.attention_layers(model) if layer is not None)


def test_the_example_runs_without_a_checkpoint():
    script = Path(__file__).parents[1] / "examples/diffusion_gemma.py"
    command = [sys.executable, "-W", "ignore", str(script), "--random-weights", "why?"]
    settings = ["--max-new-tokens", "64", "--max-denoising-steps", "3"]
    run = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    first, *_, last = run.stdout.strip().splitlines()
    assert first == "Acceleration(attention=6, norms=137, rotary=12, sampler=True, graphs=False)"
    assert last.startswith("64 tokens, 6 steps, ")
