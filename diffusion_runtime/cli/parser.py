"""The options of every command."""

from __future__ import annotations

import argparse
import math
from typing import Any, NoReturn

from diffusion_runtime.cli.errors import CommandError

# Written here a second time because importing them would import torch; the tests hold both to be the same.
SCHEDULED = (
    *("low_confidence", "random", "topk_margin", "entropy", "mdlm", "llada2"),
    *("dream_origin", "dream_maskgit_plus", "dream_topk_margin", "dream_entropy"),
    *("sdar_sequential", "sdar_static", "sdar_dynamic"),
    *("remdm_cap", "remdm_rescale", "remdm_conf", "remdm_loop"),
)
DECIDING_THEMSELVES = (
    *("threshold", "factor", "eb_sampler", "fast_dllm_v2", "llada2.1"),
    *("sdar_entropy_bounded", "bd3lm_first_hitting"),
)
POLICIES = SCHEDULED + DECIDING_THEMSELVES
BACKENDS = ("reference", "cpp", "triton", "cuda")

_MODEL = "folder, pycode (in this package), or id on the Hugging Face hub"

_EXAMPLES = """\
examples:
  diffusion-runtime demo
  diffusion-runtime demo --puzzles 5 --policy topk_margin
  diffusion-runtime solve puzzles.txt --json
  diffusion-runtime generate 'The capital of France is' --model ./LLaDA-8B-Base
  diffusion-runtime infill 'The capital of [MASK:2] is Paris.' --model ./LLaDA-8B-Base
  diffusion-runtime trace steps.jsonl --html steps.html
  diffusion-runtime compare my_loop.py:generate --model ./model --prompt 'def f('
  diffusion-runtime bench sample_tokens --quick
  diffusion-runtime doctor

exit codes: 0 done, 1 a puzzle was not solved or two loops differ, 2 bad input or usage,
3 something is missing (model, extra, backend)"""

_SOLVE = """\
A PUZZLE is 81 characters, row by row, with . or 0 for a blank; or a file; or -
for standard input. A file holds one puzzle on each line, or grids of nine lines
apart by blank lines, or both; # begins a comment. All are solved together.

A malformed or contradictory puzzle is refused with its cell, and then nothing
is solved. An answer that breaks a rule or changes a given is reported as not
solved (exit code 1). Of a puzzle with several solutions, any one will do."""

_GENERATE = """\
Appends tokens to PROMPT (- reads it from standard input) and prints them as
text. The prompt goes to the model as it stands: put a chat template around it
yourself. The folder of the model must hold a tokenizer.json."""

_INFILL = """\
Fills the blanks of TEXT (- reads it from standard input) and prints the whole.
[MASK] is a blank of one token, [MASK:8] one of eight, and the mask token of the
tokenizer itself counts as one. With --mask '____=8', every ____ of the text is
a blank of eight tokens. The folder of the model must hold a tokenizer.json."""

_DEMO = """\
Solves puzzles held out from training with the shipped model, and shows each
step. Exit code 1 if one of them is not solved."""

_COMPARE = """\
Runs the function on the model and the prompt, beside our loop with the options
below at temperature 0, and prints the first step and position at which their
tokens differ and why: a tie, precision, a stale cache, or another rule. It is
called with the model and [1, length] tokens, masks where undecided, and yields
the tokens after each of its steps. Exit code 1 if they differ."""

_TRACE = """\
Shows on a terminal how a sequence was denoised, step by step, and prints it.
With --html FILE a page is written: a slider over the steps, tokens coloured by
the confidence they were committed with."""

_DOCTOR = """\
Shows versions, devices, and for each op which backend would run and why the
others would not."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        fixed: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**fixed, **options)

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; see: {self.prog} --help")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from diffusion_runtime import __version__

        print(f"diffusion-runtime {__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; it raises CommandError where argparse would exit with an error."""
    parser = _Parser(
        prog="diffusion-runtime",
        description="Denoise with masked diffusion language models: fused kernels and a thin loop.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo", help="watch the shipped model solve a Sudoku puzzle it has never seen", description=_DEMO
    )
    demo.add_argument("--seed", type=_integer(0), default=0, metavar="N", help="first puzzle (default: 0)")
    demo.add_argument("--puzzles", type=_integer(1), default=1, metavar="K", help="how many (default: 1)")
    demo.add_argument("--delay", type=_number(0), metavar="S", help="seconds to look at each step (terminal: 0.06)")
    _model_option(demo)
    _decoding_options(demo)

    solve = commands.add_parser("solve", help="solve Sudoku puzzles", description=_SOLVE)
    solve.add_argument("puzzles", nargs="+", metavar="PUZZLE", help="81 characters, a file, or -")
    _model_option(solve)
    _decoding_options(solve)
    _sampling_options(solve)

    generate = commands.add_parser("generate", help="continue a prompt", description=_GENERATE)
    generate.add_argument("prompt", metavar="PROMPT", help="text, or -")
    generate.add_argument(
        "--max-new-tokens", type=_integer(1), default=64, metavar="N", help="tokens to append (default: 64)"
    )
    infill = commands.add_parser("infill", help="fill the blanks of a text", description=_INFILL)
    infill.add_argument("text", metavar="TEXT", help="text with blanks, or -")
    infill.add_argument(
        "--mask", action="append", type=_mask, default=[], metavar="MARK=N", help="MARK is a blank of N tokens"
    )
    for command in (generate, infill):
        command.add_argument("--model", required=True, metavar="PATH|ID", help=_MODEL)
        command.add_argument(
            "--block-length",
            type=_integer(1),
            metavar="N",
            help="decide blocks of N from the left (default: all at once)",
        )
        _decoding_options(command)
        _sampling_options(command)
        _language_options(command)

    trace = commands.add_parser("trace", help="replay what --trace wrote, or make a page of it", description=_TRACE)
    trace.add_argument("file", metavar="FILE", help="what --trace of solve, generate or infill wrote")
    trace.add_argument("--html", metavar="FILE", help="write a page instead, which needs nothing but a browser")
    trace.add_argument("--row", type=_integer(1), default=1, metavar="N", help="of several sequences (default: 1)")
    trace.add_argument("--delay", type=_number(0), default=0.1, metavar="S", help="between steps (default: 0.1)")

    compare = commands.add_parser(
        "compare", help="run a loop of your own beside ours and say where they part", description=_COMPARE
    )
    compare.add_argument("loop", metavar="FILE.py:FUNCTION", help="the loop; FILE.py is executed")
    compare.add_argument("--model", required=True, metavar="PATH|ID", help=_MODEL)
    prompt = compare.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="for the tokenizer beside the weights")
    prompt.add_argument("--tokens", metavar="N,N,...", help="the same as token ids")
    compare.add_argument("--max-new-tokens", type=_integer(0), default=64, metavar="N", help="to append (default: 64)")
    compare.add_argument("--block-length", type=_integer(1), metavar="N", help="of ours (default: all at once)")
    compare.add_argument("--json", action="store_true", help="one JSON document on standard output")
    _decoding_options(compare)

    # everything behind it is for the bench, options too
    bench = commands.add_parser(
        "bench", help="time ours beside its peers (in a clone of the repository)", prefix_chars="\0", add_help=False
    )
    bench.add_argument("arguments", nargs=argparse.REMAINDER)

    doctor = commands.add_parser(
        "doctor", help="versions, devices, and which backend runs each op", description=_DOCTOR
    )
    doctor.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return parser


def _model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="folder of a Sudoku model (default: the shipped one)")


def _decoding_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--policy",
        choices=POLICIES,
        default="low_confidence",
        metavar="P",
        help=f"what a step commits: {', '.join(POLICIES)} (default: low_confidence)",
    )
    group.add_argument(
        "--threshold", type=_number(0, 1), metavar="T", help="of --policy threshold: commit above it (default: 0.9)"
    )
    group.add_argument("--steps", type=_integer(1), metavar="N", help="forwards in all (default: one per blank)")
    group.add_argument(
        "--backend", choices=BACKENDS, metavar="B", help=f"how to sample: {', '.join(BACKENDS)} (default: the fastest)"
    )
    group.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, cuda:1, ...")


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling and output")
    group.add_argument(
        "--temperature", type=_number(0), default=0.0, metavar="T", help="0: the most probable token (default)"
    )
    group.add_argument("--seed", type=_integer(0, 2**64 - 1), default=0, metavar="N", help="of the draws (default: 0)")
    group.add_argument("--json", action="store_true", help="one JSON document on standard output, nothing else there")
    group.add_argument("--trace", metavar="FILE", help="write what each step committed, one JSON object per line")
    group.add_argument("--quiet", action="store_true", help="no progress and no summary")


def _language_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the answer may be")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TOKEN",
        help="the answer ends at this token of the tokenizer, such as '<|endoftext|>'; may be repeated (default of "
        "generate: the eos_token_id of config.json)",
    )
    language = group.add_mutually_exclusive_group()
    language.add_argument("--regex", metavar="R", help="the whole answer matches this expression (Rust's syntax)")
    language.add_argument("--json-schema", metavar="FILE", help="the answer is JSON that this schema describes")


class _integer:
    """The type of an option: a whole number from ``low``."""

    def __init__(self, low: int, high: int | None = None) -> None:
        self.low, self.high = low, high

    def __call__(self, text: str) -> int:
        value = int(text) if text.isdecimal() else -1
        if value < self.low or (self.high is not None and value > self.high):
            upper = "" if self.high is None else f" to {self.high}"
            raise argparse.ArgumentTypeError(f"expected a whole number from {self.low}{upper}, got {text!r}")
        return value


class _number:
    """The type of an option: a finite number from ``low``."""

    def __init__(self, low: float, high: float = math.inf) -> None:
        self.low, self.high = low, high

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and self.low <= value <= self.high):
            upper = f" to {self.high}" if math.isfinite(self.high) else ""
            raise argparse.ArgumentTypeError(f"expected a number from {self.low}{upper}, got {text!r}")
        return value


def _mask(text: str) -> tuple[str, int]:
    mark, _, count = text.rpartition("=")
    if not mark or not count.isdecimal() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"expected MARK=N, such as ____=8, got {text!r}")
    return mark, int(count)


def check_decoding(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    if args.threshold is not None and args.policy != "threshold":
        raise CommandError(f"--threshold belongs to --policy threshold, not to {args.policy}; leave one of them out")
    if args.steps is not None and args.policy in DECIDING_THEMSELVES:
        raise CommandError(f"--policy {args.policy} decides itself how many steps it takes; leave --steps out")
