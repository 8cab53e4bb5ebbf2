"""The bytes of tokens, of the two kinds of tokenizers for text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from diffusion_runtime.constraints import token_bytes


def test_bytes_of_a_byte_level_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    text = "naïve 日本 text\n\twith\x7f bytes " * 3
    tokenizer.train_from_iterator([text], trainer)
    vocabulary = token_bytes(tokenizer)
    assert vocabulary[tokenizer.token_to_id("<end>")] is None
    assert b"".join(vocabulary[token] for token in tokenizer.encode(text).ids) == text.encode()
    assert {bytes([byte]) for byte in range(256)} <= set(vocabulary)


def test_bytes_of_a_sentencepiece_tokenizer():
    pieces = {"<unk>": 0, "▁a": 1, "b": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = token_bytes(tokenizer)
    assert vocabulary[:4] == [None, b" a", b"b", b"\x00"]
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="byte-level or SentencePiece"):
        token_bytes(tokenizer)
    with pytest.raises(TypeError, match="got list"):
        token_bytes([])
