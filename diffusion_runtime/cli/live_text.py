"""Text in a terminal while it is denoised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from diffusion_runtime.cli.output import Progress, live_console
from diffusion_runtime.cli.session import Progressed
from diffusion_runtime.cli.tokens import TextTokens

if TYPE_CHECKING:
    from rich.text import Text

STYLES = {"decided": "not dim", "fresh": "not dim bold black on green", "blank": "dim"}


def watch(steps: Iterator[Progressed], tokens: TextTokens, *, plain: bool, quiet: bool) -> Iterator[Progressed]:
    """Pass the steps on, drawing each: live on a terminal unless ``plain``, else as progress unless ``quiet``."""
    console = None if plain else live_console()
    if console is None:
        progress = Progress(quiet=quiet)
        for step in steps:
            progress.update(_status(step))
            yield step
        return
    from rich.live import Live

    # the finished text is printed by the caller, where it is the same on a terminal and in a pipe
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for step in steps:
            live.update(_draw(step, tokens), refresh=True)
            yield step


def _status(step: Progressed) -> str:
    least = "" if step.least_confidence is None else f", least confidence {step.least_confidence:.3f}"
    return f"forward {step.num_forwards}: {step.num_left} blanks left{least}, {step.seconds:.1f} s"


def _draw(step: Progressed, tokens: TextTokens) -> Text:
    from rich.text import Text

    ids, fresh = step.step.tokens[0].tolist(), step.step.commit_mask[0].tolist()
    text = Text(f"{_status(step)}\n", style="dim")  # above the text, which may be longer than the terminal
    for kind, piece in tokens.pieces(ids, fresh):
        text.append(piece, style=STYLES[kind])
    return text
