"""`headgate gateway` refuses to start, in words, when it cannot do its work."""

import socket

import pytest

ENVIRONMENT = {
    "ANTHROPIC_API_KEY": "sk-ant-test",
    "HEADGATE_LISTEN": "127.0.0.1:0",
    "HEADGATE_OPERATOR_LISTEN": "127.0.0.1:0",
}


def test_without_the_anthropic_key_it_says_where_to_put_it(headgate) -> None:
    code, said = headgate.refusal("gateway", **ENVIRONMENT | {"ANTHROPIC_API_KEY": ""})
    assert code == 3
    assert "ANTHROPIC_API_KEY" in said


def test_a_setting_that_does_not_exist_stops_the_start(headgate) -> None:
    code, said = headgate.refusal("gateway", **ENVIRONMENT, HEADGATE_QUEUE__DEADLIN_S="1")
    assert code == 3
    assert "HEADGATE_QUEUE__DEADLINE_S" in said


def test_a_taken_port_names_the_setting(headgate) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, said = headgate.refusal("gateway", **ENVIRONMENT | {"HEADGATE_LISTEN": address})
    assert code == 6
    assert address in said
    assert "HEADGATE_LISTEN" in said


def test_a_data_directory_that_cannot_be_made_stops_the_start(headgate) -> None:
    (headgate.folder / "file").write_text("")
    code, said = headgate.refusal("gateway", **ENVIRONMENT | {"HEADGATE_DATA_DIR": str(headgate.folder / "file" / "x")})
    assert code == 5
    assert "HEADGATE_DATA_DIR" in said


def test_an_option_is_refused_since_there_are_only_settings(headgate) -> None:
    code, said = headgate.refusal("gateway", "--port", "1")
    assert code == 2
    assert "headgate gateway" in said


def test_several_workers_are_refused_without_the_redis_that_keeps_their_limits(headgate) -> None:
    code, said = headgate.refusal("gateway", "--workers", "2", **ENVIRONMENT)
    assert code == 3
    assert "HEADGATE_REDIS_URL" in said
    assert "redis://127.0.0.1:6379/0" in said
    assert not headgate.data.exists()


@pytest.mark.parametrize("count", ["0", "-1", "65", "two", "1.5", "²"])
def test_a_number_of_workers_that_cannot_be_meant_is_refused(headgate, count: str) -> None:
    code, said = headgate.refusal(
        "gateway", f"--workers={count}", **ENVIRONMENT, HEADGATE_REDIS_URL="redis://127.0.0.1:1"
    )
    assert code == 2
    assert "1 to 64" in said


def test_a_taken_operator_port_of_any_worker_names_the_setting_before_one_is_started(headgate) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        several = {"HEADGATE_REDIS_URL": "redis://127.0.0.1:1", "HEADGATE_OPERATOR_LISTEN": f"127.0.0.1:{port - 1}"}
        code, said = headgate.refusal("gateway", "--workers", "2", **ENVIRONMENT | several)
    assert code == 6
    assert f"operator ports {port - 1} to {port}" in said
    assert "HEADGATE_OPERATOR_LISTEN" in said


@pytest.mark.parametrize(
    ("listen", "operator"), [("127.0.0.1:8080", "127.0.0.1:8079"), ("127.0.0.1:0", "127.0.0.1:65535")]
)
def test_operator_ports_that_cannot_be_had_are_refused(headgate, listen: str, operator: str) -> None:
    addresses = {"HEADGATE_LISTEN": listen, "HEADGATE_OPERATOR_LISTEN": operator}
    several = {"HEADGATE_REDIS_URL": "redis://127.0.0.1:1", **addresses}
    code, said = headgate.refusal("gateway", "--workers", "2", **ENVIRONMENT | several)
    assert code == 6
    assert "HEADGATE_OPERATOR_LISTEN" in said


def test_a_worker_that_nobody_watches_over_is_refused(headgate) -> None:
    code, said = headgate.refusal("gateway", "--workers", "2", "--worker", "1@0", **ENVIRONMENT)
    assert code == 2
    assert "--workers" in said
