"""`headgate cache report` and `lint`, run as processes."""

import json
import time

import sqlalchemy as sa

from headgate.policy.cache_lint import CacheDeltas, FindingDelta
from headgate.storage.cache_report import save
from headgate.storage.database import open_database
from headgate.storage.tables import calls

DAY_NS = 86_400 * 10**9


def test_a_report_of_nothing_is_empty_and_no_error(headgate) -> None:
    assert headgate.json("cache", "report")["families"] == []


def test_the_table_shows_what_the_json_says(headgate) -> None:
    now_ns = time.time_ns()
    engine = open_database(headgate.data, now_ns=time.time_ns)
    detail = {"part": "system", "byte": 12, "before": "time 00:00", "after": "time 00:00", "message": "A time."}
    with engine.begin() as connection:
        facts = {"family": "fam1", "endpoint": "chat", "model": "claude-sonnet-4-6", "cache_read_tokens": 900}
        connection.execute(sa.insert(calls).values(call_id="c", at_ns=now_ns, input_tokens=100, **facts))
        day = now_ns // DAY_NS
        row = FindingDelta("fam1", "timestamp", day, 3, 20_000_000, now_ns, now_ns, json.dumps(detail))
        theirs = FindingDelta("fam1", "anthropic:system_changed", day, 2, 0, now_ns, now_ns, '{"missed_tokens":800}')
        save(connection, CacheDeltas((row, theirs), ()))
    engine.dispose()
    (family,) = headgate.json("cache", "report", "--since", "24h")["families"]
    assert (family["hit_rate"], family["lost_nanousd"]) == (0.9, 20_000_000)
    said = headgate("cache", "report").stdout
    for part in (
        "fam1",
        "90%",
        "$0.02",
        "timestamp in system, byte 12: 3 times",
        "time 00:00",
        "system_changed, 2 times",
    ):
        assert part in said


def test_lint_says_where_and_exits_with_one_on_an_error(headgate) -> None:
    (headgate.folder / "bad.md").write_text("You help.\nUser: {{user_id}}\n")
    (headgate.folder / "good.md").write_text("You help. Prices of 2026-01-01. Write to help@example.vn.\n")
    done = headgate("cache", "lint", "bad.md", "good.md")
    assert done.returncode == 1
    assert "bad.md:2:7: error: placeholder: " in done.stdout
    assert "good.md:1:42: note: user_id: " in done.stdout
    assert done.stdout.endswith("2 files, 1 error, 1 note\n")
    clean = headgate.json("cache", "lint", "good.md")
    assert (clean["errors"], clean["notes"]) == (0, 1)
    answer = json.loads(headgate("cache", "lint", "bad.md", "--json").stdout)
    found = answer["findings"][0]
    assert (found["file"], found["line"], found["column"], found["cause"]) == ("bad.md", 2, 7, "placeholder")


def test_lint_compares_versions_in_their_order(headgate) -> None:
    for name, tools in (("1.json", "ab"), ("2.json", "ab"), ("3.json", "ba")):
        (headgate.folder / name).write_text(json.dumps({"tools": [{"name": tool} for tool in tools]}))
    done = headgate("cache", "lint", "--compare", "1.json", "2.json", "3.json")
    assert done.returncode == 1
    assert "3.json:1:12: error: tool_order" in done.stdout


def test_the_minimum_is_that_of_the_model(headgate) -> None:
    text = "The handbook says that everybody is served in order. " * 150
    marked = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]
    (headgate.folder / "a.json").write_text(json.dumps({"system": marked}))
    done = headgate("cache", "lint", "a.json", "--model", "claude-haiku-4-5")
    assert (done.returncode, "below_minimum" in done.stdout) == (1, True)
    assert headgate("cache", "lint", "a.json", CLAUDE_MODEL="claude-sonnet-4-6").returncode == 0


def test_a_file_that_cannot_be_read_is_said_with_code_two(headgate) -> None:
    (headgate.folder / "x.json").write_text('{"prompt": 1}')
    for name, says in (("gone.md", "No such file"), ("x.json", "none of system")):
        code, said = headgate.refusal("cache", "lint", name)
        assert code == 2
        assert name in said
        assert says in said
