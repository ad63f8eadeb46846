"""`headgate keys`, run as a process."""

import re
from datetime import datetime

import pytest


def test_a_new_key_is_printed_once_and_only_its_hash_is_kept(headgate) -> None:
    issued = headgate.json("keys", "create", "--name", "shop")
    assert re.fullmatch(r"hg_[0-9A-Za-z]{8}_[\w-]{43}", issued["key"])
    assert issued["key"].split("_")[1] == issued["id"]
    listed = headgate.json("keys", "list")["keys"]
    assert [key["id"] for key in listed] == [issued["id"]]
    assert "key" not in listed[0]
    secret = issued["key"][12:]
    assert not any(secret.encode() in file.read_bytes() for file in headgate.data.rglob("*") if file.is_file())


def test_the_name_alone_makes_the_owner_and_messages_is_the_scope(headgate) -> None:
    issued = headgate.json("keys", "create", "--name", "shop")
    assert (issued["owner"], issued["scopes"], issued["tier"], issued["expires_at"]) == (
        "shop",
        ["messages"],
        "free",
        None,
    )


def test_every_option_of_a_key_is_kept(headgate) -> None:
    issued = headgate.json(
        *("keys", "create", "--name", "n", "--owner", "o", "--scope", "app", "--scope", "batch", "--tier", "paid"),
        *(
            "--rpm",
            "7",
            "--otpm",
            "900",
            "--concurrency",
            "3",
            "--budget-usd-day",
            "0.5",
            "--budget-usd-month",
            "$12",
            "--models",
            "claude-a,claude-b",
        ),
        *("--expires", "30d"),
    )
    (kept,) = headgate.json("keys", "list")["keys"]
    assert kept == {name: value for name, value in issued.items() if name != "key"}
    assert kept["owner"] == "o"
    assert kept["scopes"] == ["app", "batch"]
    assert (kept["tier"], kept["rpm"], kept["otpm"], kept["concurrency"]) == ("paid", 7, 900, 3)
    assert "7 RPM, 900 OTPM, 3 at once, $0.50/day" in headgate("keys", "list").stdout
    assert (kept["budget_day_nanousd"], kept["budget_month_nanousd"]) == (500_000_000, 12_000_000_000)
    assert kept["models"] == ["claude-a", "claude-b"]
    lifetime = datetime.fromisoformat(kept["expires_at"]) - datetime.fromisoformat(kept["created_at"])
    assert lifetime.total_seconds() == pytest.approx(30 * 86_400, abs=1)


def test_a_revoked_key_stays_in_the_list_as_revoked(headgate) -> None:
    key_id = headgate.json("keys", "create", "--name", "shop")["id"]
    assert headgate.json("keys", "revoke", key_id)["revoked_at"] is not None
    assert headgate.json("keys", "list")["keys"][0]["revoked_at"] is not None
    assert "revoked" in headgate("keys", "list").stdout


def test_a_rotation_keeps_the_id_changes_the_secret_and_says_how_long_the_old_one_works(headgate) -> None:
    first = headgate.json("keys", "create", "--name", "shop")
    second = headgate.json("keys", "rotate", first["id"], "--overlap", "2h")
    assert second["id"] == first["id"]
    assert second["key"] != first["key"]
    assert second["previous_expires_at"] is not None


@pytest.mark.parametrize("verb", ["revoke", "rotate"])
def test_a_key_that_does_not_exist_is_its_own_exit_code_and_names_the_list(headgate, verb: str) -> None:
    code, said = headgate.refusal("keys", verb, "nobody00")
    assert code == 4
    assert "nobody00" in said
    assert "headgate keys list" in said


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--scope", "root", "admin:write"),
        ("--expires", "soon", "30d"),
        ("--budget-usd-day", "much", "0.50"),
        ("--budget-usd-day", "0.00000000001", "0.50"),
        ("--rpm", "0", "above 0"),
        ("--otpm", "-5", "above 0"),
        ("--concurrency", "0", "above 0"),
        ("--concurrency", "99999999999999999999", "at most 1000000000"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_with_what_would(headgate, option: str, value: str, word: str) -> None:
    code, said = headgate.refusal("keys", "create", "--name", "shop", option, value)
    assert code == 2
    assert word in said
    assert headgate.json("keys", "list") == {"keys": []}


def test_a_list_in_a_pipe_is_not_cut_off(headgate) -> None:
    issued = headgate.json("keys", "create", "--name", "a-name-of-quite-some-length-for-a-narrow-terminal")
    line = next(line for line in headgate("keys", "list", COLUMNS="40").stdout.splitlines() if issued["id"] in line)
    assert issued["name"] in line


def test_an_empty_list_says_how_to_make_a_key(headgate) -> None:
    assert "headgate keys create" in headgate("keys", "list").stdout


def test_a_damaged_database_is_named_and_not_made_anew(headgate) -> None:
    headgate.data.mkdir()
    database = headgate.data / "headgate.db"
    database.write_bytes(b"not a database" * 100)
    code, said = headgate.refusal("keys", "list")
    assert code == 5
    assert str(database) in said
    assert database.read_bytes() == b"not a database" * 100


def test_a_data_directory_that_cannot_be_made_names_the_setting(headgate) -> None:
    (headgate.folder / "file").write_text("")
    code, said = headgate.refusal("keys", "list", HEADGATE_DATA_DIR=str(headgate.folder / "file" / "data"))
    assert code == 5
    assert "HEADGATE_DATA_DIR" in said
