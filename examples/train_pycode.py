"""Train the Python model that ships: block diffusion over the standard library's sources, within a time budget.

    python examples/train_pycode.py --minutes 120 --output pycode/
    python examples/train_pycode.py --minutes 120 --from pycode/ --next-token 0 --seed 1 --output better/

First for a share of the time next-token prediction, which learns from every token of a plain forward; then block
diffusion, as SDAR is made from Qwen3 (Cheng et al., 2025). There each window is seen three times at once: as it is, and
twice with masks in every block, the second time where the first has none, so that every token is asked for once
(complementary masking, as in Fast-dLLM v2 and LLaDA2); blocks with masks see those before them as they are.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pycode_data
import torch
from torch import Tensor, nn
from torch.nn import functional
from training import Average, Scheduled, optimizers, save

from diffusion_runtime import load
from diffusion_runtime.models import SDAR, SDARConfig
from diffusion_runtime.nn import AttentionContext

MASK, END = 0, 1


class Causal(AttentionContext):
    """Every position sees those up to itself."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        del layer
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


@dataclass(frozen=True, eq=False)
class CleanAndMasked(AttentionContext):
    """Sequences of three windows of ``length``: one as it is, two with masks.

    The first is causal from block to block; each block of the others sees itself and the blocks before it in the first.
    """

    length: int = 256
    block: int = 32

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(self.length, device=tokens.device).repeat(3)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        del layer
        length, block = self.length, self.block
        number = torch.arange(length, device=query.device) // block
        query = query * query.shape[-1] ** -0.5
        clean_key, clean_value = key[:, :, :length].transpose(2, 3), value[:, :, :length]
        seen = (query[:, :, :length] @ clean_key).masked_fill(number > number[:, None], -torch.inf)
        first = seen.softmax(-1) @ clean_value
        masked_query, masked_key, masked_value = (
            x[:, :, length:].unflatten(2, (-1, block)) for x in (query, key, value)
        )
        own = (masked_query @ masked_key.transpose(-2, -1)).flatten(2, 3)
        earlier = (query[:, :, length:] @ clean_key).masked_fill((number >= number[:, None]).repeat(2, 1), -torch.inf)
        share = torch.cat((earlier, own), -1).softmax(-1)
        mixed = share[..., length:].unflatten(2, (-1, block)) @ masked_value
        others = share[..., :length] @ clean_value + mixed.flatten(2, 3)
        return torch.cat((first, others), 2)


class Objective(nn.Module):
    """The loss of a batch of windows, ``[batch, length]`` int64."""

    def __init__(self, model: SDAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, hide: Tensor | None) -> Tensor:
        """Mean cross-entropy in nats: of the next tokens, or where ``hide`` is given of every token, hidden once.

        Args:
            tokens: the windows.
            hide: ``[batch, length]`` bool, the masks of one copy; the other has those where it is False.
        """
        if hide is None:
            states, targets = self.model.hidden(tokens[:, :-1], Causal()), tokens[:, 1:]
        else:
            copies = torch.cat((tokens, tokens.masked_fill(hide, MASK), tokens.masked_fill(~hide, MASK)), 1)
            context = CleanAndMasked(length=tokens.shape[1], block=self.model.block_length)
            _, one, other = self.model.hidden(copies, context).chunk(3, 1)
            states, targets = torch.where(hide[..., None], one, other), tokens
        logits = functional.linear(states, *self.model.head).flatten(0, 1)
        return functional.cross_entropy(logits.float(), targets.flatten())


def masks(batch: int, length: int, block: int, generator: torch.Generator) -> Tensor:
    """A share of each block, drawn evenly from [0, 1]: ``[batch, length]`` bool."""
    share = torch.rand(batch, length // block, 1, generator=generator)
    return (torch.rand(batch, length // block, block, generator=generator) < share).flatten(1)


def initialise(model: SDAR, seed: int) -> None:
    """Small residual branches that grow while training."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        std = 0.02 if "embed" in name or "lm_head" in name else 0.5 * weight.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= model.config.num_hidden_layers**-0.5
        nn.init.normal_(weight, std=std)


@torch.no_grad()
def held_out_loss(model: SDAR, windows: Tensor) -> tuple[float, float]:
    """On windows ``[count, length]``: the mean loss of hidden tokens, and the share that is the most probable one."""
    generator = torch.Generator().manual_seed(0)
    hide = masks(len(windows), windows.shape[1], model.block_length, generator)
    losses, hits = [], []
    for tokens, hidden in zip(windows.split(16), hide.split(16), strict=True):
        copies = torch.cat((tokens, tokens.masked_fill(hidden, MASK), tokens), 1)
        context = CleanAndMasked(length=tokens.shape[1], block=model.block_length)
        states = model.hidden(copies, context).chunk(3, 1)[1][hidden]
        logits = functional.linear(states, *model.head).float()
        losses.append(functional.cross_entropy(logits, tokens[hidden], reduction="none"))
        hits.append(logits.argmax(-1) == tokens[hidden])
    return float(torch.cat(losses).mean()), float(torch.cat(hits).float().mean())


def history(args: argparse.Namespace, training: dict[str, str], held_out: dict[str, str]) -> dict[str, Any]:
    """What ``training.json`` says: the sources, and the arguments of every run that led to the weights.

    Raises:
        RuntimeError: the weights to start from saw other sources, perhaps those held out here.
    """
    sources = {
        "python": platform.python_version(),
        "training": pycode_data.digest(training),
        "held-out": pycode_data.digest(held_out),
    }
    before: dict[str, Any] = {"runs": []}
    if args.start is not None:
        before = json.loads((args.start / "training.json").read_text())
        if any(before[name] != value for name, value in sources.items()):
            raise RuntimeError(f"{args.start} was trained on other sources: expected {sources}, got {before}")
    own = ("output", "start", "log_every", "save_every")
    arguments = {name: value for name, value in vars(args).items() if name not in own}
    return {**sources, "runs": [*before["runs"], arguments]}


def train(args: argparse.Namespace) -> None:
    """Train for ``args.minutes``; save every ``args.save_every`` minutes and at the end."""
    device = torch.device(args.device)
    training, held_out = pycode_data.split()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = pycode_data.train_tokenizer(training, args.vocab)
    tokenizer.save(str(args.output / "tokenizer.json"))
    (args.output / "training.json").write_text(json.dumps(history(args, training, held_out), indent=2) + "\n")
    windows = pycode_data.Windows(training, tokenizer, args.length, args.seed)
    validation = pycode_data.Windows(held_out, tokenizer, args.length, 0).batch(64).to(device)
    config = SDARConfig(
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // args.head_dim,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        intermediate_size=args.hidden,
        vocab_size=args.vocab,
        rope_theta=10_000.0,
        block_size=args.block,
        mask_token_id=MASK,
    )
    model = SDAR(config).to(device)
    initialise(model, args.seed)
    if args.start is not None:
        model.load_state_dict(load(args.start, dtype=torch.float32, device=device).state_dict())
    count = sum(weight.numel() for weight in model.parameters())
    print(f"{windows.num_tokens} tokens of {len(training)} modules; {count} parameters; {vars(args)}", flush=True)
    objective = Objective(model)
    scheduled = Scheduled(optimizers(objective, "layers", args.lr, args.matrix_lr), args.warm_up)
    average = Average(model, args.average)
    loss_of = torch.compile(objective) if args.compile else objective
    generator = torch.Generator().manual_seed(args.seed)
    start = last_save = time.monotonic()
    num_steps, smooth, budget = 0, 0.0, 60 * args.minutes
    while (elapsed := time.monotonic() - start) < budget:
        first = elapsed < args.next_token * budget
        tokens = windows.batch(args.batch_size * (2 if first else 1))
        hide = None if first else masks(len(tokens), args.length, args.block, generator).to(device)
        loss = loss_of(tokens.to(device), hide)
        loss.backward()
        scheduled.step(model.parameters(), elapsed / budget)
        average.update()
        num_steps += 1
        smooth = float(loss.detach()) if num_steps == 1 else 0.98 * smooth + 0.02 * float(loss.detach())
        if num_steps % args.log_every == 0:
            kind = "next token" if first else "masked"
            print(f"{time.monotonic() - start:7.0f} s  step {num_steps}  {kind} {smooth:.3f}", flush=True)
        if time.monotonic() - last_save > 60 * args.save_every:
            last_save = time.monotonic()
            checkpoint(model, average, args.output, validation)
    checkpoint(model, average, args.output, validation)
    print(f"{num_steps} steps, {(time.monotonic() - start) / 60:.1f} minutes")


def checkpoint(model: SDAR, average: Average, folder: Path, validation: Tensor) -> None:
    """Save the averaged weights, and print how they do on held-out modules."""
    averaged = copy.deepcopy(model)
    averaged.load_state_dict(average.weights)
    save(averaged, folder, {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "eos_token_id": END})
    loss, share = held_out_loss(averaged, validation)
    print(f"saved; held out: loss {loss:.3f}, {share:.3f} of hidden tokens right", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("pycode-checkpoint"))
    parser.add_argument("--from", type=Path, dest="start", metavar="FOLDER", help="weights to go on from")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--next-token", type=float, default=0.45, help="share of the time for next-token prediction")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8, help="windows; twice as many for next tokens")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--matrix-lr", type=float, default=4e-3, help="of Muon; 0 for AdamW alone")
    parser.add_argument("--warm-up", type=float, default=0.02, help="share of the time")
    parser.add_argument("--average", type=float, default=0.995, help="decay of the average of the weights")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-every", type=float, default=10, help="minutes")
    parser.add_argument("--log-every", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
