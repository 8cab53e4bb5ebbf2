"""``trace``: a trace file in the terminal, or as a page."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from diffusion_runtime import tracing
from diffusion_runtime.cli.errors import DONE, CommandError
from diffusion_runtime.cli.live_text import STYLES
from diffusion_runtime.cli.output import live_console, note

Piece = tuple[str, str]  # "decided", "fresh" or "blank", and a text


def run(args: argparse.Namespace) -> int:
    """Show the steps, or write the page."""
    try:
        trace = tracing.read(args.file)
    except (OSError, ValueError) as error:
        raise CommandError(f"{error}; --trace of solve, generate and infill writes one") from error
    if args.row > len(trace.tokens):
        raise CommandError(f"--row {args.row}: the trace has {len(trace.tokens)}")
    if args.html is not None:
        try:
            Path(args.html).write_text(tracing.page(trace, Path(args.file).name), encoding="utf-8")
        except OSError as error:
            raise CommandError(f"--html: cannot write {args.html}: {error.strerror}; name another file") from error
        note(f"{args.html}: {len(trace.steps)} steps")
        return DONE
    _replay(trace, args.row - 1, args.delay)
    print("".join(text for _, text in _pieces(trace, args.row - 1, len(trace.steps))), flush=True)
    return DONE


def _replay(trace: tracing.Trace, row: int, delay: float) -> None:
    console = live_console()
    if console is None:
        for step in range(1, len(trace.steps) + 1):
            note(_status(trace, row, step))
        return
    from rich.live import Live
    from rich.text import Text

    with Live(console=console, auto_refresh=False, transient=True) as live:
        for step in range(len(trace.steps) + 1):
            text = Text(_status(trace, row, step) + "\n", style="dim")
            for kind, piece in _pieces(trace, row, step):
                text.append(piece, style=STYLES[kind])
            live.update(text, refresh=True)
            time.sleep(delay)


def _status(trace: tracing.Trace, row: int, count: int) -> str:
    left = trace.tokens_after(count)[row].count(trace.mask_token_id)
    if not count:
        return f"before the first of {len(trace.steps)} steps: {left} blanks"
    step = trace.steps[count - 1]
    sure = [x for x in step.rows[row]["confidence"] if x is not None]
    least = f", least confidence {min(sure):.3f}" if sure else ""
    return f"step {count}: {len(step.rows[row]['position'])} tokens, {left} blanks left{least}, {step.seconds:.2f} s"


def _pieces(trace: tracing.Trace, row: int, count: int) -> Iterator[Piece]:
    """A row after so many steps, as stretches of one kind."""
    fresh = set(trace.steps[count - 1].rows[row]["position"]) if count else set()
    kind, run = "", b""
    for position, token in enumerate(trace.tokens_after(count)[row]):
        blank = token == trace.mask_token_id
        own = "blank" if blank else "fresh" if position in fresh else "decided"
        if own != kind and run:
            yield kind, run.decode(errors="replace")
            run = b""
        kind = own
        run += "░".encode() if blank else trace.texts.get(token, f"[{token}]".encode())
    if run:
        yield kind, run.decode(errors="replace")
