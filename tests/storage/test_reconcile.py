"""The ledger's sums and the correction of its estimates, in a real database."""

from collections.abc import Callable

import msgspec
import pytest
import sqlalchemy as sa

from headgate.policy.reconciliation import Line, ReportLine, Tokens, compare
from headgate.storage.audit import broken_at
from headgate.storage.reconcile import LedgerChanged, attempts_statement, ledger_lines, write
from headgate.storage.tables import attempts, audit, calls, reconciliations
from headgate.wire.catalog import DAY_NS, packaged
from headgate.wire.usage import Usage

CATALOG = packaged()
SONNET = "claude-sonnet-4-6"
DAY = 20_780
SPAN = {"first_day": DAY, "end_day": DAY + 1}
Add = Callable[..., None]


@pytest.fixture
def add(engine: sa.Engine) -> Add:
    """Puts one attempt into the ledger; a call's cost is that of its attempts."""

    def put(
        call: str,
        state: str,
        nanousd: int,
        *,
        number: int = 1,
        at_ns: int = DAY * DAY_NS + 1,
        call_at_ns: int | None = None,
        call_state: str = "",
        model: str = SONNET,
        usage: Usage = Usage(input_tokens=100, output_tokens=10),  # noqa: B008 (frozen)
        max_tokens: int = 1_000,
    ) -> None:
        with engine.begin() as connection:
            if connection.execute(sa.select(calls.c.call_id).where(calls.c.call_id == call)).first() is None:
                opened_ns = at_ns if call_at_ns is None else call_at_ns
                connection.execute(sa.insert(calls).values(call_id=call, at_ns=opened_ns, state=call_state or state))
            connection.execute(
                sa.update(calls).where(calls.c.call_id == call).values(cost_nanousd=calls.c.cost_nanousd + nanousd)
            )
            connection.execute(
                sa.insert(attempts).values(
                    call_id=call,
                    number=number,
                    model=model,
                    state=state,
                    at_ns=at_ns,
                    usage=msgspec.json.encode(usage).decode(),
                    input_tokens_estimate=100,
                    max_tokens=max_tokens,
                    cost_nanousd=nanousd,
                )
            )

    return put


def lines_of(engine: sa.Engine, reported: dict[str, int], **span: int) -> tuple[Line, ...]:
    report = [ReportLine(DAY, model, "", nanousd) for model, nanousd in reported.items()]
    with engine.connect() as connection:
        return compare(ledger_lines(connection, CATALOG, **(span or SPAN)), report, workspace="")


def costs(engine: sa.Engine) -> dict[str, tuple[int, int, int | None, str]]:
    """Of each call: its cost, that of its last attempt, what was estimated, the state."""
    with engine.connect() as connection:
        rows = connection.execute(
            sa.select(
                calls.c.call_id,
                calls.c.cost_nanousd,
                attempts.c.cost_nanousd,
                attempts.c.estimated_nanousd,
                attempts.c.state,
            )
            .join(attempts, attempts.c.call_id == calls.c.call_id)
            .order_by(calls.c.call_id, attempts.c.number)
        )
        return {row[0]: tuple(row[1:]) for row in rows}  # type: ignore[misc]


def count(engine: sa.Engine, table: sa.Table) -> int:
    with engine.connect() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def test_sums_are_by_the_day_of_the_attempt_and_the_models_id(engine: sa.Engine, add: Add) -> None:
    model = next(model for model in CATALOG.models if model.aliases)
    batch = Usage(output_tokens=3, web_search_requests=2, service_tier="batch")
    add("a", "settled", 7, model=model.aliases[0])
    add("b", "settled", 5, model=model.id, usage=batch)
    add("c", "settled", 11, at_ns=DAY * DAY_NS - 1)  # the day before
    add("d", "void", 0)
    add("e", "estimated", 2, call_state="open")  # the fold may write the call again
    add("f", "settled", 3, at_ns=0, call_at_ns=DAY * DAY_NS)  # its intent is lost
    add("g", "settled", 4, at_ns=DAY * DAY_NS, call_at_ns=DAY * DAY_NS - 1)  # a call over midnight
    add("h", "estimated", 9, max_tokens=0)
    with engine.connect() as connection:
        found = {line.model: line for line in ledger_lines(connection, CATALOG, **SPAN)}
    assert found.keys() == {model.id, SONNET}
    of_model, of_sonnet = found[model.id], found[SONNET]
    assert (of_model.settled_nanousd, of_model.batch_nanousd) == (12, 5)
    assert of_model.settled == Tokens(input_tokens=100, output_tokens=13, web_search_requests=2)
    assert of_sonnet.settled_nanousd == 7
    (estimate,) = of_sonnet.estimates
    assert (estimate.call_id, estimate.estimated_nanousd) == ("h", 9)
    # 100 tokens as writes of an hour at $6 and 10 of output at $15 a million, at the price of US inference
    assert estimate.upper_nanousd == (100 * 6_000 + 10 * 15_000) * 11 // 10


def test_estimates_take_the_difference_and_exact_rows_are_never_touched(engine: sa.Engine, add: Add) -> None:
    add("a", "settled", 1_000_000)
    add("b", "estimated", 100_000)
    add("c", "settled", 50_000)
    add("c", "estimated", 300_000, number=2)
    lines = lines_of(engine, {SONNET: 1_450_000 + 200_000})
    written = write(engine, lines, **SPAN, now_ns=5)
    assert (written.attempts, written.before_nanousd, written.after_nanousd) == (2, 400_000, 600_000)
    assert costs(engine) == {
        "a": (1_000_000, 1_000_000, None, "settled"),
        "b": (150_000, 150_000, 100_000, "estimated"),
        "c": (500_000, 450_000, 300_000, "estimated"),
    }
    with engine.connect() as connection:
        (kept,) = connection.execute(sa.select(reconciliations)).all()
        assert broken_at(connection) is None
        (row,) = connection.execute(sa.select(audit)).all()
    assert (kept.day, kept.model, kept.workspace) == (DAY, SONNET, "default")
    assert (kept.ledger_nanousd, kept.reported_nanousd, kept.corrected_nanousd) == (1_450_000, 1_650_000, 1_650_000)
    assert msgspec.json.decode(kept.detail)["cause"] == "2 estimated attempts that day"
    assert row.action == "reconcile"
    assert [msgspec.json.decode(side)["cost_nanousd"] for side in (row.before, row.after)] == [400_000, 600_000]


def test_the_same_report_changes_nothing_and_a_later_one_starts_from_the_estimate(engine: sa.Engine, add: Add) -> None:
    add("a", "estimated", 100_000)
    add("b", "estimated", 300_000)
    write(engine, lines_of(engine, {SONNET: 600_001}), **SPAN, now_ns=5)
    before = costs(engine)
    assert write(engine, lines_of(engine, {SONNET: 600_001}), **SPAN, now_ns=6).attempts == 0
    assert costs(engine) == before
    assert count(engine, audit) == 1
    with engine.connect() as connection:
        assert connection.execute(sa.select(reconciliations.c.at_ns)).scalars().all() == [5]
    write(engine, lines_of(engine, {SONNET: 200_000}), **SPAN, now_ns=7)
    assert {call: cost for call, (cost, *_) in costs(engine).items()} == {"a": 50_000, "b": 150_000}
    assert {call: first for call, (_, _, first, _) in costs(engine).items()} == {"a": 100_000, "b": 300_000}
    with engine.connect() as connection:
        (kept,) = connection.execute(sa.select(reconciliations)).all()
    assert (kept.ledger_nanousd, kept.corrected_nanousd, kept.at_ns) == (400_000, 200_000, 7)


def test_two_at_once_write_once_or_not_at_all(engine: sa.Engine, add: Add) -> None:
    add("a", "estimated", 100_000)
    add("b", "estimated", 100_000)
    first = lines_of(engine, {SONNET: 300_000})
    late = lines_of(engine, {SONNET: 250_000})
    write(engine, first, **SPAN, now_ns=5)
    before = costs(engine)
    with pytest.raises(LedgerChanged, match="2 of 2 attempts"):
        write(engine, late, **SPAN, now_ns=6)
    assert costs(engine) == before
    assert count(engine, audit) == 1


def test_an_empty_ledger_and_an_empty_report_write_nothing(engine: sa.Engine) -> None:
    assert write(engine, lines_of(engine, {}), **SPAN, now_ns=5).attempts == 0
    assert count(engine, reconciliations) == count(engine, audit) == 0


def test_the_days_are_found_by_the_index_of_times(engine: sa.Engine) -> None:
    statement = attempts_statement(**SPAN).compile(engine, compile_kwargs={"literal_binds": True})
    with engine.connect() as connection:
        plan = " ".join(row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}"))
    assert "calls_by_time" in plan
    assert "SEARCH attempts USING PRIMARY KEY" in plan
