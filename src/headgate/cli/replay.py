"""`headgate replay`: what the ledger's calls would have cost under another policy, side by side with what they did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated

import msgspec
import typer

from headgate.cli import inputs, output, stores
from headgate.cli.family import AsJson, family
from headgate.cli.prices import AsText, known_model, text_of
from headgate.policy.replay import WARM_UP_NS, Policy, Projection, Replay, Side, Ttl
from headgate.storage.replay_rows import replay_rows
from headgate.wire.catalog import packaged

app = family("The ledger under another policy.")


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate replay …`."""
    app(list(arguments), prog_name=f"headgate {name}")


@app.command()
def replay(
    since: Annotated[str, typer.Option(metavar="7d", help="A span back from now, a date, or a time.")] = "7d",
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Likewise; now, when left out.")] = None,
    model: Annotated[str | None, typer.Option(metavar="M", help="Everything on this model.")] = None,
    ttl: Annotated[str | None, typer.Option(metavar="5m|1h", help="How long shared prefixes are cached.")] = None,
    cache: Annotated[str | None, typer.Option(metavar="on|off", help="Prompt caching.")] = None,
    batch: Annotated[
        str, typer.Option(metavar="SHARE", help="0 to 1: this part of the calls that a batch can take.")
    ] = "0",
    batch_endpoint: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="Its streamed calls can wait, too; repeatable.")
    ] = None,
    reuse: Annotated[str | None, typer.Option(metavar="on|off", help="Equal requests get the same answer.")] = None,
    reuse_ttl: Annotated[str, typer.Option(metavar="1h", help="How long an answer is kept.")] = "1h",
    reuse_endpoint: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="Only its answers are reused; repeatable.")
    ] = None,
    text: AsText = "english",
    as_json: AsJson = False,
) -> None:
    """Replay the ledger's calls under another policy; what is left out stays as it was recorded."""
    catalog, now_ns = packaged(), time.time_ns()
    since_ns = inputs.moment_ns(since, now_ns=now_ns)
    until_ns = now_ns if until is None else inputs.moment_ns(until, now_ns=now_ns)
    flight = stores.settings().cache
    policy = Policy(
        model=None if model is None else known_model(catalog, model).id,
        ttl=_ttl(ttl),
        cache=_switch("--cache", cache),
        batch_share=share("--batch", batch),
        batch_endpoints=frozenset(batch_endpoint or ()),
        reuse=_switch("--reuse", reuse),
        reuse_ttl_s=inputs.span_ns(reuse_ttl) // 10**9,
        reuse_endpoints=frozenset(reuse_endpoint or ()),
        text=text_of(text),
        wait_s=flight.single_flight_wait_s if flight.single_flight else 0.0,
    )
    warm_ns = max(WARM_UP_NS, policy.reuse_ttl_s * 10**9 if policy.reuse is not None else 0)
    replaying = Replay(policy, catalog, since_ns=since_ns, now_ns=now_ns)
    with stores.database() as engine, engine.connect() as connection:
        for row in replay_rows(connection, since_ns=since_ns - warm_ns, until_ns=until_ns):
            replaying.add(row)
    found = replaying.projection()
    if as_json:
        output.print_json(_json(found))
        return
    _print(found)


def share(option: str, text: str) -> Fraction:
    """A share of `0.3`, `30%` or `1/3`. Raises typer.BadParameter."""
    try:
        value = Fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{option}: {text!r} is no share; write 0.3 or 30%")
    return value


def _switch(option: str, text: str | None) -> bool | None:
    if text not in (None, "on", "off"):
        raise typer.BadParameter(f"{option} is on or off")
    return None if text is None else text == "on"


def _ttl(text: str | None) -> Ttl | None:
    match text:
        case None:
            return None
        case "5m" | "1h":
            return text
        case _:
            raise typer.BadParameter("--ttl is 5m or 1h")


def _print(found: Projection) -> None:
    if not found.requests:
        print("No call of this span is in the ledger.")
        return
    columns = ("", "input>", "cache read>", "write 5m>", "write 1h>", "output>", "cost>")
    output.print_table(
        columns,
        [("as recorded", *_side_cells(found.recorded)), ("projected", *_side_cells(found.projected))],
    )
    saved, before = found.saved_nanousd, found.recorded.cost_nanousd
    part = f" ({abs(saved) / before:.0%})" if before else ""
    print(f"\n{'saves' if saved >= 0 else 'costs'} {output.usd(abs(saved))}{part} over {found.requests:,} requests")
    print(f"in a batch: {found.batched:,}; answered again: {found.reused:,}\n")
    output.print_table(
        ("answered by", "requests>", "cost>", "projected>", "saves>"),
        [
            (
                line.model or "–",
                f"{line.requests:,}",
                output.usd(line.recorded.cost_nanousd),
                output.usd(line.projected.cost_nanousd),
                output.usd(line.recorded.cost_nanousd - line.projected.cost_nanousd),
            )
            for line in found.by_model
        ],
    )
    if found.breaks:
        print("\nWhat would break, or is not known:")
    for one in found.breaks:
        print(f"- {one.message}")


def _side_cells(side: Side) -> tuple[str, ...]:
    return (*(f"{count:,}" for count in msgspec.structs.astuple(side.tokens)), output.usd(side.cost_nanousd))


def _json(found: Projection) -> dict[str, object]:
    return {
        "requests": found.requests,
        "recorded": _side_json(found.recorded),
        "projected": _side_json(found.projected),
        "saved_nanousd": found.saved_nanousd,
        "batched": found.batched,
        "reused": found.reused,
        "by_model": [
            {
                "model": line.model,
                "requests": line.requests,
                "recorded": _side_json(line.recorded),
                "projected": _side_json(line.projected),
            }
            for line in found.by_model
        ],
        "breaks": [msgspec.to_builtins(one) for one in found.breaks],
    }


def _side_json(side: Side) -> dict[str, int]:
    tokens: dict[str, int] = msgspec.to_builtins(side.tokens)
    return {**tokens, "cost_nanousd": side.cost_nanousd}
