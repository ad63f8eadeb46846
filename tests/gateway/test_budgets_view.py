"""`/admin/budgets`, asked as an application with a real table of keys and calls, and a real count."""

import asyncio
import json

import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from headgate.gateway.budgets import BudgetRules, Caps, TierCaps, accounts_of
from headgate.gateway.budgets_view import KEYS_MAX, PEOPLE_MAX, budgets_router
from headgate.policy.budgets import Budgets, MoneyAsk, Spent
from headgate.policy.records import Principal
from headgate.storage import tables
from headgate.storage.database import open_database
from headgate.storage.keys import KeyStore
from headgate.storage.money import LocalMoney

USD = 10**9
NOW_NS = 1_785_000_000 * USD  # 2026-07-25 17:20 UTC
RULES = BudgetRules(
    everybody=Caps(day_nanousd=50 * USD),
    tiers={"free": TierCaps(), "paid": TierCaps(person=Caps(2 * USD, 20 * USD), total=Caps(30 * USD))},
    alert_day_nanousd=20 * USD,
)


class Console:
    """The routes over a database of its own."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.rules = RULES
        self.store = KeyStore(engine, now_ns=lambda: NOW_NS)
        self.money = LocalMoney(Budgets(), clock=lambda: 0.0, now_ns=lambda: NOW_NS, read=self.read)
        self.app = FastAPI()
        self.app.include_router(
            budgets_router(
                engine, self.money, lambda: self.rules, reader=lambda: Principal("k", "boss"), now_ns=lambda: NOW_NS
            )
        )

    async def read(self, _ids: object, at_ns: int) -> Spent:
        return Spent(at_ns, {})

    def called(self, *, key_id: str, user: str, tier: str, nanousd: int, at_ns: int = NOW_NS) -> None:
        """A call in the ledger."""
        row = {"call_id": f"call_{self.count()}", "key_id": key_id, "user_id": user, "tier": tier, "at_ns": at_ns}
        defaults = {
            column.name: 0 if isinstance(column.type, sa.Integer) else ""
            for column in tables.calls.columns
            if not column.nullable and column.server_default is None and column.name not in row
        }
        with self.engine.begin() as connection:
            connection.execute(
                tables.calls.insert(), [{**defaults, **row, "cost_nanousd": nanousd, "state": "settled"}]
            )

    def count(self) -> int:
        with self.engine.connect() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(tables.calls)).scalar_one()

    def ask(self, query: str = "") -> dict:
        """The page."""
        parts: list[dict] = []
        scope = {
            "type": "http", "method": "GET", "path": "/admin/budgets", "raw_path": b"/admin/budgets",
            "query_string": query.encode(), "headers": [],
        }  # fmt: skip

        async def receive() -> dict:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict) -> None:
            parts.append(message)

        asyncio.run(self.app(scope, receive, send))
        assert parts[0]["status"] == 200
        return json.loads(b"".join(part.get("body", b"") for part in parts[1:]))

    def lines(self, query: str = "") -> dict[tuple[str, str], dict]:
        """By account and window."""
        return {(one["account"], one["window"]): one for one in self.ask(query)["budgets"]}


@pytest.fixture
def console(tmp_path):
    engine = open_database(tmp_path, now_ns=lambda: NOW_NS)
    yield Console(engine)
    engine.dispose()


def test_everybody_and_tiers_are_shown_before_anybody_came(console):
    lines = console.lines()
    assert lines.keys() == {("all", "day"), ("tier:free", "day"), ("tier:paid", "day")}
    assert lines["tier:free", "day"]["cap_nanousd"] == 40 * USD, "four fifths of everybody's"
    assert lines["all", "day"] == {
        "account": "all", "window": "day", "cap_nanousd": 50 * USD, "spent_nanousd": 0, "reserved_nanousd": 0,
        "left_nanousd": 50 * USD, "resets_at": "2026-07-26T00:00:00Z",
    }  # fmt: skip


def test_what_a_call_holds_and_what_it_cost_stand_against_each_of_its_accounts(console):
    issued = console.store.create(name="an", tier="paid", budget_month_nanousd=5 * USD)
    key = Principal(issued.record.id, "an", "paid", budget_month_nanousd=5 * USD)
    accounts = accounts_of(key, "an", "paid", RULES)
    console.money.reserve(MoneyAsk("call_1:1", accounts, USD, NOW_NS), lambda verdict: None)
    console.money.reserve(MoneyAsk("call_2:1", accounts, USD // 2, NOW_NS), lambda verdict: None)
    console.money.settle("call_2:1", USD // 4)
    console.called(key_id=issued.record.id, user="an", tier="paid", nanousd=USD // 4)
    lines = console.lines()
    of_key, of_person = lines[f"key:{issued.record.id}", "month"], lines["user:an", "day"]
    assert (of_key["spent_nanousd"], of_key["reserved_nanousd"]) == (USD // 4, USD)
    assert (of_key["left_nanousd"], of_key["resets_at"]) == (5 * USD - USD - USD // 4, "2026-08-01T00:00:00Z")
    assert (of_person["cap_nanousd"], of_person["left_nanousd"]) == (2 * USD, 2 * USD - USD - USD // 4)
    assert (f"key:{issued.record.id}", "day") not in lines, "it has no cap for a day"
    assert lines["tier:paid", "day"]["reserved_nanousd"] == USD


def test_without_a_cap_everybody_is_counted_for_the_alert_line(console):
    console.rules = BudgetRules(alert_day_nanousd=20 * USD)
    page = console.ask()
    (line,) = page["budgets"]
    assert (line["cap_nanousd"], line["left_nanousd"], page["alert_day_nanousd"]) == (None, None, 20 * USD)


def test_a_person_can_be_asked_for_by_name(console):
    console.rules = BudgetRules(tiers={"free": TierCaps(person=Caps(USD))})
    assert console.lines().keys() == set()
    assert console.lines("user=b%C3%ACnh")["user:bình", "day"]["left_nanousd"] == USD


def test_the_page_is_bounded_and_shows_who_spent_most(console):
    console.rules = BudgetRules(tiers={"free": TierCaps(person=Caps(USD))})
    ids = [console.store.create(name=f"k{at}", budget_day_nanousd=USD).record.id for at in range(KEYS_MAX + 3)]
    for at in range(PEOPLE_MAX + 3):
        console.called(key_id=ids[0], user=f"p{at}", tier="free", nanousd=at)
    console.called(key_id=ids[1], user="yesterday", tier="free", nanousd=USD, at_ns=NOW_NS - 86_400 * USD)
    accounts = [account for account, _ in console.lines()]
    people = [account for account in accounts if account.startswith("user:")]
    keys = [account for account in accounts if account.startswith("key:")]
    assert people == [f"user:p{at}" for at in range(PEOPLE_MAX + 2, 2, -1)]
    assert keys[0] == f"key:{ids[0]}"
    assert len(keys) == KEYS_MAX
