"""A trace as one page of HTML that needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusion_runtime.tracing.file import STATISTICS, Trace


def page(trace: Trace, title: str = "trace") -> str:
    """A page with a slider over the steps; tokens are coloured by the probability they had when they were committed.

    Args:
        trace: at least one row.
        title: of the page.
    """
    data: dict[str, Any] = {
        "title": title,
        "mask": trace.mask_token_id,
        "about": trace.about,
        "tokens": trace.tokens,
        "texts": {str(token): text.decode("latin-1") for token, text in trace.texts.items()},
        "steps": [
            [
                step.seconds,
                [[row["position"], row["token"], row["was"], *(row[name] for name in STATISTICS)] for row in step.rows],
            ]
            for step in trace.steps
        ],
    }
    # "<" could end the script
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("/*TRACE*/null", packed)
