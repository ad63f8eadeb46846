"""Measures gateways side by side and writes the figures to a file of JSON; report.py makes the table of it.

python bench/run.py --gateways nginx,headgate,litellm --out bench/results.json
python bench/report.py
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import measure
from gateways import Gateway, Headgate, LiteLlm, Nginx
from kit import Bench, BenchError, compile_tools, cores_kept_awake, machine_facts, raise_file_limit, started_upstream

GROUPS = ("cpu", "events", "latency", "aborts", "memory")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gateways", default="nginx,headgate", help="of nginx, headgate, litellm (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--repeat", type=int, default=3, help="times everything is measured (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="shorter loads: for a look, not for a record")
    parser.add_argument(
        "--patience",
        type=float,
        default=0,
        metavar="S",
        help="on a machine that others use: for the first S seconds, wait for quiet and repeat what was disturbed",
    )
    parser.add_argument("--only", default="", help=f"some of {', '.join(GROUPS)}")
    parser.add_argument("--gateway-core", type=int, default=0)
    parser.add_argument("--load-core", type=int, default=1)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "headgate-bench",
        help="where gateways are installed and the tools compiled (default: %(default)s)",
    )
    return parser.parse_args(argv)


def chosen_gateways(names: str) -> list[Gateway]:
    gateways: list[Gateway] = []
    for name in names.split(","):
        kind, _, python = name.partition(":")
        match kind:
            case "nginx":
                gateways.append(Nginx())
            case "litellm":
                gateways.append(LiteLlm())
            case "headgate":
                gateways.append(Headgate(python))
            case _:
                raise BenchError(f"unknown gateway {name}: choose of nginx, headgate, litellm")
    return gateways


def chosen_groups(only: str) -> frozenset[str]:
    groups = frozenset(filter(None, only.split(",")))
    if groups - set(GROUPS):
        raise BenchError(f"unknown group {', '.join(sorted(groups - set(GROUPS)))}: choose of {', '.join(GROUPS)}")
    return groups


def run(options: argparse.Namespace) -> dict[str, object]:
    gateways = chosen_gateways(options.gateways)
    only = chosen_groups(options.only)
    durations = measure.QUICK if options.quick else measure.FULL
    if {options.gateway_core, options.load_core} - os.sched_getaffinity(0) or options.gateway_core == options.load_core:
        raise BenchError("two cores are needed, one for the gateway and one for the load")
    # We wake up seldom, and only to read /proc, but never on the gateway's core.
    os.sched_setaffinity(0, {options.load_core})
    raise_file_limit()
    compile_tools(options.cache / "build")
    for gateway in gateways:
        gateway.prepare(options.cache)
    versions = {gateway.name: gateway.version() for gateway in gateways}

    results: dict[str, list[dict[str, measure.Record]]] = {name: [] for name in ["direct", *(g.name for g in gateways)]}
    failures: list[str] = []
    with ExitStack() as stack:
        awake = stack.enter_context(cores_kept_awake())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headgate-bench-")))
        upstream = stack.enter_context(started_upstream(options.cache / "build", scratch, options.load_core))
        bench = Bench(
            build=options.cache / "build",
            scratch=scratch,
            gateway_core=options.gateway_core,
            load_core=options.load_core,
            upstream=upstream,
            patient_until=time.monotonic() + options.patience,
        )
        for repeat in range(options.repeat):
            print(f"repeat {repeat + 1} of {options.repeat}: direct", flush=True)
            results["direct"].append(measure.traffic(bench, measure.direct(bench), durations, only, failures))
            # Another one is first each time, so that a drift of the machine falls on all.
            turn = repeat % len(gateways)
            for gateway in gateways[turn:] + gateways[:turn]:
                print(f"repeat {repeat + 1} of {options.repeat}: {gateway.name}", flush=True)
                records, failed = measure.measure(bench, gateway, durations, only)
                results[gateway.name].append(records)
                for failure in failed:
                    failures.append(f"{gateway.name}: {failure}")
                    print(f"  {failures[-1]}", file=sys.stderr, flush=True)
    return {
        "measured_at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join(["python", "bench/run.py", *sys.argv[1:]]),
        "machine": {**machine_facts(), "cores_kept_awake": awake},
        "versions": versions,
        "durations": asdict(durations),
        "failures": failures,
        "results": results,
    }


def main(argv: Sequence[str]) -> int:
    options = arguments(argv)
    # So that a terminated run, too, stops the gateways that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        figures = run(options)
    except (BenchError, subprocess.CalledProcessError) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
