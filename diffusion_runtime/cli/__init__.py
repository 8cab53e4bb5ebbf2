"""The command ``diffusion-runtime``. What a command needs is imported when it runs, so that ``--help`` is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from diffusion_runtime.cli.errors import CLOSED_PIPE, INTERRUPTED, CommandError, killed_by_interrupt
from diffusion_runtime.cli.output import announced
from diffusion_runtime.cli.parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        the exit code: 0 done, 1 a puzzle was not solved, 2 bad input or usage, 3 something is missing.
    """
    try:
        code = _run(argv)
        sys.stdout.flush()
    except CommandError as error:
        print(f"diffusion-runtime: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # what is still buffered must go somewhere when the interpreter flushes it at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    with killed_by_interrupt(), announced("importing torch", quiet=getattr(args, "quiet", False)):
        command = _command(args.command)
    return command(args)


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    if name == "demo":
        from diffusion_runtime.cli import demo

        return demo.run
    if name == "solve":
        from diffusion_runtime.cli import solve

        return solve.run
    if name == "generate":
        from diffusion_runtime.cli import text

        return text.run_generate
    if name == "compare":
        from diffusion_runtime.cli import compare

        return compare.run
    if name == "trace":
        from diffusion_runtime.cli import replay

        return replay.run
    if name == "bench":
        from diffusion_runtime.cli import bench

        return bench.run
    if name == "infill":
        from diffusion_runtime.cli import text

        return text.run_infill
    from diffusion_runtime.cli import doctor

    return doctor.run
