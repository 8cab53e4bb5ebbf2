"""A trace: what was written comes back, malformed files are errors, and the page works in a browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_llada

from diffusion_runtime import Denoiser, tracing
from diffusion_runtime.cli import main
from diffusion_runtime.decoding import UniformDiffusion

MASK, END = 60, 7
# some of two bytes of one character, a line break, and what would end a script
TEXTS = {token: bytes([97 + token % 26]) for token in range(60)} | {
    3: "é".encode()[:1], 4: "é".encode()[1:], 5: b"\n", 6: b"</script>", END: b"", MASK: b"",
}  # fmt: skip


def traced(path: Path, denoiser: Denoiser, prompt: torch.Tensor, **run: Any) -> torch.Tensor:
    tokens = prompt
    with path.open("w") as file:
        steps = tracing.write(
            denoiser.stream(prompt, **run),
            file,
            tokens=prompt,
            mask_token_id=denoiser.mask_token_id,
            text_of=TEXTS.__getitem__,
            about={"policy": "a <policy>"},
        )
        for step in steps:
            tokens = step.tokens
    return tokens


@pytest.mark.parametrize("policy", ["low_confidence", "llada2.1", "remdm_cap", "threshold"])
def test_what_was_written_comes_back(policy, tmp_path):
    """Commits, revisions, masks anew and copies behind a stop token: after every step the tokens are the loop's."""
    denoiser = Denoiser(random_llada(), policy=policy, block_length=8, temperature=1.0, stop_token_ids=[END, 9, 11])
    prompt = torch.randint(0, MASK, (3, 4))
    steps = list(denoiser.stream(prompt, max_new_tokens=24, seed=2))
    last = traced(tmp_path / "t.jsonl", denoiser, prompt, max_new_tokens=24, seed=2)
    trace = tracing.read(tmp_path / "t.jsonl")
    assert len(trace.steps) == len(steps)
    assert trace.tokens_after(0) == [[*row, *[MASK] * 24] for row in prompt.tolist()]
    for count, step in enumerate(steps, 1):
        assert trace.tokens_after(count) == step.tokens.tolist()
        for row, changes in enumerate(trace.steps[count - 1].rows):
            known = [p for p, x in zip(changes["position"], changes["logprob"], strict=True) if x is not None]
            assert known == step.commit_mask[row].nonzero()[:, 0].tolist()
    assert trace.tokens_after(len(steps)) == last.tolist()
    assert all(trace.texts[token] == TEXTS[token] for row in last.tolist() for token in row)
    assert trace.about == {"policy": "a <policy>"}
    assert [s.seconds for s in trace.steps] == sorted(s.seconds for s in trace.steps)


def test_uniform_diffusion(tmp_path):
    denoiser = Denoiser(lambda tokens: random_llada()(tokens), policy=UniformDiffusion(61, num_steps=3), block_length=4)
    last = traced(tmp_path / "t.jsonl", denoiser, torch.randint(0, MASK, (2, 3)), max_new_tokens=8)
    trace = tracing.read(tmp_path / "t.jsonl")
    assert trace.tokens_after(len(trace.steps)) == last.tolist()


def test_nothing_to_decide(tmp_path):
    prompt = torch.tensor([[1, 2]])
    traced(tmp_path / "t.jsonl", Denoiser(random_llada()), prompt)
    trace = tracing.read(tmp_path / "t.jsonl")
    assert (trace.steps, trace.tokens) == ([], [[1, 2]])


HEAD = {"format": "diffusion-runtime trace", "version": 1, "mask_token_id": 0, "about": {}, "tokens": [[1, 0]]}
ROW = {name: [1] for name in ("position", "token", "was", "logprob", "confidence", "margin", "entropy")}
STEP = {"step": 0, "seconds": 0.5, "blocks": [[0, 2]], "rows": [ROW]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["nonsense"], "line 1: Expecting value"),
        ([[1]], "line 1: "),
        ([{"step": 0}], "line 1: not a trace"),
        ([HEAD | {"version": 2}], "line 1: a trace of version 2; this is version 1"),
        ([HEAD | {"tokens": 3}], "line 1: "),
        ([HEAD, STEP | {"rows": []}], "line 2: a step must have 1 rows and blocks"),
        ([HEAD, STEP, STEP | {"rows": [ROW | {"token": [1, 2]}]}], "line 3: the columns of a row must have one length"),
        ([HEAD, STEP | {"rows": [ROW | {"position": [-1]}]}], "line 2: positions must be whole numbers from 0"),
        ([HEAD, STEP | {"rows": [ROW | {"position": [10**9]}]}], "line 2: positions must be whole numbers from 0"),
        ([HEAD, STEP | {"texts": {"1": "\u4e2d"}}], "line 2: "),
    ],
)
def test_says_where_a_file_is_wrong(lines, message, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    with pytest.raises(ValueError, match=message):
        tracing.read(path)


def test_replay(tmp_path, capsys):
    denoiser = Denoiser(random_llada(), block_length=8)
    last = traced(tmp_path / "t.jsonl", denoiser, torch.tensor([[10, 11]] * 2), max_new_tokens=8, seed=2)
    assert main(["trace", str(tmp_path / "t.jsonl"), "--row", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == b"".join(TEXTS[token] for token in last[1].tolist()).decode(errors="replace") + "\n"
    assert len(err.splitlines()) == 8
    assert err.splitlines()[-1].startswith("step 8: 1 tokens, 0 blanks left, least confidence 0.")
    assert main(["trace", str(tmp_path / "t.jsonl"), "--row", "3"]) == 2
    assert main(["trace", str(tmp_path / "none")]) == 2
    assert main(["trace", str(tmp_path / "t.jsonl"), "--html", "/nowhere/t.html"]) == 2


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def test_the_page_in_a_browser(browser, tmp_path):
    denoiser = Denoiser(random_llada(), block_length=64, steps_per_block=8, temperature=1.0)
    last = traced(
        tmp_path / "t.jsonl", denoiser, torch.tensor([[10, 3, 4, 6, 5], [12, 3, 13, 14, 5]]), max_new_tokens=507
    )
    assert main(["trace", str(tmp_path / "t.jsonl"), "--html", str(tmp_path / "t.html")]) == 0
    assert (tmp_path / "t.html").stat().st_size < 1_000_000
    trace = tracing.read(tmp_path / "t.jsonl")
    assert (len(trace.tokens[0]), len(trace.steps)) == (512, 64)
    view = browser.new_page(color_scheme="dark")
    complaints: list[str] = []
    view.on("pageerror", lambda error: complaints.append(str(error)))
    view.on("request", lambda request: complaints.append(request.url) if "t.html" not in request.url else None)
    view.goto((tmp_path / "t.html").as_uri())

    def text() -> str:
        return view.locator("#text").text_content()

    def said(count: int, row: int) -> str:
        """Characters that a blank cuts off are cut off there."""
        out = run = b""
        for token in [*trace.tokens_after(count)[row], MASK]:
            if token == MASK:
                out, run = out + run.decode(errors="replace").encode(), b""
            else:
                run += TEXTS[token]
        return out.decode()

    assert text() == said(64, 0)
    assert text() == b"".join(TEXTS[token] for token in last[0].tolist()).decode(errors="replace")
    dark = view.evaluate("getComputedStyle(document.body).backgroundColor")
    view.emulate_media(color_scheme="light")
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") != dark

    # the slider, by mouse and by keys
    box = view.locator("#step").bounding_box()
    view.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    middle = int(view.locator("#step").input_value())
    assert 28 <= middle <= 36
    assert text() == said(middle, 0)
    view.keyboard.press("ArrowLeft")
    assert text() == said(middle - 1, 0)
    view.keyboard.press("Home")
    assert text() == said(0, 0) == "k" + "é</script>\n"
    view.keyboard.press("End")
    assert text() == said(64, 0)

    # a token, by keys
    view.locator("#text").focus()
    for _ in range(7):
        view.keyboard.press("ArrowRight")
    facts = view.locator("#facts").text_content()
    place = next(
        (i + 1, step.rows[0]["logprob"][step.rows[0]["position"].index(6)])
        for i, step in enumerate(trace.steps)
        if 6 in step.rows[0]["position"]
    )
    assert "position6" in facts
    assert f"changed in step{place[0]}" in facts
    assert f"probability{torch.tensor(place[1]).exp():.4f}" in facts

    # the other row, and playing
    view.locator("#row").select_option(index=1)
    assert text() == said(64, 1)
    view.locator("#play").press("Enter")
    view.wait_for_function("Number(document.querySelector('#step').value) < 60")
    view.locator("#play").press("Enter")
    assert text() == said(int(view.locator("#step").input_value()), 1)
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    view.set_viewport_size({"width": 380, "height": 700})
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not complaints
