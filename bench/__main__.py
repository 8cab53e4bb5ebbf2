"""``python -m bench``: ours beside its peers, as tables, records and plots. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from bench import compare, plots, published, report
from bench.check import WrongAnswerError
from bench.comparison import FEW_ROUNDS, LONG_S, SHORT_MS, measure
from bench.machine import describe
from bench.peers import PEERS
from bench.record import Record, load
from bench.scope import DTYPES, Scope
from bench.suites import ONE_DTYPE, SUITES
from bench.timing import MOST
from bench.versions import found
from diffusion_runtime import ops

T = TypeVar("T")
_OTHERS = ("compare", "show", "publish")


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where a wrong answer was not timed, or where what is published is not current."""
    given = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(given if given and given[0] in (*_OTHERS, "-h", "--help") else ["run", *given])
    try:
        status: int = args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return status


def _run(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    level = "quick" if args.quick else "full" if args.full else "normal"
    scope = Scope(device, args.dtype or tuple(DTYPES), level, args.peer or ())
    if args.threads:
        if device.type != "cpu":
            raise ValueError(f"--threads are those of a CPU, and --device is {device}: leave one of them out")
        torch.set_num_threads(args.threads)
    wanted = args.what or list(SUITES)
    their = "bfloat16" if device.type == "cuda" else "float32"
    if args.dtype and their not in args.dtype:
        if named := [op for op in args.what if op in ONE_DTYPE]:
            raise ValueError(f"{', '.join(named)} are timed in {their} here, and --dtype leaves it out")
        wanted = [op for op in wanted if op not in ONE_DTYPE]
    if args.plot:
        plots.load_matplotlib()  # or minutes later there would be no plots
    record = Record(device.type, describe(device), _rules(scope), found())
    start = time.perf_counter()

    def say(line: str) -> None:
        if not args.quiet:
            print(f"{time.perf_counter() - start:5.0f} s  {line}", file=sys.stderr, flush=True)

    try:
        for op in wanted:
            for result in measure(op, SUITES[op], scope, say):
                record.results.append(result)
                if args.json:
                    record.save(args.json)  # each time: a run may be cut short
    except (WrongAnswerError, ops.BackendUnavailableError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(report.markdown(record))
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        for path in plots.write(record.results, args.plot):
            say(f"wrote {path}")
    say("done")
    timed = {peer.name for result in record.results for peer in result.of("peer")}
    unknown = [word for word in scope.peers if not any(word.lower() in name.lower() for name in timed)]
    if unknown:
        raise ValueError(f"no peer has {' or '.join(unknown)} in its name, of those that could be timed")
    return 0


def _rules(scope: Scope) -> dict[str, str]:
    more = f", up to {MOST * scope.rounds} within {scope.seconds:g} s" if scope.seconds else ""
    return {
        "level": scope.level,
        "rounds": f"{scope.rounds}{more}, or {FEW_ROUNDS} where one takes over {LONG_S:g} s; another does not count",
        "spread": "20th to 80th percentile; ratios are taken round by round",
        "caches": f"flushed before calls of {SHORT_MS:g} ms or more, warm for shorter ones",
    }


def _compare(args: argparse.Namespace) -> int:
    print(compare.markdown(load(args.before), load(args.after)))
    return 0


def _show(args: argparse.Namespace) -> int:
    print(report.markdown(load(args.record)))
    return 0


def _publish(args: argparse.Namespace) -> int:
    stale = published.write(check=args.check)
    for path in stale:
        print(f"{path} {'is not what the records say: run python -m bench publish' if args.check else 'was written'}")
    return int(args.check and bool(stale))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description="Ours beside its peers.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="time it; what is done where no command is named")
    run.set_defaults(run=_run)
    run.add_argument("what", nargs="*", type=_one_of(*SUITES), metavar="WHAT", help=f"of {', '.join(SUITES)}; or all")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument(
        "--dtype", type=_list(_one_of(*DTYPES)), help="float32,bfloat16; step, generate and growth have one"
    )
    run.add_argument("--threads", type=_count, help="of a CPU (default: all)")
    run.add_argument(
        "--peer", type=_list(str), metavar="WORD", help=f"peers with one of these in their names: {PEERS[0]}"
    )
    level = run.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="one shape of each op, without a compiler")
    level.add_argument("--full", action="store_true", help="everything, however long it takes")
    run.add_argument("--json", type=Path, metavar="FILE", help="keep every sample")
    run.add_argument("--plot", type=Path, metavar="DIR", help="draw ratios and growth, on light and on dark")
    run.add_argument("--quiet", action="store_true", help="no progress")
    moved = commands.add_parser("compare", help="what moved from one record to another, by more than noise")
    moved.add_argument("before", type=Path)
    moved.add_argument("after", type=Path)
    moved.set_defaults(run=_compare)
    show = commands.add_parser("show", help="the tables of a record")
    show.add_argument("record", type=Path)
    show.set_defaults(run=_show)
    publish = commands.add_parser("publish", help="the tables and plots of README and docs, from the records")
    publish.add_argument("--check", action="store_true", help="write nothing; fail where they are not current")
    publish.set_defaults(run=_publish)
    return parser


def _list(item: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    return lambda text: tuple(item(part) for part in text.split(","))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _one_of(*names: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
        return text

    return check


if __name__ == "__main__":
    sys.exit(main())
