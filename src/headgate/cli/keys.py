"""`headgate keys create | list | revoke | rotate`: virtual keys. The secret is printed once and kept nowhere."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from headgate.cli import inputs, output, stores
from headgate.cli.errors import CommandError, Exit
from headgate.cli.family import AsJson, family
from headgate.storage.keys import InvalidKeySpec, IssuedKey, KeyNotFound, KeyRecord, KeyStore

app = family("Virtual keys.")

KeyId = Annotated[str, typer.Argument(metavar="ID", help="The eight characters after hg_.")]


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate keys …`."""
    app(list(arguments), prog_name=f"headgate {name}")


@app.command()
def create(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    owner: Annotated[str, typer.Option(help="Who its usage is counted for; the name, when left out.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="messages (default), app, batch, admin:read or admin:write; repeatable."),
    ] = None,
    tier: Annotated[
        str, typer.Option(help="Whose limits hold: free, paid or another of the settings' tiers.")
    ] = "free",
    rpm: Annotated[
        int | None, typer.Option(metavar="N", help="Requests a minute through this key, beside its owner's limits.")
    ] = None,
    otpm: Annotated[int | None, typer.Option(metavar="N", help="Output tokens a minute through this key.")] = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", help="Calls at once through this key.")] = None,
    budget_usd_day: Annotated[
        str | None, typer.Option(metavar="USD", help="Spend at most this in a UTC day through this key.")
    ] = None,
    budget_usd_month: Annotated[
        str | None, typer.Option(metavar="USD", help="Spend at most this in a month through this key.")
    ] = None,
    models: Annotated[str, typer.Option(metavar="A,B", help="Only these models; all, when left out.")] = "",
    expires: Annotated[
        str | None, typer.Option(metavar="30d", help="Valid for this long; for good, if left out.")
    ] = None,
    plan_cache: Annotated[
        bool, typer.Option(help="Mark its prompts for the cache where its callers set no mark.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it: this once, it is stored as a hash."""
    now_ns = time.time_ns()
    with _keys() as store:
        issued = store.create(
            name=name,
            owner=owner,
            scopes=tuple(scope or ["messages"]),
            tier=tier,
            rpm=rpm,
            otpm=otpm,
            concurrency=concurrency,
            budget_day_nanousd=None if budget_usd_day is None else inputs.nanousd(budget_usd_day),
            budget_month_nanousd=None if budget_usd_month is None else inputs.nanousd(budget_usd_month),
            models=tuple(model.strip() for model in models.split(",")) if models else (),
            expires_at_ns=None if expires is None else now_ns + inputs.span_ns(expires),
            plan_cache=plan_cache,
        )
    _print_issued(issued, as_json=as_json)


@app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List all keys, revoked ones too."""
    with _keys() as store:
        records = store.list()
    if as_json:
        output.print_json({"keys": [_as_json(record) for record in records]})
        return
    if not records:
        print("No keys yet. Make one: headgate keys create --name my-app")
        return
    output.print_table(
        ("id", "name", "owner", "scopes", "tier", "limits", "state", "last used"),
        [
            (
                record.id,
                record.name,
                record.owner,
                " ".join(record.scopes),
                record.tier,
                _limits(record),
                _state(record, now_ns=time.time_ns()),
                "never" if record.last_used_at_ns is None else output.timestamp(record.last_used_at_ns),
            )
            for record in records
        ],
    )


@app.command()
def revoke(key_id: KeyId, as_json: AsJson = False) -> None:
    """Close a key for good; running gateways stop taking it within a second."""
    with _keys() as store:
        record = store.revoke(key_id)
    if as_json:
        output.print_json(_as_json(record))
    else:
        print(f"Revoked {record.id} ({record.name}).")


@app.command()
def rotate(
    key_id: KeyId,
    overlap: Annotated[
        str, typer.Option(metavar="24h", help="How long the old secret still works; 7d at most.")
    ] = "24h",
    as_json: AsJson = False,
) -> None:
    """Give a key a new secret and print it; id, limits and history stay."""
    with _keys() as store:
        issued = store.rotate(key_id, overlap_s=inputs.span_ns(overlap) / 1e9)
    _print_issued(issued, as_json=as_json)


@contextmanager
def _keys() -> Iterator[KeyStore]:
    """The key store, whose refusals are the user's to mend."""
    with stores.database() as engine:
        try:
            yield KeyStore(engine, now_ns=time.time_ns)
        except InvalidKeySpec as error:
            raise CommandError(Exit.USAGE, f"{error}.") from None
        except KeyNotFound as error:
            raise CommandError(
                Exit.NOT_FOUND, f"no key has the id {error}. `headgate keys list` shows all of them."
            ) from None


def _print_issued(issued: IssuedKey, *, as_json: bool) -> None:
    record = issued.record
    if as_json:
        output.print_json({"key": issued.key, **_as_json(record)})
        return
    print(issued.key)
    print(f"\nThis is the only time it is shown. Key {record.id} of {record.owner}, scopes {' '.join(record.scopes)}.")
    if record.previous_expires_at_ns is not None:
        print(f"The old secret works until {output.timestamp(record.previous_expires_at_ns)}.")


def _as_json(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "owner": record.owner,
        "scopes": list(record.scopes),
        "tier": record.tier,
        "rpm": record.rpm,
        "otpm": record.otpm,
        "concurrency": record.concurrency,
        "budget_day_nanousd": record.budget_day_nanousd,
        "budget_month_nanousd": record.budget_month_nanousd,
        "models": list(record.models),
        "plan_cache": record.plan_cache,
        "created_at": _time(record.created_at_ns),
        "expires_at": _time(record.expires_at_ns),
        "revoked_at": _time(record.revoked_at_ns),
        "last_used_at": _time(record.last_used_at_ns),
        "previous_expires_at": _time(record.previous_expires_at_ns),
    }


def _time(at_ns: int | None) -> str | None:
    return None if at_ns is None else output.timestamp(at_ns)


def _limits(record: KeyRecord) -> str:
    limits = []
    if record.rpm is not None:
        limits.append(f"{record.rpm} RPM")
    if record.otpm is not None:
        limits.append(f"{record.otpm} OTPM")
    if record.concurrency is not None:
        limits.append(f"{record.concurrency} at once")
    if record.budget_day_nanousd is not None:
        limits.append(f"{output.usd(record.budget_day_nanousd)}/day")
    if record.budget_month_nanousd is not None:
        limits.append(f"{output.usd(record.budget_month_nanousd)}/month")
    return ", ".join(limits) or "–"


def _state(record: KeyRecord, *, now_ns: int) -> str:
    if record.revoked_at_ns is not None:
        return "revoked"
    if record.expires_at_ns is None:
        return "open"
    verb = "expired" if record.expires_at_ns <= now_ns else "open until"
    return f"{verb} {output.timestamp(record.expires_at_ns)}"
