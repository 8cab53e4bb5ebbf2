"""Constraints: which tokens a position may hold, against all texts there are; and whole answers, in any order."""

from __future__ import annotations

import itertools
import json
import random
import re

import numpy as np
import pytest
import torch
from languages import conforms, random_pattern, random_schema
from models import CONFIG, random_llada

from diffusion_runtime import Denoiser, Request
from diffusion_runtime.constraints import Progress, json_schema, judge, regex
from diffusion_runtime.decoding import Policy
from diffusion_runtime.ops import pack_allowed

END, MASK = 1, 60
# tokens of a byte and of several, halves of a character, one in no text, and unused ones
VOCABULARY: list[bytes | None] = [
    *(None, None, b"a", b"b", b"c", b"0", b"1", b"ab", b"bc", b"a1", "é".encode(), b"\xc3", b"\xa9", b"", b"abc"),
    *(bytes([byte]) for byte in b'{}[]":, -.23456789xyz_'),
    *(None for _ in range(23)),
]
SMALL = VOCABULARY[:15]
PATTERNS = ["(ab)*é?", "[^a]*", "(a|b)*abb", "a{1,3}b|c+", "[01]+(ab)?", ".*a", "(?i:A)b?", "é|c"]


def text_of(tokens) -> bytes:
    return b"".join(VOCABULARY[token] or b"?" for token in tokens)


def matches(pattern: str, tokens: list[int]) -> bool:
    """Whether tokens up to the first end, behind which there may only be others, are a text of the language."""
    kept = list(itertools.takewhile(lambda token: token != END, tokens))
    if any(token != END for token in tokens[len(kept) :]) or any(not VOCABULARY[token] for token in kept):
        return False
    try:
        return re.fullmatch(pattern, text_of(kept).decode()) is not None
    except UnicodeDecodeError:
        return False


def everything(count: int, vocab: int) -> np.ndarray:
    return pack_allowed(torch.ones(count, vocab, dtype=torch.bool)).numpy()


def unpacked(words: np.ndarray, vocab: int) -> set[int]:
    return {token for token in range(vocab) if words[token // 32] >> (token % 32) & 1}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ends", [True, False])
def test_a_position_may_hold_what_some_text_has_there(pattern, ends):
    rng, vocab = random.Random(pattern), len(SMALL)
    automaton = regex(pattern, SMALL).with_end([END] if ends else [])
    for length in (1, 2, 3):
        texts = [t for t in itertools.product(range(vocab), repeat=length) if matches(pattern, list(t))]
        texts = [t for t in texts if ends or END not in t]
        for _ in range(8):
            tokens = [rng.choice([MASK, MASK, rng.randrange(vocab)]) for _ in range(length)]
            filters = torch.rand(length, vocab) < 0.8
            fitting = [
                text
                for text in texts
                if all(own == t if own != MASK else filters[i, t] for i, (own, t) in enumerate(zip(tokens, text)))  # noqa: B905
            ]
            packed = pack_allowed(filters).numpy()
            if not fitting:
                with pytest.raises(ValueError, match="no text of the constraint fits"):
                    Progress(automaton, tokens, MASK, packed)
                continue
            progress = Progress(automaton, tokens, MASK, packed)
            for place in rng.sample(range(length), length):
                if tokens[place] != MASK:
                    continue
                assert unpacked(progress.words(place), vocab) == {text[place] for text in fitting}
                # decide it, and go on: what was known is brought up to date, not made anew
                token = rng.randrange(vocab)
                fits = any(text[place] == token for text in fitting)
                assert progress.decide(place, token) == fits
                if fits:
                    fitting = [text for text in fitting if text[place] == token]


def test_commits_of_one_step_are_judged_together():
    progress = Progress(regex("(ab)*|(bc)*", SMALL), [MASK] * 4, MASK, everything(4, len(SMALL)))
    a, b, c = 2, 3, 4
    assert judge(progress, [0, 1, 3], [a, c, b], [0.2, 0.3, 0.9]) == [True, False, True]  # the surest first
    assert judge(progress, [1, 2], [b, a], [0.5, 0.5]) == [True, True]
    for confidence, expected in (([0.5, 0.5], [True, False]), ([0.4, 0.5], [False, True])):
        progress = Progress(regex("(ab)*|(bc)*", SMALL), [MASK] * 2, MASK, everything(2, len(SMALL)))
        assert judge(progress, [0, 1], [b, b], confidence) == expected


ORDERS = ["low_confidence", "random", "threshold", "entropy", "eb_sampler", "mdlm", "dream_origin", "llada2", "factor"]


@pytest.mark.parametrize("part", range(10))
def test_every_answer_is_in_its_language(part):
    """50 expressions and schemas in each part, several of them in a batch, in all orders."""
    rng = random.Random(part)
    cache, block = rng.choice(["none", "prefix", "dual"]), rng.choice([None, 8])
    denoiser = Denoiser(random_llada(), block_length=block, cache=cache)
    requests, languages = [], {}
    while len(requests) < 50:
        if len(requests) % 2:
            schema = random_schema(rng)
            automaton, language = json_schema(schema, VOCABULARY), schema
        else:
            language = random_pattern(rng)
            automaton = regex(language, VOCABULARY)
        policy = rng.choice(ORDERS)
        request = Request(
            [rng.randrange(2, 30) for _ in range(rng.randint(1, 6))],
            max_new_tokens=rng.randint(8, 40),
            constraint=automaton,
            stop_token_ids=[END],
            policy=policy,
            steps_per_block=rng.choice([None, 1, 3]) if policy not in ("threshold", "eb_sampler", "factor") else None,
            temperature=rng.choice([0.0, 1.0]),
            top_k=rng.choice([None, 5]),
            suppress=rng.choice([None, [7]]),
            seed=rng.randrange(2**32),
        )
        if possible(denoiser, request):
            languages[id(request)] = language
            requests.append(request)
    results = list(denoiser.serve(requests, batch_size=4))
    assert len(results) == len(requests)
    for result in results:
        language = languages[id(result.request)]
        assert MASK not in result.tokens.tolist()
        text = text_of(result.new_tokens).decode()
        if isinstance(language, str):
            assert re.fullmatch(language, text), (language, text)
        else:
            assert conforms(json.loads(text), language), (language, text)

    for result in results[:5]:
        (alone,) = denoiser.serve([result.request])
        assert alone.tokens.tolist() == result.tokens.tolist()


def possible(denoiser: Denoiser, request: Request) -> bool:
    """A request that fits in no way says so before a step is taken."""
    try:
        denoiser._batch([request], torch.device("cpu"))
    except ValueError as error:
        if "no text of the constraint fits" in str(error):
            return False
        raise
    return True


def test_what_stands_between_is_part_of_the_text():
    """Infill: from the first undecided position to the last, pinned tokens included; no end token, so all of it."""
    a, b = VOCABULARY.index(b"a"), VOCABULARY.index(b"b")
    prompt = [7, MASK, MASK, b, MASK, MASK, 9]
    (result,) = Denoiser(random_llada()).serve([Request(prompt, constraint=regex("(ab)*|(ba)*", VOCABULARY))])
    tokens = result.tokens.tolist()
    assert (tokens[0], tokens[-1], tokens[3]) == (7, 9, b)
    assert re.fullmatch("(ab)*|(ba)*", text_of(tokens[1:6]).decode())
    (same,) = Denoiser(random_llada(), constraint=regex("b", VOCABULARY)).serve([Request([7, 9])])  # nothing to decide
    assert same.tokens.tolist() == [7, 9]
    with pytest.raises(ValueError, match="no text of the constraint fits 3 positions, of which 1 are decided"):
        next(Denoiser(random_llada()).serve([Request([MASK, a, MASK], constraint=regex("b*", VOCABULARY))]))


def test_allowed_sets_hold_alone_and_with_a_language():
    allowed = torch.zeros(2 + 6, CONFIG.vocab_size, dtype=torch.bool)
    for place in range(8):
        allowed[place, [2 + place % 3, 9, END]] = True
    denoiser = Denoiser(random_llada(), temperature=2.0, policy="random")
    for seed in range(4):
        request = Request([3, 4], max_new_tokens=6, allowed=allowed, seed=seed)
        (result,) = denoiser.serve([request])
        assert all(allowed[2 + i, token] for i, token in enumerate(result.new_tokens))
    language = regex("[abc1]*", VOCABULARY)
    for seed in range(4):
        request = Request([3, 4], max_new_tokens=6, allowed=allowed, constraint=language, seed=seed)
        (result,) = denoiser.serve([request])
        assert all(allowed[2 + i, token] for i, token in enumerate(result.new_tokens))
        assert END not in result.new_tokens
        assert re.fullmatch("[abc1]*", text_of(result.new_tokens).decode())


def test_an_answer_is_no_shorter_than_asked_for():
    request = {"constraint": regex("a*", VOCABULARY), "stop_token_ids": [END], "max_new_tokens": 12}
    denoiser = Denoiser(random_llada(), policy="random", temperature=3.0)
    for seed in range(5):
        (result,) = denoiser.serve([Request([5], min_new_tokens=7, seed=seed, **request)])
        assert len(result.new_tokens) >= 7


def test_what_a_step_leaves_out_takes_further_steps():
    """A schedule that decides everything in its only step; tokens that agree with no others are tried again."""
    everything_at_once = Policy(lambda samples, canvas: canvas.masked & (canvas.index == 0)[:, None])
    denoiser = Denoiser(random_llada(), policy=everything_at_once, num_steps=1, temperature=2.0)
    language = regex("(abc)*|(bca)*|(cab)*", VOCABULARY)
    forwards = set()
    for seed in range(5):
        (result,) = denoiser.serve([Request([5], max_new_tokens=6, constraint=language, seed=seed)])
        assert re.fullmatch("(abc)*|(bca)*|(cab)*", text_of(result.new_tokens).decode())
        forwards.add(result.num_forwards)
    assert max(forwards) > 1


def test_neighbours_keep_their_own_rules():
    others = Request([5], max_new_tokens=4, suppress=[token for token in range(61) if token != 9])
    constrained = Request([5], max_new_tokens=4, constraint=regex("a+", VOCABULARY))
    results = list(Denoiser(random_llada()).serve([others, constrained]))
    assert {tuple(result.new_tokens) for result in results} == {(9,) * 4, (2,) * 4}
    assert Denoiser(random_llada(), constraint=regex("a+", VOCABULARY)).generate(
        torch.tensor([[5], [6]]), max_new_tokens=4
    )[:, 1:].tolist() == [[2] * 4] * 2  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "llada2.1"}, "keeps what is decided"),
        ({"policy": "remdm_cap"}, "keeps what is decided"),
        ({"stop": lambda tokens: None}, "no stop"),
        ({"allowed": torch.ones(3, 61)}, r"allowed must be \[5, vocab\] bool"),
        ({"allowed": torch.ones(5, 60, dtype=torch.bool), "constraint": None}, "allowed must have 61 columns"),
    ],
)
def test_rejects_what_a_constraint_does_not_go_with(settings, message):
    settings = {"constraint": regex("a*", VOCABULARY), **settings}
    with pytest.raises(ValueError, match=message):
        next(Denoiser(random_llada()).serve([Request([5], max_new_tokens=4, **settings)]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: regex("(", VOCABULARY), "cannot be used"),
        (lambda: regex("(?=a)b", VOCABULARY), "cannot be used"),
        (lambda: json_schema("{", VOCABULARY), "JSON schema cannot be used"),
        (lambda: json_schema({"not": {}}, VOCABULARY), "JSON schema cannot be used"),
    ],
)
def test_says_why_a_language_cannot_be_used(make, message):
    with pytest.raises(ValueError, match=message):
        make()
