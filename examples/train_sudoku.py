"""Train the Sudoku model that ships: masked diffusion over the blank cells, on a CPU or a GPU, within a time budget.

    python examples/train_sudoku.py --minutes 46 --output sudoku/

The loss is that of LLaDA's fine-tuning, cross-entropy at the masked cells. Three auxiliary losses shorten the way
there and cost no parameter at inference: an early layer names the row, column and box of each cell, the next one the
digits that its peers leave to it, and every later layer is read by the final head as well.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sudoku_data import batches, held_out, training_bases
from torch import Tensor, nn
from torch.nn import functional
from training import Average, Scheduled, optimizers, save

from diffusion_runtime import ops, sudoku
from diffusion_runtime.models import LLaDA, LLaDAConfig
from diffusion_runtime.nn import rotary_angles

POSITION_LAYER = 1
CANDIDATE_LAYER = 2
# what config.json says beside the sizes, under LLaDA's names
CONFIG: dict[str, Any] = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "max_sequence_length": sudoku.LENGTH,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "bos_token_id": sudoku.BOS,
}
_CELL = torch.arange(81)
# [81, 3]: the row, column and box of each cell, as classes 0 to 26
_UNITS = torch.stack((_CELL // 9, _CELL % 9 + 9, _CELL // 27 * 3 + _CELL % 9 // 3 + 18), 1)
_PEERS = functional.one_hot(_UNITS, 27).sum(1).float()  # [81, 27]


class Objective(nn.Module):
    """The model and the heads that only training needs; ``forward`` is the loss."""

    units: Tensor
    peers: Tensor

    def __init__(self, model: LLaDA) -> None:
        super().__init__()
        self.model = model
        width = model.config.d_model
        self.position = nn.Linear(width, 27)
        self.candidates = nn.Linear(width, 9)
        for name, table in (("units", _UNITS), ("peers", _PEERS)):
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens: Tensor, visible: Tensor, solution: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[batch, LENGTH]``, cells ``[batch, 81]`` -> the loss, and the cross-entropy of the last layer."""
        config = self.model.config
        transformer: Any = self.model.model["transformer"]
        masked = (visible == 0).float()
        weight = masked / masked.sum()
        x = transformer["wte"](tokens)
        context = self.model.whole_sequences()
        rotary = rotary_angles(context.positions(tokens), config.head_size, config.rope_theta)
        loss = x.new_zeros(())
        final = loss
        for layer, block in enumerate(transformer["blocks"]):
            x = block(x, rotary, context, layer)
            if layer < POSITION_LAYER:
                continue
            # the cells are what is left without the beginning and the landmark of each row
            normed = transformer["ln_f"](x[:, 1:].unflatten(1, (9, 10))[:, :, 1:].flatten(1, 2))
            if layer == POSITION_LAYER:
                loss = loss + self._position_loss(normed)
            elif layer == CANDIDATE_LAYER:
                loss = loss + self._candidate_loss(normed, visible, weight)
            else:
                logits = transformer["ff_out"](normed).float()
                final = (functional.cross_entropy(logits.transpose(1, 2), solution, reduction="none") * weight).sum()
                loss = loss + final * (1.0 if layer == config.n_layers - 1 else 0.3)
        return loss, final

    def _position_loss(self, normed: Tensor) -> Tensor:
        units = self.position(normed).float().unflatten(-1, (3, 9)).log_softmax(-1).flatten(2)
        picked: Tensor = units.gather(2, self.units.expand(len(units), -1, -1))
        return -picked.mean()

    def _candidate_loss(self, normed: Tensor, visible: Tensor, weight: Tensor) -> Tensor:
        shown = functional.one_hot(visible, 10)[..., 1:].float()  # [batch, 81, digit]
        used = (self.peers @ (self.peers.T @ shown)).clamp(max=1)
        logits = self.candidates(normed).float()
        loss = functional.binary_cross_entropy_with_logits(logits, 1 - used, reduction="none").mean(-1)
        return (loss * weight).sum()


def _attention(query: Tensor, key: Tensor, value: Tensor, **nothing_else: None) -> Tensor:
    # what ops.attention computes, with its products in bfloat16: torch's fused attention is slow backwards on a CPU
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.float().softmax(-1).to(value.dtype) @ value


def initialise(model: LLaDA, seed: int) -> None:
    """Small embeddings, and small residual branches that grow while training."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        std = 0.5 * weight.shape[1] ** -0.5 if "wte" not in name else 0.3
        if name.endswith(("attn_out.weight", "ff_out.weight")) and "blocks" in name:
            std /= math.sqrt(model.config.n_layers)
        nn.init.normal_(weight, std=std)


def solve_rate(model: LLaDA, pairs: list[tuple[sudoku.Board, sudoku.Board]], device: torch.device) -> float:
    """The share of puzzles solved when the most confident cell is committed at every forward."""
    tokens = sudoku.encode(puzzle for puzzle, _ in pairs).to(device)
    rows = torch.arange(len(tokens), device=device)
    while (tokens == sudoku.MASK).any():
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            best, digit = model(tokens).float()[..., 1:10].softmax(-1).max(-1)
        place = best.masked_fill(tokens != sudoku.MASK, -1).argmax(1)
        unfinished = (tokens == sudoku.MASK).any(1)
        tokens[rows[unfinished], place[unfinished]] = digit[rows, place][unfinished] + 1
    boards = sudoku.decode(tokens.cpu())
    return sum(board == solution for board, (_, solution) in zip(boards, pairs, strict=True)) / len(pairs)


def train(args: argparse.Namespace, examples: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Train for ``args.minutes``; save every ``args.save_every`` minutes and at the end."""
    device = torch.device(args.device)
    config = LLaDAConfig(
        d_model=args.width,
        n_layers=args.layers,
        n_heads=args.heads,
        mlp_hidden_size=args.hidden,
        vocab_size=sudoku.VOCAB_SIZE,
        mask_token_id=sudoku.MASK,
        rope_theta=args.rope_theta,
    )
    model = LLaDA(config)
    initialise(model, args.seed)
    objective = Objective(model).to(device)
    count = sum(weight.numel() for weight in model.parameters())
    print(f"{count} parameters, {2 * count} bytes of weights; {vars(args)}", flush=True)
    scheduled = Scheduled(optimizers(objective, "blocks", args.lr, args.matrix_lr), args.warm_up)
    loss_of = torch.compile(objective) if args.compile else objective
    average = Average(model, args.average)
    validation = [held_out(low, low + 4, 64, skip=1000) for low in (36, 31, 26)]
    start = last_save = time.monotonic()
    num_steps, seen = 0, 0
    smooth: Tensor | None = None
    while (elapsed := time.monotonic() - start) < 60 * args.minutes:
        visible, solution, _ = next(examples)
        tokens = sudoku.encode([[0] * 81]).repeat(len(visible), 1)
        tokens[:, sudoku.CELL_POSITIONS] = visible
        with torch.autocast(device.type, torch.bfloat16):
            loss, final = loss_of(tokens.to(device), visible.to(device), solution.to(device))
        loss.backward()
        scheduled.step(objective.parameters(), elapsed / (60 * args.minutes))
        average.update()
        num_steps, seen = num_steps + 1, seen + len(visible)
        smooth = final.detach() if smooth is None else smooth.lerp(final.detach(), 0.02)
        if num_steps % args.log_every == 0:
            now = time.monotonic() - start
            total = loss.item()
            print(
                f"{now:7.0f} s  step {num_steps}  {seen / now:.0f}/s  loss {total:.4f}  last layer {smooth:.4f}",
                flush=True,
            )
        if time.monotonic() - last_save > 60 * args.save_every:
            last_save = time.monotonic()
            checkpoint(model, average, args.output, validation, device)
    checkpoint(model, average, args.output, validation, device)
    print(f"{num_steps} steps, {seen} examples, {(time.monotonic() - start) / 60:.1f} minutes")


def checkpoint(
    model: LLaDA,
    average: Average,
    folder: Path,
    validation: list[list[tuple[sudoku.Board, sudoku.Board]]],
    device: torch.device,
) -> None:
    """Save the averaged weights, and print the share of the validation puzzles that they solve."""
    averaged = LLaDA(model.config).to(device)
    averaged.load_state_dict(average.weights)
    save(averaged, folder, CONFIG)
    rates = [f"{solve_rate(averaged, pairs, device):.3f}" for pairs in validation]
    print(
        f"saved; solved of 64 validation puzzles with 36 to 40, 31 to 35, 26 to 30 givens: {' '.join(rates)}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("sudoku-checkpoint"))
    parser.add_argument("--minutes", type=float, default=46)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bases", type=int, default=30000, help="number of base puzzles")
    parser.add_argument("--cache", type=Path, help="an .npy file that keeps the base puzzles between runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--rope-theta", type=float, default=40.0)
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--matrix-lr", type=float, default=3e-3, help="of Muon; 0 for AdamW alone")
    parser.add_argument("--warm-up", type=float, default=0.03, help="share of the time")
    parser.add_argument("--average", type=float, default=0.995, help="decay of the average of the weights")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-every", type=float, default=8, help="minutes")
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    puzzles, solutions = training_bases(args.bases, args.threads, args.cache)
    with patch.object(ops, "attention", _attention):
        train(args, batches(puzzles, solutions, args.batch_size, args.seed))


if __name__ == "__main__":
    main()
