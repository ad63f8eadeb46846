"""`headgate prices`: today's prices, their changes, what other models would have cost for your own traffic; and
`headgate prices apply`, which prices the ledger again after a correction."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from typing import Annotated

import msgspec
import sqlalchemy as sa
import typer

from headgate.cli import inputs, output, stores
from headgate.cli.errors import CommandError, Exit
from headgate.cli.family import AsJson, family
from headgate.policy.replay import WARM_UP_NS, Policy, Projection, Replay, ReplayRow
from headgate.policy.tokenizer_change import TEXTS, Text
from headgate.storage.replay_rows import replay_rows
from headgate.storage.reprice import Repriced, reprice
from headgate.storage.tables import calls
from headgate.wire.catalog import DAY_NS, Catalog, Model, PriceRow, packaged

app = family("Prices of the Claude models.")

OWN_DAYS = 30
OWN_ROWS_MAX = 100_000
"""Of the own traffic, the latest: judging more would take longer and say the same."""
_KINDS = ("input", "cache_read", "cache_write_5m", "cache_write_1h", "output")

AsText = Annotated[str, typer.Option("--text", metavar="|".join(TEXTS), help="What prompts are mostly written in.")]


class Offer(msgspec.Struct, frozen=True):
    """Another model for what one was used for."""

    used: str
    requests: int
    recorded_nanousd: int
    model: str
    why: str
    """`newer`, `cheaper` or both."""
    projected_nanousd: int
    breaks: tuple[str, ...]


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate prices …`."""
    app(list(arguments), prog_name=f"headgate {name}")


@app.callback(invoke_without_command=True, no_args_is_help=False)
def prices(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(metavar="M", help="Only this model.")] = None,
    history: Annotated[bool, typer.Option("--history", help="Every price there was, with its dates.")] = False,
    text: AsText = "english",
    as_json: AsJson = False,
) -> None:
    """Prices per million tokens, and what newer and cheaper models would have cost for your last 30 days."""
    if context.invoked_subcommand is not None:
        return
    catalog, now_ns = packaged(), time.time_ns()
    of_text = text_of(text)
    asked = None if model is None else known_model(catalog, model)
    today = date(1970, 1, 1) + timedelta(days=now_ns // DAY_NS)
    rows = [
        (one, row)
        for one in catalog.models
        if (asked is None and one.status != "retired") or one is asked or (asked is None and history)
        for row in one.prices
        if history or (row.effective_from <= today and (row.effective_to is None or today < row.effective_to))
    ]
    offers, judged = _offers(catalog, asked, of_text, now_ns=now_ns)
    if as_json:
        output.print_json(
            {
                "as_of": catalog.as_of.isoformat(),
                "prices": [_price_json(catalog, one, row) for one, row in rows],
                "for_what_you_run": {
                    "days": OWN_DAYS,
                    "requests_judged": judged,
                    "text": of_text,
                    "offers": [_offer_json(offer) for offer in offers],
                },
            }
        )
        return
    batch = Fraction(catalog.factors[False][True], catalog.factor_scale)
    dates = ("from", "until", "source") if history else ()
    print(f"USD per million tokens, as of {catalog.as_of}; a batch costs {float(batch):g} of each.\n")
    output.print_table(
        ("model", "", "input>", "cache read>", "write 5m>", "write 1h>", "output>", "batch in>", "out>", *dates),
        [_price_cells(catalog, one, row, batch, history=history) for one, row in rows],
    )
    _print_offers(offers, judged, of_text)


@app.command()
def apply(
    since: Annotated[
        str, typer.Option(metavar="30d", help="Calls since then: a span back from now, a date, or a time.")
    ] = "1970-01-01",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    reconciled: Annotated[
        bool, typer.Option("--all", help="Also what a reconciliation corrected to Anthropic's own figure.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Price the ledger's calls again with this release's prices, and note it in the audit."""
    now_ns = time.time_ns()
    since_ns = inputs.moment_ns(since, now_ns=now_ns)
    with stores.database() as engine:
        done = reprice(
            engine, packaged(), since_ns=since_ns, until_ns=now_ns, dry_run=dry_run, reconciled_too=reconciled
        )
    if as_json:
        output.print_json(_repriced_json(done, dry_run=dry_run))
        return
    verb = "would change" if dry_run else "changed"
    print(f"{done.attempts_changed:,} of {done.attempts_seen:,} attempts {verb}, in {done.calls_changed:,} calls")
    print(f"cost   {output.usd(done.cost_before_nanousd)} before, {output.usd(done.cost_after_nanousd)} after")
    print(f"saved  {output.usd(done.saved_before_nanousd)} before, {output.usd(done.saved_after_nanousd)} after")
    if done.kept_reconciled:
        print(f"{done.kept_reconciled:,} attempts keep what a reconciliation corrected them to; --all prices them too")


def known_model(catalog: Catalog, name: str) -> Model:
    """The model of an id or alias. Raises CommandError that names those there are."""
    found = catalog.resolve(name)
    if found is None:
        names = ", ".join(one.id for one in catalog.models if one.status == "active")
        raise CommandError(Exit.NOT_FOUND, f"no model is called {name!r}. There are {names}.")
    return found


def text_of(name: str) -> Text:
    """The kind of text of that name. Raises typer.BadParameter."""
    for text in TEXTS:
        if text == name:
            return text
    raise typer.BadParameter(f"{name!r} is no kind of text; there are {', '.join(TEXTS)}")


def _offers(catalog: Catalog, asked: Model | None, text: Text, *, now_ns: int) -> tuple[list[Offer], int]:
    """For each model that was used, what others would have cost; and how many rows that is judged by."""
    with stores.database() as engine, engine.connect() as connection:
        since_ns = _since_ns(connection, now_ns)
        replays: defaultdict[str, list[tuple[str, str, Replay]]] = defaultdict(list)
        judged = 0
        for row in replay_rows(connection, since_ns=since_ns - WARM_UP_NS, until_ns=now_ns):
            used = catalog.resolve(row.model)
            if used is None or row.reused or (asked is not None and used is not asked):
                continue
            judged += row.at_ns >= since_ns
            if used.id not in replays:
                replays[used.id] = [
                    (
                        other.id,
                        why,
                        Replay(Policy(model=other.id, text=text), catalog, since_ns=since_ns, now_ns=now_ns),
                    )
                    for other, why in _others(catalog, used, now_ns)
                ]
            _feed(replays[used.id], row)
    found = [
        _offer(used, name, why, replay.projection()) for used, others in replays.items() for name, why, replay in others
    ]
    found = [offer for offer in found if offer.requests]
    found.sort(key=lambda offer: (-offer.recorded_nanousd, offer.used, offer.projected_nanousd))
    return found, judged


def _feed(replays: Sequence[tuple[str, str, Replay]], row: ReplayRow) -> None:
    for _, _, replay in replays:
        replay.add(row)


def _since_ns(connection: sa.Connection, now_ns: int) -> int:
    """30 days back, or as far as the latest rows reach that are judged."""
    latest = sa.select(calls.c.at_ns).order_by(calls.c.at_ns.desc()).offset(OWN_ROWS_MAX).limit(1)
    beyond: int | None = connection.execute(latest).scalar()
    return max(now_ns - OWN_DAYS * DAY_NS, (beyond or 0) + 1)


def _others(catalog: Catalog, used: Model, now_ns: int) -> list[tuple[Model, str]]:
    """The newest of its line, the cheapest of its line, and the cheapest of all."""
    sold = [one for one in catalog.models if one.status == "active" and one.line != "mythos"]
    own_line = [one for one in sold if one.line == used.line]

    def price_of(model: Model) -> int:
        row = catalog.price_row(model.id, now_ns)
        return 3 * row.input_nanousd + row.output_nanousd

    found: dict[str, tuple[Model, str]] = {}
    newest = max(own_line, key=lambda one: one.released, default=used)
    for model in (newest, min(own_line, key=price_of, default=used), min(sold, key=price_of, default=used)):
        words = [
            word
            for word, holds in (
                ("newer", model.released > used.released),
                ("cheaper", price_of(model) < price_of(used)),
            )
            if holds
        ]
        if model is not used and words:
            found[model.id] = (model, ", ".join(words))
    return list(found.values())


def _offer(used: str, name: str, why: str, projection: Projection) -> Offer:
    return Offer(
        used=used,
        requests=projection.requests,
        recorded_nanousd=projection.recorded.cost_nanousd,
        model=name,
        why=why,
        projected_nanousd=projection.projected.cost_nanousd,
        breaks=tuple(one.message for one in projection.breaks),
    )


def _print_offers(offers: Sequence[Offer], judged: int, text: Text) -> None:
    if not offers:
        print(f"\nFor what you run: nothing was called in the last {OWN_DAYS} days that has a newer or cheaper model.")
        return
    print(
        f"\nFor what you run, by your last {judged:,} requests ({OWN_DAYS} days at most), the other tokenizer counted "
        f"in as for {text} text:\n"
    )
    output.print_table(
        ("you run", "requests>", "cost>", "instead", "is", "would cost>", "saves>"),
        [
            (
                offer.used,
                f"{offer.requests:,}",
                output.usd(offer.recorded_nanousd),
                offer.model,
                offer.why,
                output.usd(offer.projected_nanousd),
                output.usd(offer.recorded_nanousd - offer.projected_nanousd),
            )
            for offer in offers
        ],
    )
    for message in dict.fromkeys(message for offer in offers for message in offer.breaks):
        print(f"- {message}")


def _price_cells(catalog: Catalog, model: Model, row: PriceRow, batch: Fraction, *, history: bool) -> tuple[str, ...]:
    notes: list[str] = [model.status] if model.status != "active" else []
    notes += [row.speed] if row.speed != "standard" else []
    notes += [f"> {row.prompt_over:,}"] if row.prompt_over else []
    halves = () if row.speed != "standard" else tuple(_dollars(Fraction(x) * batch) for x in (row.input, row.output))
    prices_of = tuple(_dollars(Fraction(getattr(row, kind))) for kind in _KINDS)
    dates = (str(row.effective_from), str(row.effective_to or ""), catalog.sources[row.source].title)
    return (model.id, ", ".join(notes), *prices_of, *(halves or ("–", "–")), *(dates if history else ()))


def _dollars(price: Fraction) -> str:
    """`10.00`, `0.125`: cents, and what is below them where there is something."""
    cents, digits = f"{float(price):.2f}", f"{float(price):g}"
    return cents if Fraction(cents) == price else digits


def _price_json(catalog: Catalog, model: Model, row: PriceRow) -> dict[str, object]:
    source = catalog.sources[row.source]
    batch = Fraction(catalog.factors[False][True], catalog.factor_scale)
    kinds = {f"{kind}_usd_per_mtok": float(getattr(row, kind)) for kind in _KINDS}
    return {
        "model": model.id,
        "status": model.status,
        "speed": row.speed,
        "prompt_over": row.prompt_over,
        **kinds,
        "batch_factor": float(batch) if row.speed == "standard" else None,
        "effective_from": row.effective_from.isoformat(),
        "effective_to": None if row.effective_to is None else row.effective_to.isoformat(),
        "source": {
            "title": source.title,
            "url": source.url,
            "as_of": source.as_of.isoformat(),
            "verified": source.verified,
        },
    }


def _offer_json(offer: Offer) -> dict[str, object]:
    found: dict[str, object] = msgspec.to_builtins(offer)
    return {**found, "saved_nanousd": offer.recorded_nanousd - offer.projected_nanousd}


def _repriced_json(done: Repriced, *, dry_run: bool) -> dict[str, object]:
    found: dict[str, object] = msgspec.to_builtins(done)
    since, until = (
        datetime.fromtimestamp(at_ns / 1e9, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        for at_ns in (done.since_ns, done.until_ns)
    )
    del found["since_ns"], found["until_ns"]
    return {"dry_run": dry_run, "since": since, "until": until, **found}
