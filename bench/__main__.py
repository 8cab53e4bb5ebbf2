"""``python -m bench``: tables of ``sample_tokens`` beside its peers. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch

from bench import growth
from bench.check import WrongAnswerError
from bench.comparison import compare
from bench.comparison import markdown as comparisons_markdown
from bench.machine import describe
from bench.peers import PEERS
from bench.record import MODES, load
from bench.report import markdown
from bench.runners import OP
from bench.session import Plan, Session
from bench.suites import SUITES
from diffusion_runtime import ops

T = TypeVar("T")

# for a look in between; the compiler is called once for each number of threads
QUICK = Plan(
    rows=(64,),
    vocab=(126_464,),
    dtypes=("float32",),
    modes=MODES[:2],
    left_out=(("compiled", MODES[1].name), ("llada", MODES[1].name)),
    rounds=5,
)


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.show:
        print(markdown(load(args.show)))
        return 0
    if args.suite:
        return _suite(args)
    plan = _plan(args)
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", file=sys.stderr, flush=True)

    try:
        record = Session(plan, say).run()
    except (WrongAnswerError, ops.BackendUnavailableError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(markdown(record))
    if args.json:
        record.save(args.json)
    say("done")
    return 0


def _suite(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    if device.type == "cpu" and args.threads:
        torch.set_num_threads(args.threads[0])
    facts = describe(device) | {"threads": str(torch.get_num_threads())}
    print("; ".join(f"{name} {fact}" for name, fact in facts.items()))
    kept: dict[str, object] = {"machine": facts}
    try:
        for name in SUITES if args.suite == "all" else [args.suite]:
            results = list(compare(SUITES[name](device), device, args.rounds))
            kept[name] = [asdict(result) for result in results]
            print("", comparisons_markdown(results), sep="\n", flush=True)
            _keep(kept, args.json)  # each time: a run may be cut short
    except WrongAnswerError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if args.suite == "all":
        points = list(growth.measure(device, args.rounds))
        kept["growth"] = [asdict(point) for point in points]
        print("", growth.markdown(points), sep="\n")
        _keep(kept, args.json)
    return 0


def _keep(kept: dict[str, object], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(kept, indent=1) + "\n")


def _plan(args: argparse.Namespace) -> Plan:
    plan = QUICK if args.quick else Plan()
    plan = replace(
        plan,
        rows=args.rows or plan.rows,
        vocab=args.vocab or plan.vocab,
        dtypes=args.dtype or plan.dtypes,
        threads=args.threads or plan.threads,
        backends=args.backend or plan.backends,
        peers=args.peers or plan.peers,
        device=torch.device(args.device),
    )
    if plan.device.type == "cuda":
        plan = replace(plan, threads=(torch.get_num_threads(),), buffers=3)
    return plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=f"Times {OP} beside its peers.")
    parser.add_argument("--rows", type=_list(_count), help="64,256")
    parser.add_argument("--vocab", type=_list(_even), help="126464,262144")
    parser.add_argument("--dtype", type=_list(_one_of("float32", "bfloat16", "float16")))
    parser.add_argument("--threads", type=_list(_count), help="1,2; CPU only")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", type=_list(str), help="all that can run, but the reference")
    parser.add_argument("--peers", type=_list(_one_of(*PEERS)), help=",".join(PEERS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record, raw samples included")
    parser.add_argument("--quick", action="store_true", help="one shape, in less than half a minute")
    parser.add_argument("--suite", choices=(*SUITES, "all"), help="other ops beside their peers, and how ours grows")
    parser.add_argument("--rounds", type=_count, default=5, help="of a suite")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a record, and time nothing")
    return parser


def _list(item: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    return lambda text: tuple(item(part) for part in text.split(","))


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _even(text: str) -> int:
    value = _count(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"the pure read takes rows as words of 4 bytes: expected even, got {value}")
    return value


def _one_of(*names: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
        return text

    return check


if __name__ == "__main__":
    sys.exit(main())
