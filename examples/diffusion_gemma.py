"""Answer a prompt with Google's DiffusionGemma, accelerated, and show the drafts while they change.

    python examples/diffusion_gemma.py google/diffusiongemma-26B-A4B-it "Why is the sky blue?"
    python examples/diffusion_gemma.py --random-weights "any text"   # a tiny model, nothing is downloaded

Needs the extras `transformers` and `cli`. The checkpoint takes 52 GB in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers.generation.streamers import BaseStreamer

from diffusion_runtime.integrations.transformers import accelerate

TINY_VOCAB = 256  # a token is a byte


class Drafts(BaseStreamer):
    """Shows decided text plainly and the canvas that is being denoised dimly; what ``generate`` calls a streamer."""

    def __init__(self, decode: Callable[[list[int]], str], live: Live) -> None:
        self.decode, self.live = decode, live
        self.decided: list[int] = []
        self.is_prompt, self.num_drafts = True, 0

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            self.decided += value[0].tolist()
            self._show([])
        self.is_prompt = False

    def put_draft(self, value: torch.Tensor) -> None:
        self.num_drafts += 1
        self._show(value[0].tolist())

    def end(self) -> None:
        self._show([])

    def _show(self, draft: list[int]) -> None:
        text = Text(self.decode(self.decided))
        self.live.update(text.append(self.decode(draft), style="dim"), refresh=True)


def tiny_model() -> Any:
    """The architecture in small, with random weights."""
    text = transformers.DiffusionGemmaTextConfig(
        vocab_size=TINY_VOCAB,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=8,
        top_k_experts=2,
        sliding_window=32,
        pad_token_id=0,
    )
    sizes = ("hidden_size", "intermediate_size", "head_dim")
    counts = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    vision = transformers.Gemma4VisionConfig(**dict.fromkeys(sizes, 16), **dict.fromkeys(counts, 1))
    special = {"image_token_id": 1, "boi_token_id": 2, "eoi_token_id": 3}
    config = transformers.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=32, **special)
    torch.manual_seed(0)
    return transformers.DiffusionGemmaForBlockDiffusion(config).eval()


def visible(tokens: list[int]) -> str:
    """Bytes as one printable character each."""
    return "".join(chr(token) if 32 <= token < 127 else "·" for token in tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="an id on the hub, or a folder; not with --random-weights")
    parser.add_argument("prompt")
    parser.add_argument("--random-weights", action="store_true", help="a tiny model instead of a checkpoint")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-denoising-steps", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if (given.checkpoint is None) != given.random_weights:
        parser.error("give a checkpoint, or --random-weights instead")

    decode: Callable[[list[int]], str]
    if given.random_weights:
        model, decode = tiny_model(), visible
        inputs = {"input_ids": torch.tensor([[max(4, byte) for byte in given.prompt.encode()]])}
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(given.checkpoint)
        model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(given.checkpoint, dtype="auto")
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        turns = [{"role": "user", "content": given.prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        inputs = inputs.to(model.device)

        def decode(tokens: list[int]) -> str:
            return str(tokenizer.decode(tokens, skip_special_tokens=True))

    console = Console()
    console.print(accelerate(model), style="dim")
    torch.manual_seed(given.seed)
    begin = time.perf_counter()
    with Live(console=console, auto_refresh=False) as live:
        drafts = Drafts(decode, live)
        settings = {name: getattr(given, name) for name in ("max_new_tokens", "max_denoising_steps")}
        out = model.generate(**inputs, streamer=drafts, **settings)
    seconds = time.perf_counter() - begin
    tokens = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    rate = f"{seconds:.1f} s, {tokens / seconds:.0f} tokens/s"
    console.print(f"\n{tokens} tokens, {drafts.num_drafts} steps, {rate}", style="dim")


if __name__ == "__main__":
    main()
