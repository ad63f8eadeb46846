"""What keeps prompts from the cache, as an operator reads it: faults of the article sent through a real gateway, each
named by `/admin/cache` and `headgate cache report` with its byte, its cause and its cost, and nothing said of the rest.
"""

from __future__ import annotations

import base64
import json
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.system.conftest import Gateway, Simulator, until
from tests.system.raw_http import ask, request, send

SONNET = "claude-sonnet-4-6"
CANARY = "kanarienvogel"
"""Stands in every prompt, next to what varies. It may be found nowhere but in the simulator."""
_WORDS = ("customer", "goods", "thirty", "days", "purchase", "seal", "label", "clean", "staff", "item", "order", "card")
FAULTS = (
    "timestamp",
    "user",
    "tool order",
    "second block",
    "key order",
    "white space",
    "uuid",
    "counter",
    "vietnamese",
)
ROUNDS = 3
CLEAN = 50
USERS = 200
TURNS = 3


def prose(sentences: int, seed: int = 1) -> str:
    """Text of some 65 characters a sentence, the same for the same seed."""
    dice = random.Random(seed)
    return " ".join(" ".join(dice.choice(_WORDS) for _ in range(11)).capitalize() + "." for _ in range(sentences))


KNOWLEDGE = f"{CANARY} {prose(90)}"
TOOLS = [
    {
        "name": f"tool_{number}",
        "description": f"{CANARY} {prose(12, number)}",
        "input_schema": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}},
    }
    for number in range(8)
]


def body(system: Any, question: Any, *, tools: Any = None, **more: Any) -> bytes:
    """A request as an SDK writes it."""
    asked = question if isinstance(question, list) else [{"role": "user", "content": f"[[sim: tokens=5]] {question}"}]
    fields = {"model": SONNET, "max_tokens": 50, "system": system, "messages": asked} | more
    return json.dumps(fields | ({} if tools is None else {"tools": tools}), ensure_ascii=False).encode()


def faulty(fault: str, number: int) -> tuple[bytes, str]:
    """The n-th request with this fault, 0 for the one that the others should be like; and its user."""
    question = f"{CANARY} {number}"
    dice = random.Random(number)
    match fault:
        case "timestamp":
            at = datetime(2026, 11, 24, 9, 30, 5, tzinfo=UTC) + timedelta(seconds=number)
            return body(f"{CANARY} now: {at:%Y-%m-%dT%H:%M:%SZ} {KNOWLEDGE}", question), ""
        case "user":
            return body(f"You speak with khach-{number:03}. {KNOWLEDGE}", question), f"khach-{number:03}"
        case "tool order":
            return body(KNOWLEDGE, question, tools=[*TOOLS[number:], *TOOLS[:number]]), ""
        case "second block":
            blocks = [KNOWLEDGE, f"{CANARY} {prose(20, 50 + number)}", prose(40, 7)]
            return body([{"type": "text", "text": text} for text in blocks], question), ""
        case "key order":
            tools = json.loads(json.dumps(TOOLS))
            if number % 2:
                tools[2]["input_schema"] = dict(reversed(tools[2]["input_schema"].items()))
            return body(KNOWLEDGE, question, tools=tools), ""
        case "white space":
            return body(f"{KNOWLEDGE}{' ' * (1 + number % 2)}{prose(30, 8)}", question), ""
        case "uuid":
            drawn = f"{dice.getrandbits(128):032x}"
            return body(
                f"Session {drawn[:8]}-{drawn[8:12]}-{drawn[12:16]}-{drawn[16:20]}-{drawn[20:]} {KNOWLEDGE}", question
            ), ""
        case "counter":
            return body(f"{CANARY} request number {101 + number}. {KNOWLEDGE}", question), ""
        case _:
            return body(f"Bây giờ là 09:{10 + number}, {CANARY}. {KNOWLEDGE}", question), ""


def first_difference(part: str, one: bytes, other: bytes) -> int:
    """By looking at every byte: where two fields part, offset in the second's raw JSON."""
    raws = [json.dumps(json.loads(each)[part], ensure_ascii=False).encode() for each in (one, other)]
    return next(at for at, (a, b) in enumerate(zip(*raws, strict=False)) if a != b)


ASKED = [fault for fault in FAULTS if fault != "second block"]
"""Named by the second request, so that Anthropic is asked about the third. Two that differ in a block may be two
templates."""
CAUSES = {
    "timestamp": ("timestamp", "system"),
    "user": ("user_id", "system"),
    "tool order": ("tool_order", "tools"),
    "second block": ("text_changed", "system"),
    "key order": ("key_order", "tools"),
    "white space": ("whitespace", "system"),
    "uuid": ("uuid", "system"),
    "counter": ("counter", "system"),
    "vietnamese": ("timestamp", "system"),
}


@dataclass
class Day:
    """Everything that was sent, and where it can be read of."""

    simulator: Simulator
    gateway: Gateway
    app: str
    reader: str
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def call(self, label: str, *bodies: bytes, users: tuple[str, ...] = (), connections: int = 1) -> None:
        """Send these, over each connection one after another."""
        requests = []
        for at, each in enumerate(bodies):
            headers = {"x-api-key": self.app, "anthropic-version": "2023-06-01", "x-headgate-endpoint": label}
            headers |= {"x-headgate-user": users[at]} if users and users[at] else {}
            requests.append(request("POST", "/v1/messages", headers.items(), each))
        for response in send(self.gateway.url, *requests, connections=connections):
            assert response.status == 200, response.body
            self.answers.setdefault(label, []).append(response.json())

    def admin(self) -> dict[str, Any]:
        """`/admin/cache`."""
        answer = ask(self.gateway.operator_url, "GET", "/admin/cache", {"x-api-key": self.reader})
        assert answer.status == 200, answer.body
        return answer.json()  # type: ignore[no-any-return]

    def families(self, label: str) -> list[dict[str, Any]]:
        """Of one label."""
        return [row for row in self.admin()["families"] if row["endpoint"] == label]

    def sent(self, question: str) -> bytes:
        """What the simulator received for the request with this question."""
        needle = question.encode()
        found = [base64.b64decode(each["body_base64"]) for each in self.simulator.requests()]
        (one,) = [each for each in found if needle in each]
        return one


def conversation(user: int, turn: int) -> list[dict[str, str]]:
    """A conversation that has come to its n-th turn."""
    said = []
    for number in range(turn + 1):
        said.append({"role": "user", "content": f"[[sim: tokens=5]] {CANARY} {user} asks {number}. {prose(2, user)}"})
        said.append({"role": "assistant", "content": f"{user} hears {number}. {prose(2, user + 1)}"})
    return said[:-1]


@pytest.fixture(scope="module")
def day(shared_stack: Any) -> Day:
    """One gateway, and all that is sent to it."""
    simulator = shared_stack.simulator("--tier", "none")
    gateway = shared_stack.gateway(
        simulator.url, CACHE__PLAN="true", CACHE__DIAGNOSTICS="true", CACHE__SINGLE_FLIGHT="true"
    )
    day = Day(simulator, gateway, gateway.key("shop", "--scope", "app"), gateway.key("boss", "--scope", "admin:read"))
    for number in range(ROUNDS):
        for fault in FAULTS:
            each, user = faulty(fault, number)
            day.call(fault, each, users=(user,))
    day.call("clean", *(body(KNOWLEDGE, f"{CANARY} {number}", tools=TOOLS) for number in range(CLEAN)))
    talks = [conversation(user, turn) for turn in range(6) for user in (1, 2)]
    day.call("interleaved", *(body(KNOWLEDGE, talk) for talk in talks))
    alike = [f"{name} {KNOWLEDGE}" for name in ("Answer the customer.", "Sum up the talk.")]
    apps = [KNOWLEDGE, prose(90, 3), *alike]
    day.call("two apps", *(body(system, f"{CANARY} {number}") for number in range(10) for system in apps[:2]))
    day.call("two alike", *(body(system, f"{CANARY} {number}") for number in range(10) for system in apps[2:]))
    for turn in range(TURNS):
        people = [body(KNOWLEDGE, conversation(user, turn)) for user in range(USERS)]
        day.call("crowd", *people, users=tuple(f"u-{user}" for user in range(USERS)), connections=20)
    # Of the last what was found is stored some seconds later.
    each, _ = faulty("timestamp", 9)
    day.call("last", faulty("timestamp", 8)[0], each)
    until(lambda: day.families("last") and day.families("last")[0]["findings"], what="the findings to be stored")
    return day


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_within_three_requests_by_its_byte_and_cause_and_cost(day: Day, fault: str) -> None:
    (row,) = day.families(fault)
    (found,) = row["findings"]
    assert row["requests"] == ROUNDS
    assert (found["cause"], found["part"]) == CAUSES[fault]
    # The place is that of the latest; where the third request is like the first, the second is the latest.
    latest = 1 if fault in {"key order", "white space"} else 2
    before, after = (faulty(fault, number)[0] for number in (latest - 1, latest))
    assert found["byte"] == first_difference(found["part"], before, after)
    assert found["value_at"] <= found["byte"]
    assert found["count"] == latest
    assert row["lost_nanousd"] == found["lost_nanousd"] > 0
    assert found["message"].endswith(".")


def test_the_command_line_tells_the_same(day: Day) -> None:
    told = json.loads(day.gateway.headgate("cache", "report", "--json").stdout)
    assert told == day.admin()
    table = day.gateway.headgate("cache", "report").stdout
    for fault in FAULTS:
        assert CAUSES[fault][0] in table
    assert CANARY not in table
    assert told["total"]["lost_nanousd"] == sum(row["lost_nanousd"] for row in told["families"])


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_told_to_be_lost_is_what_the_fault_cost(day: Day, fault: str) -> None:
    """Beside it the same requests without the fault: what each would have read it wrote, or paid in full."""
    (row,) = day.families(fault)
    price = {"plain": 3_000, "read": 300, "write": 3_750}
    first = day.answers[fault][0]["usage"]
    shared = first["cache_creation_input_tokens"]
    ideal = shared * price["write"] + (ROUNDS - 1) * shared * price["read"]
    paid = 0
    for answer in day.answers[fault]:
        usage = answer["usage"]
        paid += usage["cache_creation_input_tokens"] * price["write"] + usage["cache_read_input_tokens"] * price["read"]
        paid += max(usage["input_tokens"] - first["input_tokens"], 0) * price["plain"]
    # The block before the one that changes is marked by the second request, which therefore loses it once more than is
    # told: of three requests that is much, of many little.
    least = 0.5 if fault == "second block" else 1 / 1.5
    assert least < row["lost_nanousd"] / (paid - ideal) < 1.5


def test_anthropics_own_word_stands_beside_ours(day: Day) -> None:
    for fault in ASKED:
        (row,) = day.families(fault)
        (theirs,) = row["anthropic"]
        assert theirs["type"] == f"{CAUSES[fault][1]}_changed"
        assert theirs["missed_tokens"] > 500


@pytest.mark.parametrize("label", ["clean", "interleaved", "two apps", "two alike", "crowd"])
def test_nothing_is_said_where_nothing_is_wrong(day: Day, label: str) -> None:
    rows = day.families(label)
    assert sum(row["requests"] for row in rows) == len(day.answers[label])
    assert [(row["findings"], row["anthropic"], row["lost_nanousd"]) for row in rows] == [([], [], 0)] * len(rows)


def test_who_did_not_ask_is_answered_with_diagnostics_only_where_there_is_trouble(day: Day) -> None:
    for label in ("clean", "interleaved", "two apps", "two alike", "crowd"):
        assert not any("diagnostics" in answer for answer in day.answers[label]), label
    for fault in ASKED:
        assert ["diagnostics" in answer for answer in day.answers[fault]] == [False, False, True]


@pytest.mark.parametrize("previous", ["of the third", None])
def test_who_asked_gets_the_answer_to_their_own_question(day: Day, previous: str | None) -> None:
    """In a family with trouble, where the gateway asks as well."""
    theirs = None if previous is None else day.answers["timestamp"][0]["id"]
    question = f"asked myself {previous}"
    own, _ = faulty("timestamp", 0)
    mine = json.loads(own) | {"diagnostics": {"previous_message_id": theirs}}
    mine["messages"] = [{"role": "user", "content": question}]
    day.call(f"timestamp {previous}", faulty("timestamp", 5)[0], faulty("timestamp", 6)[0], json.dumps(mine).encode())
    sent = day.sent(question)
    assert sent.count(b'"diagnostics"') == 1
    assert json.loads(sent)["diagnostics"] == {"previous_message_id": theirs}
    answer = day.answers[f"timestamp {previous}"][-1]
    # The simulator compares with the message that was named: its system prompt is the same.
    assert answer["diagnostics"] is None or answer["diagnostics"]["cache_miss_reason"]["type"] != "system_changed"


def test_no_word_of_a_prompt_is_kept(day: Day) -> None:
    report = json.dumps(day.admin(), ensure_ascii=False)
    held = {"report": report, "log": day.gateway.process.text()}
    for path in day.gateway.data_dir.rglob("*"):
        if path.is_file():
            held[path.name] = path.read_bytes().decode("utf-8", "replace")
    assert any(name.endswith((".db", ".sqlite", ".sqlite3")) for name in held), list(held)
    for name, text in held.items():
        for word in (CANARY, CANARY[:6], "thirty days", "khach-002", "purchase seal"):
            # Who a user is stands in the ledger and the log, as it was told in a header; not in the report.
            if word.startswith("khach") and name != "report":
                continue
            assert word not in text, (name, word)
    for row in day.admin()["families"]:
        for found in row["findings"]:
            assert len(found["before"]) <= 40
            assert len(found["after"]) <= 40


def test_a_restart_keeps_the_report(day: Day, shared_stack: Any) -> None:
    before = day.admin()
    assert day.gateway.process.stop() == 0
    again = shared_stack.gateway(day.simulator.url, data_dir=day.gateway.data_dir)
    answer = ask(again.operator_url, "GET", "/admin/cache", {"x-api-key": day.reader})
    kept = {row["family"]: row for row in answer.json()["families"]}
    for row in before["families"]:
        assert kept[row["family"]]["findings"][: len(row["findings"])] == row["findings"]
        assert kept[row["family"]]["requests"] == row["requests"]
