"""A whole denoising step of DiffusionGemma through transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.check import WrongAnswerError
from bench.comparison import Comparison
from bench.inputs import dtype_name
from bench.scope import Scope


@dataclass(frozen=True)
class Size:
    """A configuration with random weights, and what is asked of it."""

    name: str
    text: dict[str, Any]
    prompts: tuple[tuple[int, int], ...] = ((1, 512),)  # batch, length
    dtype: torch.dtype = torch.float32
    canvas: int = 256
    static_up_to: int = 0  # the longest prompt with which transformers' compiled path is timed as well


_SMALL = {
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 1,
    "top_k_experts": 8,
    "num_experts": 32,
    "sliding_window": 256,
}
SIZES: dict[str, tuple[Size, ...]] = {
    "cpu": (
        Size(
            "6 layers of 128, vocabulary 1,024",
            _SMALL
            | {"vocab_size": 1024, "hidden_size": 128, "head_dim": 32, "global_head_dim": 64}
            | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 16, "top_k_experts": 4}
            | {"intermediate_size": 192, "moe_intermediate_size": 64, "sliding_window": 64},
            prompts=((1, 40),),
            canvas=32,
        ),
        Size(
            "6 layers of 256, vocabulary 262,144",
            _SMALL
            | {"vocab_size": 262_144, "hidden_size": 256, "head_dim": 64, "global_head_dim": 128}
            | {"intermediate_size": 256, "moe_intermediate_size": 64},
        ),
        Size(
            "6 layers of 704, vocabulary 262,144",
            _SMALL
            | {"vocab_size": 262_144, "hidden_size": 704, "head_dim": 256, "global_head_dim": 512}
            | {"intermediate_size": 704, "moe_intermediate_size": 176},
        ),
    ),
    "cuda": (
        Size(
            "the 26B-A4B release",
            {
                "vocab_size": 262_144,
                "hidden_size": 2816,
                "num_hidden_layers": 30,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 256,
                "global_head_dim": 512,
                "num_global_key_value_heads": 2,
                "intermediate_size": 2112,
                "moe_intermediate_size": 704,
                "num_experts": 128,
                "top_k_experts": 8,
                "sliding_window": 1024,
            },
            prompts=((1, 1024), (1, 16_384), (8, 1024)),
            dtype=torch.bfloat16,
            static_up_to=1024,
        ),
    ),
}


def step(scope: Scope) -> Iterator[Comparison]:
    """A denoising step of an accelerated model beside one of the same weights as transformers has them."""
    from diffusion_runtime.integrations.transformers import accelerate, restore, unregister

    device = scope.device
    for size in scope.some(SIZES[device.type]):
        stock = _model(size, device)
        ours = copy.deepcopy(stock, {id(weight): weight for weight in stock.parameters()})  # the same weights
        accelerate(ours)
        for batch, length in size.prompts:
            generator = torch.Generator(device).manual_seed(length)
            vocab = size.text["vocab_size"] - 3  # the last stand for images
            prompt = torch.randint(4, vocab, (batch, length), generator=generator, device=device)
            peers = {"transformers": _step(stock, prompt, size)}
            if length <= size.static_up_to and batch == 1:
                peers["transformers, compiled"] = _step(stock, prompt, size, cache_implementation="static")
            yield Comparison(
                f"DiffusionGemma, {size.name}, {dtype_name(size.dtype)}: {size.canvas} tokens a step",
                f"{batch} x {length} tokens before it",
                {"accelerated": _step(ours, prompt, size)},
                peers,
                partial(_check, ours, stock, prompt, size),
            )
        restore(ours)
        unregister()


def _model(size: Size, device: torch.device) -> Any:
    import transformers

    vocab = size.text["vocab_size"]
    text = transformers.DiffusionGemmaTextConfig(**size.text, pad_token_id=0)
    sizes = ("hidden_size", "intermediate_size", "head_dim")
    counts = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    vision = transformers.Gemma4VisionConfig(**dict.fromkeys(sizes, 16), **dict.fromkeys(counts, 1))
    special = {"image_token_id": vocab - 3, "boi_token_id": vocab - 2, "eoi_token_id": vocab - 1}
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=size.canvas, **special
    )
    torch.manual_seed(0)
    with device:
        model = transformers.DiffusionGemmaForBlockDiffusion._from_config(config, dtype=size.dtype)
    return model.eval()


def _step(model: Any, prompt: torch.Tensor, size: Size, **settings: Any) -> Callable[[], Any]:
    """The last step of a generation, with all that it needs: it can be taken any number of times."""
    arguments: dict[str, Any] = {}
    step = model._denoising_step

    def noted(**given: Any) -> Any:
        arguments.update(given)
        return step(**given)

    model._denoising_step = noted
    try:
        torch.manual_seed(0)
        model.generate(
            prompt,
            max_new_tokens=size.canvas,
            max_denoising_steps=2,  # the second is conditioned on the first
            confidence_threshold=1e-12,  # random weights are never so sure: nobody finishes
            eos_token_id=None,
            **settings,
        )
    finally:
        model._denoising_step = step
    return partial(torch.no_grad()(step), **arguments)


def _check(ours: Any, stock: Any, prompt: torch.Tensor, size: Size) -> None:
    """The same logits on the same canvas; what a step makes of them is the suite of tests' to hold.

    On the mean: with random weights a rounding sends some tokens to other experts, and their logits are others then.
    """
    generator = torch.Generator(prompt.device).manual_seed(1)
    shape = (len(prompt), size.canvas)
    canvas = torch.randint(4, size.text["vocab_size"], shape, generator=generator, device=prompt.device)
    got, expected = (model(input_ids=prompt, decoder_input_ids=canvas).logits[:1].float() for model in (ours, stock))
    error = (got - expected).abs().mean() / expected.abs().mean()
    if not error <= (0.02 if size.dtype == torch.float32 else 0.5):
        raise WrongAnswerError(f"accelerated is not timed, its logits are off by {error:.1e} on the mean")
