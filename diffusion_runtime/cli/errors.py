"""How a command ends when it does not end well."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

DONE = 0
NOT_SOLVED = 1
BAD_INPUT = 2
MISSING = 3
INTERRUPTED = 130  # as a shell counts: 128 plus the number of the signal
CLOSED_PIPE = 141


class CommandError(Exception):
    """Stops a command.

    Args:
        message: what is wrong and what to do about it; shown as one line.
        code: the exit code.
    """

    def __init__(self, message: object, code: int = BAD_INPUT) -> None:
        super().__init__(" ".join(str(message).split()))
        self.code = code


@contextmanager
def killed_by_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once, which a shell sees as 130.

    For imports and loading, where a KeyboardInterrupt would surface as whatever the interrupted library makes of it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
