"""What ``train_pycode.py`` learns from: the Python sources of the standard library, as it lies beside the interpreter.

Whole modules are held out, by name. Tests, tables of encodings and vendored packages are not used at all.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, from_numpy

HELD_OUT = (
    *("bisect.py", "calendar.py", "csv.py", "fractions.py", "graphlib.py", "heapq.py", "json/decoder.py"),
    *("json/encoder.py", "json/scanner.py", "shlex.py", "statistics.py", "string.py", "textwrap.py", "urllib/parse.py"),
)
LEFT_OUT = ("site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "_bundled", "__pycache__")
MASK, END = "<|mask|>", "<|end|>"
# A line break takes the indentation behind it along: most lines of code then begin with one token.
PIECES = r"\n[ ]*| ?[A-Za-z_]+| ?[0-9]{1,3}| ?[^\sA-Za-z_0-9]+|[ ]+|\s"


def sources() -> dict[str, str]:
    """Each module's text, by its path in the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if any(part in LEFT_OUT or part.startswith("config-") for part in name.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").expandtabs(4)
        if text.strip():
            found[name.as_posix()] = text
    return found


def functions(text: str) -> Iterator[str]:
    """Each function and method of a module, decorators left out, moved to the left margin."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            yield textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"


def split() -> tuple[dict[str, str], dict[str, str]]:
    """Modules to train on, and those held out.

    A module that holds a function of a held-out one, of three lines or more, is in neither.
    """
    found = sources()
    held_out = {name: found.pop(name) for name in HELD_OUT}
    kept_apart = {body for text in held_out.values() for body in functions(text) if body.count("\n") >= 3}
    training = {name: text for name, text in found.items() if not kept_apart & set(functions(text))}
    return training, held_out


def digest(texts: dict[str, str]) -> str:
    """Names and contents as one number."""
    return hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in sorted(texts.items())).encode()).hexdigest()


def train_tokenizer(texts: dict[str, str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding; the mask is token 0, the end of a text token 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[MASK, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts.values(), trainer)
    return tokenizer


class Windows:
    """Random windows of ``length`` tokens that begin where a line does: of modules as they are, or of lone functions.

    Functions follow each other in random order, each closed by the end token, so that an answer can end.
    """

    def __init__(self, texts: dict[str, str], tokenizer: Tokenizer, length: int, seed: int) -> None:
        self.length = length
        self._rng = np.random.default_rng(seed)
        self._end = tokenizer.token_to_id(END)
        modules = [e.ids for e in tokenizer.encode_batch(list(texts.values()))]
        lone = [body for text in texts.values() for body in functions(text)]
        self._functions = [np.array([*e.ids, self._end], np.int64) for e in tokenizer.encode_batch(lone)]
        self.stream = np.concatenate([np.array([*ids, self._end], np.int64) for ids in modules])
        breaks = np.array([tokenizer.id_to_token(i).startswith("Ċ") for i in range(tokenizer.get_vocab_size())])
        starts = np.flatnonzero(breaks[self.stream[:-length]])
        self._starts = starts[starts < len(self.stream) - length - 1]

    @property
    def num_tokens(self) -> int:
        """Of all modules, once."""
        return len(self.stream)

    def batch(self, size: int) -> Tensor:
        """``[size, length]`` int64, half of each kind."""
        rows = [self._module() if i % 2 else self._functions_in_a_row() for i in range(size)]
        return from_numpy(np.stack(rows))

    def _module(self) -> np.ndarray:
        start = self._rng.choice(self._starts)
        return self.stream[start : start + self.length]

    def _functions_in_a_row(self) -> np.ndarray:
        row: list[np.ndarray] = []
        while sum(map(len, row)) < self.length:
            row.append(self._functions[self._rng.integers(len(self._functions))])
        return np.concatenate(row)[: self.length]
