"""What the prompt cache does for each family of prompts: `headgate cache report` and `/admin/cache`.

What it is: the writer's upsert of what the linter summed (`save`), the queries of the report, and its exact form.
What it is not: the linter (`policy/cache_lint.py`). All of it blocks: never call it on the loop.

The same SQL runs on SQLite and PostgreSQL. Findings are kept by whole UTC days: a report has those of every
day that its span touches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from headgate.policy.cache_lint import DIAGNOSIS, CacheDeltas
from headgate.storage.tables import cache_families, cache_findings, calls
from headgate.wire import catalog
from headgate.wire.catalog import Catalog

DAY_NS = 86_400 * 10**9
FAMILIES_MAX = 500
"""In one report; those that lose and spend most come first."""
_TOKENS = ("input_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens")
_SUMS = (*_TOKENS, "cost_nanousd", "saved_nanousd")
_PLACE = ("part", "byte", "value_at", "before", "after", "message")


class FindingRow(msgspec.Struct, frozen=True):
    """One cause in one family, over the days of the span; the place is that of the latest."""

    cause: str
    count: int
    lost_nanousd: int
    first_at_ns: int
    last_at_ns: int
    part: str = ""
    byte: int = 0
    value_at: int = 0
    before: str = ""
    after: str = ""
    message: str = ""


class DiagnosisRow(msgspec.Struct, frozen=True):
    """What Anthropic named for a family: how often, and how many tokens the latest missed."""

    type: str
    count: int
    missed_tokens: int | None


class FamilyRow(msgspec.Struct, frozen=True):
    """One family of prompts. Of a span without calls there may still be findings."""

    family: str
    key_id: str = ""
    endpoint: str = ""
    model: str = ""
    requests: int = 0
    requests_that_read: int = 0
    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    cost_nanousd: int = 0
    saved_nanousd: int = 0
    unread_write_nanousd: int = 0
    """What writing cost above the plain price for tokens that nobody can have read: at least this, for more was
    written than read. 0 when as much was read as written."""
    lost_nanousd: int = 0
    """By the findings: what was paid again that could have been read."""
    ttl: str = ""
    ttl_reason: str = ""
    findings: tuple[FindingRow, ...] = ()
    anthropic: tuple[DiagnosisRow, ...] = ()

    @property
    def hit_rate(self) -> float | None:
        """Part of the prompt tokens that was read, 0 to 1; None when there were none."""
        prompt_tokens = sum(getattr(self, name) for name in _TOKENS)
        return self.cache_read_tokens / prompt_tokens if prompt_tokens else None

    @property
    def read_share(self) -> float | None:
        """Part of the calls that read anything; None when there were none."""
        return self.requests_that_read / self.requests if self.requests else None


class CacheReport(msgspec.Struct, frozen=True):
    """All families that had calls or findings: what loses most comes first, then what spends most."""

    families: tuple[FamilyRow, ...]
    total: FamilyRow
    """Sums over all families, also over those that are left out; no findings of its own."""
    left_out: int = 0


def save(connection: sa.Connection, deltas: CacheDeltas) -> None:
    """Add what the linter summed, in the caller's transaction. Saving the same deltas twice counts them twice."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    if deltas.findings:
        adding = insert(cache_findings)
        new = adding.excluded
        old = cache_findings.c
        connection.execute(
            adding.on_conflict_do_update(
                index_elements=[old.family, old.cause, old.day],
                set_={
                    "count": old.count + new.count,
                    "lost_nanousd": old.lost_nanousd + new.lost_nanousd,
                    # Several processes save, in whatever order.
                    "first_at_ns": sa.case((new.first_at_ns < old.first_at_ns, new.first_at_ns), else_=old.first_at_ns),
                    "detail": sa.case((new.last_at_ns >= old.last_at_ns, new.detail), else_=old.detail),
                    "last_at_ns": sa.case((new.last_at_ns >= old.last_at_ns, new.last_at_ns), else_=old.last_at_ns),
                },
            ),
            [msgspec.structs.asdict(row) for row in deltas.findings],
        )
    if deltas.families:
        telling = insert(cache_families)
        rest = ("key_id", "endpoint", "model", "detail", "updated_at_ns")
        connection.execute(
            telling.on_conflict_do_update(
                index_elements=[cache_families.c.family],
                set_={name: telling.excluded[name] for name in rest},
                where=telling.excluded.updated_at_ns >= cache_families.c.updated_at_ns,
            ),
            [msgspec.structs.asdict(row) for row in deltas.families],
        )


def cache_report(
    connection: sa.Connection,
    since_ns: int,
    until_ns: int,
    *,
    prices: Catalog | None = None,
    families_max: int = FAMILIES_MAX,
) -> CacheReport:
    """Families that called in [since_ns, until_ns), or that have findings of its days. `prices`: the packaged ones."""
    rows = _used(connection, since_ns, until_ns, prices or catalog.packaged())
    findings, diagnoses = _found(connection, since_ns, until_ns)
    for family in (*findings, *diagnoses):
        rows.setdefault(family, FamilyRow(family))
    known = _known(connection, list(rows)) if rows else {}
    whole: list[FamilyRow] = []
    for family, row in rows.items():
        of_family = tuple(sorted(findings[family], key=lambda one: (-one.lost_nanousd, -one.count, one.cause)))
        whole.append(
            msgspec.structs.replace(
                row,
                **known.get(family, {}),
                findings=of_family,
                anthropic=tuple(sorted(diagnoses[family], key=lambda one: (-one.count, one.type))),
                lost_nanousd=sum(one.lost_nanousd for one in of_family),
            )
        )
    whole.sort(key=lambda row: (-row.lost_nanousd, -row.cost_nanousd, row.family))
    summed = ("requests", "requests_that_read", *_SUMS, "unread_write_nanousd", "lost_nanousd")
    total = FamilyRow("", **{name: sum(getattr(row, name) for row in whole) for name in summed})
    return CacheReport(tuple(whole[:families_max]), total, max(len(whole) - families_max, 0))


def used_statement(since_ns: int, until_ns: int) -> sa.Select[Any]:
    """Family, key, endpoint, model and day, then the counts: for the report, and for the test that explains it."""
    # Literals: PostgreSQL takes an expression with a parameter for another one where it stands again, in GROUP BY.
    day: sa.ColumnElement[int] = sa.literal_column(f"calls.at_ns / {DAY_NS}").label("day")
    groups = (calls.c.family, calls.c.key_id, calls.c.endpoint, calls.c.model, day)
    counts = (
        sa.func.count(),
        sa.func.count().filter(calls.c.cache_read_tokens > sa.literal_column("0")),
        *(sa.func.sum(calls.c[name]) for name in _SUMS),
    )
    within = (calls.c.at_ns >= since_ns, calls.c.at_ns < until_ns, calls.c.family != sa.literal_column("''"))
    return sa.select(*groups, *counts).where(*within).group_by(*groups)


def cache_json(report: CacheReport) -> dict[str, object]:
    """The report as `headgate cache report --json` and `/admin/cache` give it."""
    total = _family_json(report.total)
    for name in ("family", "key_id", "endpoint", "model", "ttl", "ttl_reason", "findings", "anthropic"):
        del total[name]
    return {
        "families": [_family_json(row) for row in report.families],
        "total": total,
        "left_out": report.left_out,
    }


def _used(connection: sa.Connection, since_ns: int, until_ns: int, prices: Catalog) -> dict[str, FamilyRow]:
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (2 + len(_SUMS)))
    premium_nanousd: defaultdict[str, int] = defaultdict(int)
    of: dict[str, tuple[int, str, str, str]] = {}
    for family, key_id, endpoint, model, day, *counts in connection.execute(used_statement(since_ns, until_ns)):
        numbers = [int(count) for count in counts]  # PostgreSQL sums 64 bits into a decimal
        sums[family] = [a + b for a, b in zip(sums[family], numbers, strict=True)]
        requests, write_5m, write_1h = numbers[0], numbers[4], numbers[5]
        if write_5m or write_1h:
            row = prices.price_row(model, day * DAY_NS)
            premium_nanousd[family] += write_5m * (row.cache_write_5m_nanousd - row.input_nanousd)
            premium_nanousd[family] += write_1h * (row.cache_write_1h_nanousd - row.input_nanousd)
        # What most of its calls have names the family, where no row of `cache_families` does.
        of[family] = max(of.get(family, (0, "", "", "")), (requests, key_id, endpoint, model))
    rows = {}
    for family, (requests, that_read, *totals) in sums.items():
        by_name = dict(zip(_SUMS, totals, strict=True))
        written = by_name["cache_write_5m_tokens"] + by_name["cache_write_1h_tokens"]
        unread = max(written - by_name["cache_read_tokens"], 0)
        _, key_id, endpoint, model = of[family]
        by_name |= {
            "requests": requests,
            "requests_that_read": that_read,
            "unread_write_nanousd": premium_nanousd[family] * unread // written if written else 0,
        }
        rows[family] = msgspec.structs.replace(FamilyRow(family, key_id, endpoint, model), **by_name)
    return rows


def _found(
    connection: sa.Connection, since_ns: int, until_ns: int
) -> tuple[defaultdict[str, list[FindingRow]], defaultdict[str, list[DiagnosisRow]]]:
    days = (cache_findings.c.day >= since_ns // DAY_NS, cache_findings.c.day <= (until_ns - 1) // DAY_NS)
    statement = sa.select(cache_findings).where(*days).order_by(cache_findings.c.day)
    joined: dict[tuple[str, str], list[sa.RowMapping]] = {}
    for row in connection.execute(statement).mappings():
        joined.setdefault((row["family"], row["cause"]), []).append(row)
    findings: defaultdict[str, list[FindingRow]] = defaultdict(list)
    diagnoses: defaultdict[str, list[DiagnosisRow]] = defaultdict(list)
    for (family, cause), of_days in joined.items():
        detail = _detail(of_days[-1]["detail"])
        count = sum(row["count"] for row in of_days)
        if cause.startswith(DIAGNOSIS):
            missed = detail.get("missed_tokens")
            kind = cause.removeprefix(DIAGNOSIS)
            diagnoses[family].append(DiagnosisRow(kind, count, missed if isinstance(missed, int) else None))
            continue
        findings[family].append(
            FindingRow(
                cause,
                count,
                sum(row["lost_nanousd"] for row in of_days),
                min(row["first_at_ns"] for row in of_days),
                max(row["last_at_ns"] for row in of_days),
                **{name: detail[name] for name in _PLACE if name in detail},
            )
        )
    return findings, diagnoses


def _known(connection: sa.Connection, families: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What `cache_families` says of each, as fields of a FamilyRow."""
    found: dict[str, dict[str, Any]] = {}
    for row in connection.execute(sa.select(cache_families)).mappings():
        detail = _detail(row["detail"])
        named = {name: row[name] for name in ("key_id", "endpoint", "model") if row[name]}
        found[row["family"]] = named | {name: str(detail[name]) for name in ("ttl", "ttl_reason") if name in detail}
    wanted = set(families)
    return {family: fields for family, fields in found.items() if family in wanted}


def _detail(text: str) -> dict[str, Any]:  # Any: JSON
    try:
        detail = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {}
    return detail if isinstance(detail, dict) else {}


def _family_json(row: FamilyRow) -> dict[str, object]:
    fields = msgspec.structs.asdict(row)
    del fields["requests_that_read"]
    return fields | {
        "hit_rate": row.hit_rate,
        "read_share": row.read_share,
        "findings": [_finding_json(one) for one in row.findings],
        "anthropic": [msgspec.structs.asdict(one) for one in row.anthropic],
    }


def _finding_json(row: FindingRow) -> dict[str, object]:
    fields = msgspec.structs.asdict(row)
    first, last = fields.pop("first_at_ns"), fields.pop("last_at_ns")
    return fields | {"first_at": _rfc3339(first), "last_at": _rfc3339(last)}


def _rfc3339(at_ns: int) -> str:
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=at_ns // 10**6)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
