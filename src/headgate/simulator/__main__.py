"""`python -m headgate.simulator`: the simulator as a program by itself."""

import argparse
from pathlib import Path
from typing import get_args

from headgate.simulator.faults import KINDS
from headgate.simulator.server import run
from headgate.simulator.settings import SimulatorSettings, Tier

EPILOG = """\
Steer one request by a directive in its last user message, in metadata.user_id or in the header x-sim:
  [[sim: tokens=200 thinking=40 stop=refusal tool=get_weather error=529 text="…" ttft_ms=50 otps=200]]
Steer many by POST /sim/faults, e.g. {"kind": "529", "model": "claude-sonnet-4-6", "count": 3},
  {"rate": {"529": 0.03}} or {"outage": {"kind": "529", "model": "claude-sonnet-4-6"}}; DELETE /sim/faults ends it.
Read /sim/requests, /sim/bill, /sim/streams, /sim/cache, /sim/limits; POST /sim/reset starts anew.
See docs/simulator.md.

fault kinds:
"""


def settings_from(arguments: list[str] | None = None) -> SimulatorSettings:
    """Settings from a command line; argparse ends the program on a wrong one."""
    default = SimulatorSettings()
    kinds = "\n".join(f"  {kind:<20} {what}" for kind, what in KINDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m headgate.simulator",
        description="A stand-in for the Claude API that bills like it: for tests, load and demos at no cost.",
        epilog=EPILOG + kinds,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default=default.host)
    add("--port", type=int, default=default.port, help="0 takes a free one")
    add("--seed", type=int, default=default.seed, help="same seed, same requests: same answers")
    add("--speed", type=float, default=default.speed, help="times faster than life; 0 sends at once")
    add("--tier", choices=get_args(Tier), default=default.tier, help="rate limits of the organization")
    add("--rpm", type=int, help="requests a minute of each model class, instead of the tier's")
    add("--itpm", type=int, help="input tokens a minute, likewise")
    add("--otpm", type=int, help="output tokens a minute, likewise")
    add("--burst-s", type=float, default=default.burst_s, help="seconds of rate a full request bucket holds")
    add("--ramp-factor", type=float, help="refuse growth beyond this many times the last five minutes' mean")
    add(
        "--ramp-floor-tokens", type=int, default=default.ramp_floor_tokens, help="tokens a minute that are never a ramp"
    )
    add("--spend-cap-usd", type=float, help="monthly spend cap of an organization")
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY[=ORG/WORKSPACE]",
        help="accept only these keys; repeatable",
    )
    add("--lenient", action="store_true", help="accept unknown top-level fields")
    add("--edge-413", action="store_true", help="answer too large a body with HTML, as the network edge does")
    add("--answer-tokens", type=int, default=default.answer_tokens, help="mean length of an answer")
    add("--ttft-s", type=float, help="time to first token of every request")
    add("--otps", type=float, help="output tokens a second of every model")
    add("--ping-s", type=float, default=default.ping_s, help="silence before a ping")
    add("--count-bias", type=float, default=default.count_bias, help="count_tokens answers this many times the truth")
    add("--batch-clock", type=float, default=default.batch_clock, help="how many times faster batches age")
    add("--upstream-tls", nargs=2, type=Path, metavar=("CERT", "KEY"), help="serve https with these PEM files")
    found = parser.parse_args(arguments)
    certificate, key = found.upstream_tls or (None, None)
    return SimulatorSettings(
        host=found.host,
        port=found.port,
        seed=found.seed,
        speed=found.speed,
        tier=found.tier,
        rpm=found.rpm,
        itpm=found.itpm,
        otpm=found.otpm,
        burst_s=found.burst_s,
        ramp_factor=found.ramp_factor,
        ramp_floor_tokens=found.ramp_floor_tokens,
        spend_cap_usd=found.spend_cap_usd,
        api_keys=tuple(found.api_key),
        lenient=found.lenient,
        edge_413=found.edge_413,
        answer_tokens=found.answer_tokens,
        ttft_s=found.ttft_s,
        otps=found.otps,
        ping_s=found.ping_s,
        count_bias=found.count_bias,
        batch_clock=found.batch_clock,
        tls_certificate=certificate,
        tls_key=key,
    )


if __name__ == "__main__":
    run(settings_from())
