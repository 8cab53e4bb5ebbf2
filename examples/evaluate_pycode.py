"""The table of the Python model: masked tokens, whole lines and whole functions of held-out modules.

    python examples/evaluate_pycode.py

The held-out modules are those of ``pycode_data.HELD_OUT``, as they lie beside the interpreter. First it is checked that
no function of theirs is in the modules trained on, and said whether the sources are those of the training.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pycode_data
import torch
from pycode_ngram import TwoSided
from tokenizers import Tokenizer
from torch import Tensor

from diffusion_runtime import Denoiser, Request, load
from diffusion_runtime.decoding import Policy, threshold
from diffusion_runtime.loading import SHIPPED
from diffusion_runtime.models import LanguageModel

# a name, a policy, and its settings
POLICIES: tuple[tuple[str, str | Policy, dict[str, Any]], ...] = (
    ("low_confidence, one a forward", "low_confidence", {}),
    ("topk_margin, one a forward", "topk_margin", {}),
    ("entropy, one a forward", "entropy", {}),
    ("random, one a forward", "random", {}),
    ("low_confidence, 8 forwards a block", "low_confidence", {"steps_per_block": 8}),
    ("low_confidence, 4 forwards a block", "low_confidence", {"steps_per_block": 4}),
    ("threshold 0.9", "threshold", {}),
    ("threshold 0.7", Policy(partial(threshold, threshold=0.7), scheduled=False), {}),
    ("eb_sampler", "eb_sampler", {}),
    ("sdar_dynamic", "sdar_dynamic", {}),
)


class Line(NamedTuple):
    """A line of a held-out module, and what stands around it."""

    left: list[int]  # a whole number of blocks
    hidden: list[int]
    right: list[int]  # to the end of the block


def lines_of(texts: list[str], tokenizer: Tokenizer, block: int, count: int) -> list[Line]:
    """Lines of code of 4 to 20 tokens, their break and indentation not among them, each at the start of a block."""
    found = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        breaks = [i for i, token in enumerate(ids) if tokenizer.id_to_token(token).startswith("Ċ")]
        for start, stop in pairwise(breaks):
            code = tokenizer.decode(ids[start + 1 : stop]).strip()
            left = (start + 1) // block * block
            if 4 <= stop - start - 1 <= 20 and code and not code.startswith("#") and left >= block:
                first = start + 1 - min(left, 6 * block)
                found.append(Line(ids[first : start + 1], ids[start + 1 : stop], ids[stop : start + 1 + block]))
    return random.Random(0).sample(found, count)


def infilled(denoiser: Denoiser, lines: list[Line], batch: int) -> tuple[list[list[int]], int, float]:
    """What is filled into each line, the forwards of all of them, and seconds."""
    blank = [denoiser.mask_token_id]
    requests = [Request([*line.left, *blank * len(line.hidden), *line.right], name=line) for line in lines]
    start = time.perf_counter()
    results = list(denoiser.serve(requests, batch_size=batch))
    seconds = time.perf_counter() - start
    filled = {id(r.request.name): r.tokens[len(r.request.name.left) :].tolist() for r in results}
    return (
        [filled[id(line)][: len(line.hidden)] for line in lines],
        sum(r.num_forwards for r in results),
        seconds,
    )


def right(lines: list[Line], filled: list[list[int]]) -> tuple[float, float]:
    """The share of lines that are right in every token, and that of tokens."""
    whole = [line.hidden == tokens for line, tokens in zip(lines, filled, strict=True)]
    single = [
        a == b for line, tokens in zip(lines, filled, strict=True) for a, b in zip(line.hidden, tokens, strict=True)
    ]
    return sum(whole) / len(whole), sum(single) / len(single)


def masked_accuracy(model: LanguageModel, baseline: TwoSided, windows: Tensor, share: float) -> tuple[float, float]:
    """Of tokens hidden at random in the last block of each window, those that the model and the baseline get right."""
    block = model.block_length or windows.shape[1]
    hidden = torch.zeros_like(windows, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    hidden[:, -block:] = torch.rand(len(windows), block, generator=generator) < share
    with torch.no_grad():
        ours = torch.cat([model(x) for x in windows.masked_fill(hidden, model.mask_token_id).split(8)]).argmax(-1)
    rows = zip(windows.tolist(), hidden.tolist(), strict=True)
    theirs = torch.tensor([baseline.fill(row, holes) for row, holes in rows])
    right = [float((answer == windows)[hidden].float().mean()) for answer in (ours, theirs)]
    return right[0], right[1]


def completed(model: LanguageModel, tokenizer: Tokenizer, texts: list[str], count: int, **settings: Any) -> list[str]:
    """The first lines of held-out functions, continued to their end, or to the last whole line of 192 tokens."""
    heads = [body.split(":\n", 1)[0] + ":" for text in texts for body in pycode_data.functions(text) if ":\n" in body]
    one_line = [head for head in heads if "\n" not in head]
    chosen = random.Random(0).sample(one_line, count)
    end = tokenizer.token_to_id(pycode_data.END)
    requests = [
        Request(tokenizer.encode(head).ids, max_new_tokens=192, stop_token_ids=[end], seed=seed, name=head)
        for seed, head in enumerate(chosen)
    ]
    answers = []
    for result in Denoiser(model, **settings).serve(requests):
        text = str(result.request.name) + tokenizer.decode(result.new_tokens)
        answers.append(text if result.finish_reason == "stop" else text.rpartition("\n")[0] + "\n")
    return answers


def parses(text: str) -> bool:
    """Whether it is Python."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED / "pycode")
    parser.add_argument("--lines", type=int, default=300)
    parser.add_argument("--timed", type=int, default=40, help="of the lines, those also filled in alone")
    parser.add_argument("--functions", type=int, default=100)
    parser.add_argument("--show", type=int, default=0, help="completed functions to print")
    args = parser.parse_args()
    model = load(args.checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    training, held_out = pycode_data.split()
    texts = list(held_out.values())
    check_apart(training, held_out)
    said = json.loads((args.checkpoint / "training.json").read_text())
    for name, digest in (("training", pycode_data.digest(training)), ("held-out", pycode_data.digest(held_out))):
        print(f"{name} sources: {'those of the training' if said[name] == digest else 'of another Python'}")

    windows = pycode_data.Windows(training, tokenizer, 256, 0)
    baseline = TwoSided(windows.stream, tokenizer.get_vocab_size())
    sample = pycode_data.Windows(held_out, tokenizer, 256, 0).batch(200)
    print("\n| hidden in a block | right | n-grams |\n|---|---|---|")
    for share in (0.15, 0.5, 0.85):
        ours, theirs = masked_accuracy(model, baseline, sample, share)
        print(f"| {share:.0%} | {ours:.1%} | {theirs:.1%} |", flush=True)

    lines = lines_of(texts, tokenizer, model.block_length or 32, args.lines)
    num_tokens = sum(len(line.hidden) for line in lines)
    some = lines[: args.timed]
    columns = (
        "policy",
        "lines right",
        "tokens right",
        "tokens a forward",
        "ms a line, cache none",
        "block",
        "8 at once",
    )
    print(f"\n{len(lines)} lines of {num_tokens} tokens\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    whole, single = right(lines, [baseline.between(line.left, len(line.hidden), line.right) for line in lines])
    print(f"| n-grams, from both sides | {whole:.1%} | {single:.1%} | | | | |", flush=True)
    for name, policy, settings in POLICIES:
        denoisers = [Denoiser(model, policy=policy, cache=cache, **settings) for cache in ("none", "block")]
        filled, forwards, seconds = infilled(denoisers[1], lines, 8)
        whole, single = right(lines, filled)
        alone = [infilled(denoiser, some, 1) for denoiser in denoisers]
        if any(answer[0] != filled[: len(some)] for answer in alone):
            print("of the lines timed, some are other tokens alone, or without a cache")
        times = [1e3 * answer[2] / len(some) for answer in alone] + [1e3 * seconds / len(lines)]
        shares = f"{whole:.1%} | {single:.1%} | {num_tokens / forwards:.2f}"
        print(f"| {name} | {shares} | {' | '.join(f'{ms:.0f}' for ms in times)} |", flush=True)

    for temperature in (0.0, 0.5):
        answers = completed(model, tokenizer, texts, args.functions, policy="low_confidence", temperature=temperature)
        share = sum(map(parses, answers)) / len(answers)
        print(f"\ntemperature {temperature}: ast.parse accepts {share:.0%} of {len(answers)} completed functions")
        for answer in answers[: args.show]:
            print(f"\n{answer}")


def check_apart(training: dict[str, str], held_out: dict[str, str]) -> None:
    """No module is in both, and no function of three lines or more.

    Raises:
        RuntimeError: one is.
    """
    known = {body for text in training.values() for body in pycode_data.functions(text)}
    shared = [b for text in held_out.values() for b in pycode_data.functions(text) if b.count("\n") >= 3 and b in known]
    if shared or training.keys() & held_out.keys():
        raise RuntimeError(f"{len(shared)} held-out functions were trained on")


if __name__ == "__main__":
    main()
