"""``bench``: hands over to the benchmarks, which are in the repository and not in the installed package."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from diffusion_runtime.cli.errors import MISSING, CommandError

REPOSITORY = Path(__file__).parents[2]


def run(args: argparse.Namespace) -> int:
    """The same as ``python -m bench`` in the repository."""
    program = REPOSITORY / "bench" / "__main__.py"
    if not program.is_file():
        raise CommandError(
            "the benchmarks are not in the installed package: clone the repository and run make bench", MISSING
        )
    before = sys.argv
    sys.path.insert(0, str(REPOSITORY))
    sys.argv = ["bench", *args.arguments]
    try:
        runpy.run_path(str(program), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.path.remove(str(REPOSITORY))
        sys.argv = before
    return 0
