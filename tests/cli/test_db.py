"""`headgate db`, run as a process."""


def test_a_migration_says_what_it_found_and_what_it_left(headgate) -> None:
    first = headgate.json("db", "migrate")
    assert first["before"] is None
    second = headgate.json("db", "migrate")
    assert second == {"before": first["after"], "after": first["after"], "copy": None}


def test_a_database_of_a_newer_version_is_refused_untouched(headgate) -> None:
    headgate.json("db", "migrate")
    headgate.execute("UPDATE alembic_version SET version_num = '9999'")
    code, said = headgate.refusal("db", "migrate")
    assert code == 5
    assert "9999" in said
