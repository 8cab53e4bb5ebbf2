"""``generate`` and ``infill``: text in, text out, through the tokenizer that lies beside the weights."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch

from diffusion_runtime.cli.errors import DONE, MISSING, CommandError
from diffusion_runtime.cli.live_text import watch
from diffusion_runtime.cli.output import note, print_json
from diffusion_runtime.cli.parser import check_decoding
from diffusion_runtime.cli.session import Progressed, denoise, load_model, make_denoiser, sampling_backend, trace_file
from diffusion_runtime.cli.tokens import TextTokens
from diffusion_runtime.constraints import Automaton, json_schema, regex


def run_generate(args: argparse.Namespace) -> int:
    """Continue the prompt and print the answer."""
    prompt = _input(args.prompt)
    tokens, model = _prepare(args)
    ids = tokens.encode(prompt)
    ends = tokens.ids_of(args.stop) or tokens.ends()
    last = _denoise(args, tokens, model, ids, ends, args.max_new_tokens)
    answer: list[int] = last.step.tokens[0, len(ids) :].tolist()
    answer = answer[: next((i for i, token in enumerate(answer) if token in ends), len(answer))]
    result = {"prompt": prompt, "text": tokens.decode(answer), "tokens": answer}
    return _report(args, model, result, last)


def run_infill(args: argparse.Namespace) -> int:
    """Fill the blanks and print the whole text."""
    text = _input(args.text)
    tokens, model = _prepare(args)
    ids = tokens.encode_with_blanks(text, dict(args.mask))
    last = _denoise(args, tokens, model, ids, tokens.ids_of(args.stop), None)
    filled: list[int] = last.step.tokens[0].tolist()
    result = {"input": text, "text": tokens.decode(filled), "tokens": filled}
    return _report(args, model, result, last)


def _input(argument: str) -> str:
    return sys.stdin.read() if argument == "-" else argument


def _prepare(args: argparse.Namespace) -> tuple[TextTokens, Any]:
    check_decoding(args)
    # a folder without a tokenizer is refused before gigabytes are read
    early = TextTokens.of_folder(args.model)
    model = load_model(args.model, args.device, quiet=args.quiet)
    tokens = early or TextTokens.of_hub(args.model)
    tokens.fit(model.mask_token_id, model.config.vocab_size)
    return tokens, model


def _denoise(
    args: argparse.Namespace,
    tokens: TextTokens,
    model: Any,
    ids: list[int],
    ends: list[int],
    max_new_tokens: int | None,
) -> Progressed:
    batch = torch.tensor([ids], dtype=torch.int64, device=args.device)
    with trace_file(args.trace) as file:
        about = {"policy": args.policy, "steps": args.steps, "temperature": args.temperature, "seed": args.seed}
        told: dict[str, Any] = {"file": file, "text_of": tokens.bytes_of, "about": {"model": args.model, **about}}
        denoiser = make_denoiser(model, args, stop_token_ids=ends, constraint=_language(args, tokens))
        steps = denoise(denoiser, batch, seed=args.seed, max_new_tokens=max_new_tokens, **told)
        # there is always something to decide, so there is a last step
        return deque(watch(steps, tokens, plain=args.json or args.quiet, quiet=args.quiet), maxlen=1).pop()


def _language(args: argparse.Namespace, tokens: TextTokens) -> Automaton | None:
    """What --regex and --json-schema ask for; it is refused before a model runs."""
    if args.regex is None and args.json_schema is None:
        return None
    try:
        if args.regex is not None:
            return regex(args.regex, tokens.vocabulary())
        return json_schema(Path(args.json_schema).read_text(encoding="utf-8"), tokens.vocabulary())
    except ImportError as error:
        raise CommandError(error, MISSING) from error
    except (OSError, ValueError) as error:
        raise CommandError(error) from error


def _report(args: argparse.Namespace, model: Any, result: dict[str, Any], last: Progressed) -> int:
    backend = sampling_backend(model, args)
    if args.json:
        ran = {"policy": args.policy, "seed": args.seed, "forwards": last.num_forwards, "sampling_backend": backend}
        print_json({**result, **ran, "seconds": round(last.seconds, 6)})
        return DONE
    print(result["text"], flush=True)
    if not args.quiet:
        note(f"{args.policy}, {last.num_forwards} forwards, {last.seconds:.2f} s, sampling on {backend}")
    return DONE
