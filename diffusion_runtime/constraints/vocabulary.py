"""The bytes that each token of a tokenizer stands for."""

from __future__ import annotations

import json
import re
from typing import Any


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """What each token adds to a text; None for special tokens, and for ids that have none.

    Args:
        tokenizer: of the ``tokenizers`` library, or a fast one of transformers. Its decoder must be of one of the two
            kinds there are for text: byte-level (GPT-2's, as in LLaDA, Dream, Qwen), or SentencePiece's, with ``▁`` for
            a space and ``<0x0A>`` for a byte.

    Raises:
        TypeError: neither.
        ValueError: another decoder.
    """
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(tokenizer, "to_str"):
        raise TypeError(f"tokenizer must be one of the tokenizers library, got {type(tokenizer).__name__}")
    described = json.loads(tokenizer.to_str())
    decoder = json.dumps(described.get("decoder"))
    added = {token["id"]: token for token in described.get("added_tokens", ())}
    if '"ByteLevel"' in decoder:
        table = _byte_of_character()
    elif '"ByteFallback"' in decoder or "▁" in decoder:
        table = None
    else:
        raise ValueError(f"the tokenizer's decoder must be byte-level or SentencePiece's, got {decoder}")
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    out: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for text, token in vocabulary.items():
        if token in added:
            out[token] = None if added[token]["special"] else text.encode()
        elif table is not None:
            out[token] = bytes(table[character] for character in text)
        elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", text):
            out[token] = bytes.fromhex(match[1])
        else:
            out[token] = text.replace("▁", " ").encode()
    return out


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256 on, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
