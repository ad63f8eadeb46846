"""The `headgate` command itself: help, version, dispatch."""

from headgate import __version__


def test_the_help_names_every_command(headgate) -> None:
    said = headgate("--help").stdout
    assert all(
        f"  {name} " in said
        for name in ("up", "gateway", "simulator", "keys", "usage", "calls", "bill", "config", "db")
    )


def test_the_version_is_that_of_the_package(headgate) -> None:
    assert headgate("--version").stdout == f"headgate {__version__}\n"


def test_an_unknown_command_is_refused_with_where_to_look(headgate) -> None:
    code, said = headgate.refusal("serve")
    assert code == 2
    assert "headgate --help" in said
