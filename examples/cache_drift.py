"""How far the approximate caches are from no cache: the logits of undecided positions, at every step of a generation.

    python examples/cache_drift.py                      # a LLaDA with random weights
    python examples/cache_drift.py --checkpoint FOLDER  # or one of your own

Both read the same tokens at each step, those that the generation with the cache came to. Printed are the root mean
square of the difference of their logits, as a share of that of the logits about their mean, and the share of positions
whose most probable token is another; over all steps, and in the last quarter of each block, where keys are oldest.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_runtime import Denoiser, load
from diffusion_runtime.models import LanguageModel, LLaDA, LLaDAConfig


def random_model(width: int, layers: int, vocab: int) -> LLaDA:
    """Weights that keep the size of what they are given, so that attention looks at some tokens more than at others."""
    config = LLaDAConfig(
        d_model=width,
        n_layers=layers,
        n_heads=width // 64,
        mlp_hidden_size=3 * width,
        vocab_size=vocab,
        mask_token_id=vocab - 1,
    )
    model = LLaDA(config).requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def drift(
    model: LanguageModel, prompts: Tensor, new: int, block: int, cache: str, interval: int | None
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """After each step how far its block was along, and at undecided positions the error and whether the token differs.

    The error is ``[rows]``, a share of the size of the logits.
    """
    denoiser = Denoiser(model, policy="low_confidence", block_length=block, cache=cache, refresh_interval=interval)
    hidden, computed = model.hidden, {}

    def watched(tokens: Tensor, context: Any) -> Tensor:
        states = hidden(tokens, context)
        computed["states"], computed["first"] = states, context.positions(tokens).flatten()[0]
        return states

    before = functional.pad(prompts, (0, new), value=model.mask_token_id)
    model.hidden = watched  # type: ignore[method-assign]
    try:
        for step in denoiser.stream(prompts, max_new_tokens=new):
            place = step.blocks[0]
            got = computed["states"][:, place.start - computed["first"] :][:, : place.stop - place.start]
            undecided = before[:, place] == model.mask_token_id
            logits, exact = (functional.linear(x[undecided], *model.head) for x in (got, hidden(before)[:, place]))
            size = (exact - exact.mean(-1, keepdim=True)).square().mean(-1)
            yield (
                1 - float(undecided.float().mean()),
                ((logits - exact).square().mean(-1) / size).sqrt(),
                logits.argmax(-1) != exact.argmax(-1),
            )
            before = step.tokens
    finally:
        del model.hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a folder; its model must see all positions, both ways")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="random tokens")
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = load(args.checkpoint) if args.checkpoint else random_model(args.width, args.layers, args.vocab)
    prompts = torch.randint(model.mask_token_id, (args.batch, args.prompt))
    print("block cache    refresh   error other token late: error  token")
    for block in (16, 32, 64):
        for cache, interval in (("prefix", None), ("dual", None), ("dual", 8), ("dual", 2)):
            steps = list(drift(model, prompts, args.new, block, cache, interval))
            shares = []
            for chosen in (steps, [step for step in steps if step[0] >= 0.75]):
                shares += [float(torch.cat(part).float().mean()) for part in list(zip(*chosen, strict=True))[1:]]
            numbers = "{:7.2%} {:11.2%} {:11.2%} {:6.2%}".format(*shares)
            print(f"{block:5d} {cache:8s} {interval or '-':>7} {numbers}", flush=True)


if __name__ == "__main__":
    main()
