"""Text to tokens and back, by the ``tokenizer.json`` of a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_runtime.cli.errors import MISSING, CommandError
from diffusion_runtime.constraints import token_bytes
from diffusion_runtime.loading import local_folder

_FILE = "tokenizer.json"
_BLANK = r"\[MASK(?::(\d+))?\]"


class TextTokens:
    """A tokenizer that knows the mask token of its model.

    Args:
        path: a ``tokenizer.json``.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise CommandError(
                "text needs the tokenizers library: pip install 'diffusion-runtime[cli]'", MISSING
            ) from error
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CommandError(
                f"{path} is not a tokenizer: {error}; take the file that belongs to the model"
            ) from error
        self._path = path
        self._mask_token_id, self._vocab_size = -1, 1 << 62
        self._mask = ""
        self._vocabulary: list[bytes | None] | None = None

    @classmethod
    def of_folder(cls, model: str) -> TextTokens | None:
        """The tokenizer in the folder of ``model``; None if it has none on this machine."""
        folder = local_folder(model)
        if folder is None:
            return None
        if not (folder / _FILE).is_file():
            raise CommandError(
                f"{folder} has no {_FILE}, so it cannot read text; put the one that the model was trained with beside "
                "the weights, or call diffusion_runtime.denoiser.Denoiser with token ids",
                MISSING,
            )
        return cls(folder / _FILE)

    @classmethod
    def of_hub(cls, model: str) -> TextTokens:
        """The tokenizer in the repository ``model`` of the Hugging Face hub."""
        from huggingface_hub import hf_hub_download

        try:
            return cls(Path(hf_hub_download(model, _FILE)))
        except OSError as error:
            raise CommandError(f"{model} has no {_FILE}, so it cannot read text: {error}", MISSING) from error

    def fit(self, mask_token_id: int, vocab_size: int) -> None:
        """Take note of the model's mask token and refuse a tokenizer of another model."""
        mask = self._tokenizer.id_to_token(mask_token_id)
        if mask is None:
            raise CommandError(f"{_FILE} has no token {mask_token_id}, the model's mask; it is another model's")
        self._tokenizer.add_special_tokens([mask])  # so that it is found inside a text; its id stays
        self._mask_token_id, self._mask, self._vocab_size = mask_token_id, mask, vocab_size

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts around one."""
        ids: list[int] = self._tokenizer.encode(text).ids
        highest = max((token for token in ids if token != self._mask_token_id), default=0)
        if highest >= self._vocab_size:
            size = self._vocab_size
            raise CommandError(f"{_FILE} gives token {highest}, the model has {size}; it is another model's")
        return ids

    def encode_with_blanks(self, text: str, marks: Mapping[str, int]) -> list[int]:
        """The tokens of a text, the mask token for each token of a blank.

        Args:
            text: holds at least one blank: ``[MASK]``, ``[MASK:n]``, the tokenizer's own mask token, or a mark.
            marks: further texts that stand for a blank, and how many tokens long it is.
        """
        own = "|".join(re.escape(mark) for mark in sorted({*marks, self._mask}, key=len, reverse=True))
        num_blank = 0

        def blank(match: re.Match[str]) -> str:
            nonlocal num_blank
            count = marks.get(match[0], int(match[1] or 1))
            num_blank += count
            return self._mask * count

        marked = re.sub(f"{_BLANK}|{own}", blank, text)
        if num_blank == 0:
            raise CommandError("the text has no blank; write [MASK] or [MASK:8] where tokens are to be filled in")
        ids = self.encode(marked)
        if ids.count(self._mask_token_id) != num_blank:
            raise CommandError(f"{_FILE} does not keep its mask token {self._mask!r} apart from the text around it")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, without the special ones."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def ids_of(self, texts: Sequence[str]) -> list[int]:
        """The tokens that are written so in the tokenizer's vocabulary."""
        ids = [self._tokenizer.token_to_id(text) for text in texts]
        if None in ids:
            raise CommandError(
                f"{_FILE} has no token {texts[ids.index(None)]!r}; --stop takes one as it is written there"
            )
        return ids

    def ends(self) -> list[int]:
        """The tokens at which an answer ends, as the ``config.json`` beside the tokenizer names them; often none."""
        file = self._path.with_name("config.json")
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(token) is int and 0 <= token < self._vocab_size for token in ids):
            raise CommandError(f"{file}: eos_token_id must be tokens below {self._vocab_size}, got {named!r}")
        return ids

    def vocabulary(self) -> list[bytes | None]:
        """The bytes of each token; a ValueError of a tokenizer whose tokens have none."""
        if self._vocabulary is None:
            self._vocabulary = token_bytes(self._tokenizer)
        return self._vocabulary

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text; of an unusual tokenizer, what it says alone."""
        try:
            known = self.vocabulary()
        except ValueError:
            return self.decode([token]).encode()
        return known[token] or b"" if token < len(known) else b""

    def pieces(self, ids: list[int], fresh: list[bool]) -> list[tuple[str, str]]:
        """A half-denoised sequence as stretches of text: ``("decided" | "fresh" | "blank", text)``."""
        kinds = [
            "blank" if token == self._mask_token_id else "fresh" if new else "decided"
            for token, new in zip(ids, fresh, strict=True)
        ]
        pieces: list[tuple[str, str]] = []
        start, before = 0, ""
        for end in range(1, len(ids) + 1):
            if end < len(ids) and kinds[end] == kinds[start]:
                continue
            # a token's text depends on the one before it, so a stretch is what decoding up to its end adds
            text = self.decode([token for token in ids[:end] if token != self._mask_token_id])
            added = text[len(before) :] if text.startswith(before) else self.decode(ids[start:end])
            pieces.append((kinds[start], "░" * (end - start) if kinds[start] == "blank" else added))
            start, before = end, text
        return pieces
