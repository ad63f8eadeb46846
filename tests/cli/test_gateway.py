"""`headgate gateway` refuses to start, in words, when it cannot do its work."""

import socket

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
