"""``compare``: a loop out of a file beside ours, to the first step at which they differ."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

from diffusion_runtime.cli.errors import DONE, CommandError
from diffusion_runtime.cli.output import print_json
from diffusion_runtime.cli.parser import check_decoding
from diffusion_runtime.cli.session import load_model, make_denoiser
from diffusion_runtime.cli.tokens import TextTokens
from diffusion_runtime.parity import compare

DIFFERENT = 1


def run(args: argparse.Namespace) -> int:
    """Say where they part, or that they do not."""
    check_decoding(args)
    loop = _loop(args.loop)
    ids = _token_ids(args)
    denoiser = make_denoiser(load_model(args.model, args.device, quiet=args.json), args)
    tokens = torch.tensor([ids], dtype=torch.int64, device=args.device)
    try:
        parting = compare(loop, denoiser, tokens, max_new_tokens=args.max_new_tokens)
    except ValueError as error:
        raise CommandError(error) from error
    if args.json:
        print_json(None if parting is None else vars(parting))
    else:
        print("the same to the end" if parting is None else parting)
    return DONE if parting is None else DIFFERENT


def _loop(named: str) -> Callable[..., Any]:
    path, colon, name = named.rpartition(":")
    if not colon or not Path(path).is_file():
        raise CommandError(f"LOOP must be FILE.py:FUNCTION, got {named!r}")
    spec = spec_from_file_location("reference_loop", path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{path} is not a Python file")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    loop = getattr(module, name, None)
    if not callable(loop):
        raise CommandError(f"{path} has no function {name!r}")
    found: Callable[..., Any] = loop
    return found


def _token_ids(args: argparse.Namespace) -> list[int]:
    if args.tokens is None:
        tokens = TextTokens.of_folder(args.model) or TextTokens.of_hub(args.model)
        return tokens.encode(args.prompt)
    if not all(piece.isdecimal() for piece in args.tokens.split(",")):
        raise CommandError(f"--tokens must be numbers with commas between, got {args.tokens!r}")
    return [int(piece) for piece in args.tokens.split(",")]
