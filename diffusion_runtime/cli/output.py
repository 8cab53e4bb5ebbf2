"""Where output goes: live drawing on a terminal, plain lines elsewhere, progress on standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 2.0  # seconds without a word
_HINT = "for the live view: pip install 'diffusion-runtime[cli]'"


def live_console(width: int = 40, height: int = 8) -> Console | None:
    """A rich console on standard output, or None where only plain lines make sense.

    Args:
        width: columns that the view needs.
        height: lines that it needs.
    """
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
    except ImportError:
        note(_HINT)
        return None
    console = Console(highlight=False)
    fits = console.width >= width and console.height >= height
    return console if fits and console.encoding.startswith("utf") else None


def note(line: str) -> None:
    """A line for the person at the terminal, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """The one document of a command with ``--json``."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


class Progress:
    """Says how far a long piece of work is, every other second."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._next = time.monotonic() + PATIENCE

    def update(self, line: str) -> None:
        """Print ``line``, if it is time to."""
        if not self._quiet and time.monotonic() >= self._next:
            note(line)
            self._next = time.monotonic() + PATIENCE


@contextmanager
def announced(line: str, *, quiet: bool = False) -> Iterator[None]:
    """Print ``line`` if the body takes longer than a person waits without asking."""
    timer = Timer(PATIENCE, note, [line])
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
