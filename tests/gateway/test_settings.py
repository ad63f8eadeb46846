"""Settings: one file, the same keys as variables, and a start that stops with the name, the value and the mend."""

import os

import pytest

from headgate.gateway.settings import SettingsError, config_path, host_port, load_settings, setting_names

SECRET = "sk-ant-canary-0123456789"


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """An empty environment in an empty folder; returns what sets variables."""
    for name in list(os.environ):
        if name.startswith(("HEADGATE_", "ANTHROPIC_", "CLAUDE_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def set_all(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.fixture
def file(environment, tmp_path):
    """Writes `headgate.toml`, where it is found."""
    return (tmp_path / "headgate.toml").write_text


def complaint() -> str:
    with pytest.raises(SettingsError) as refused:
        load_settings()
    return str(refused.value)


def test_without_a_file_and_variables_there_are_the_defaults(environment):
    settings = load_settings()
    assert settings.upstream_url == "https://api.anthropic.com"
    assert settings.default_model == "claude-sonnet-4-6"
    assert (settings.queue.deadline_s, settings.upstream.stall_timeout_s, settings.retry.attempts_max) == (20, 180, 3)
    assert settings.anthropic_api_key.get_secret_value() == ""


def test_the_file_is_read(file):
    file('listen = "0.0.0.0:9000"\n[queue]\ndeadline_s = 5\n[upstream]\nhold_s = 0\n')
    settings = load_settings()
    assert (settings.listen, settings.queue.deadline_s, settings.upstream.hold_s) == ("0.0.0.0:9000", 5, 0)
    assert settings.upstream.stall_timeout_s == 180


def test_the_environment_wins_over_the_file_key_by_key(environment, file):
    file('listen = "0.0.0.0:9000"\n[queue]\ndeadline_s = 5\n[upstream]\nhold_s = 0.5\nstall_timeout_s = 60\n')
    environment(HEADGATE_QUEUE__DEADLINE_S="7", HEADGATE_UPSTREAM__HOLD_S="2", HEADGATE_LISTEN="127.0.0.1:1")
    settings = load_settings()
    assert (settings.listen, settings.queue.deadline_s) == ("127.0.0.1:1", 7)
    assert (settings.upstream.hold_s, settings.upstream.stall_timeout_s) == (2, 60)


def test_the_file_may_lie_elsewhere(environment, tmp_path):
    (tmp_path / "other.toml").write_text("[queue]\ndeadline_s = 9\n")
    environment(HEADGATE_CONFIG=str(tmp_path / "other.toml"))
    assert load_settings().queue.deadline_s == 9
    assert config_path({}).name == "headgate.toml"


def test_a_file_that_is_named_and_missing_stops_the_start(environment):
    environment(HEADGATE_CONFIG="nowhere.toml")
    assert "HEADGATE_CONFIG names nowhere.toml" in complaint()


@pytest.mark.parametrize(
    ("text", "name", "meant"),
    [
        ("[queue]\ndeadlin_s = 5\n", "queue.deadlin_s", "queue.deadline_s"),
        ("[upstream]\nstall_timeout = 5\n", "upstream.stall_timeout", "upstream.stall_timeout_s"),
        ("[server]\nbody_timout_s = 5\n", "server.body_timout_s", "server.body_timeout_s"),
        ('upstream_ur = "x"\n', "upstream_ur", "upstream_url"),
        ("[retry]\nbase_delay = 1\n", "retry.base_delay", "retry.base_delay_s"),
    ],
)
def test_a_misspelt_key_of_the_file_is_named_with_what_was_meant(file, text, name, meant):
    file(text)
    assert f"{name}: no such setting. Did you mean {meant}?" in complaint()


def test_a_key_that_is_like_no_other_points_to_the_list(file):
    file("[zzzz]\nqqqq = 1\n")
    assert "docs/settings.md" in complaint()


def test_a_misspelt_variable_is_named_with_what_was_meant(environment):
    environment(HEADGATE_QUEUE__DEADLIN_S="5")
    assert complaint() == "HEADGATE_QUEUE__DEADLIN_S: no such setting. Did you mean HEADGATE_QUEUE__DEADLINE_S?"


def test_variables_are_read_in_any_case(environment):
    environment(headgate_queue__deadline_s="6")
    assert load_settings().queue.deadline_s == 6


@pytest.mark.parametrize("name", [name for name in setting_names() if "." in name])
def test_every_key_has_its_variable(environment, name):
    variable = f"HEADGATE_{name.replace('.', '__')}".upper()
    environment(**{variable: "nonsense"})
    try:
        load_settings()
    except SettingsError as refused:
        assert name in str(refused)  # noqa: PT017  a text is a fine public_url, and a complaint names the key


@pytest.mark.parametrize(
    ("text", "name", "shape"),
    [
        ("[queue]\ndeadline_s = 0\n", "queue.deadline_s", "greater than 0"),
        ("[queue]\ndeadline_s = 100000\n", "queue.deadline_s", "less than or equal to 3600"),
        ('[queue]\ndeadline_s = "soon"\n', "queue.deadline_s", "number"),
        ("[queue]\ndeadline_s = nan\n", "queue.deadline_s", ""),
        ("[retry]\nattempts_max = 4\n", "retry.attempts_max", "less than or equal to 3"),
        ('[ledger]\ndurability = "paper"\n', "ledger.durability", "'process' or 'power'"),
        ('upstream_url = "api.anthropic.com"\n', "upstream_url", "https://host[:port]"),
        ('upstream_url = "https://a/?x=1"\n', "upstream_url", "https://host[:port]"),
        ('listen = "8080"\n', "listen", "host:port"),
        ('listen = "127.0.0.1:99999"\n', "listen", "host:port"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_the_shape_it_should_have(file, text, name, shape):
    file(text)
    said = complaint()
    assert said.startswith(f"{name}: ")
    assert shape in said


def test_all_that_is_wrong_is_told_at_once(file):
    file('listen = "x"\n[queue]\ndeadline_s = 0\nfoo = 1\n')
    assert len(complaint().splitlines()) == 3


def test_a_file_that_is_no_toml_stops_the_start(file):
    file("[queue\n")
    assert "headgate.toml: not valid TOML" in complaint()


def test_the_key_comes_from_the_environment_or_from_a_file_of_its_own(environment, tmp_path):
    (tmp_path / "key").write_text(f"{SECRET}\n")
    environment(ANTHROPIC_API_KEY_FILE=str(tmp_path / "key"))
    assert load_settings().anthropic_api_key.get_secret_value() == SECRET
    environment(ANTHROPIC_API_KEY="sk-other")
    assert load_settings().anthropic_api_key.get_secret_value() == "sk-other"


@pytest.mark.parametrize(
    ("content", "mend"), [(None, "Name a file that holds the key"), (" \n", "Put the key into it")]
)
def test_a_key_file_that_holds_no_key_stops_the_start(environment, tmp_path, content, mend):
    if content is not None:
        (tmp_path / "key").write_text(content)
    environment(ANTHROPIC_API_KEY_FILE=str(tmp_path / "key"))
    said = complaint()
    assert "ANTHROPIC_API_KEY_FILE" in said
    assert mend in said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[queue]\ndeadline_s = 0\n",
        f'anthropic_api_key = "{SECRET}"\n',
        f'ANTHROPIC_API_KEY = ["{SECRET}"]\n',
        f'ANTHROPIC_API_KEY = {{ value = "{SECRET}" }}\n',
        f'[queue]\nanthropic_api_key = "{SECRET}"\n',
    ],
)
def test_a_secret_is_never_shown(environment, file, text):
    file(text)
    if not text:
        environment(ANTHROPIC_API_KEY=SECRET)
    try:
        shown = repr(load_settings()) + str(load_settings().model_dump()) + load_settings().model_dump_json()
    except SettingsError as refused:
        shown = str(refused) + repr(refused.__cause__)
    assert SECRET not in shown


def test_a_database_password_is_never_shown_by_a_complaint(file):
    file('database_url = ["postgresql://an:canary-password@db/x"]\nredis_url = ["redis://:canary-password@r"]\n')
    assert "canary-password" not in complaint()


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        ("[::1]:1", "::1", 1),
        (":0", "", 0),
        ("localhost:65535", "localhost", 65535),
    ],
)
def test_an_address_is_taken_apart(address, host, port):
    assert host_port(address) == (host, port)


@pytest.mark.parametrize("address", ["", "8080", "localhost", "a:b", "a:-1", "a:65536", "a:"])
def test_what_is_no_address_is_told_the_form(address):
    with pytest.raises(ValueError, match="host:port"):
        host_port(address)


def test_settings_do_not_change(environment):
    with pytest.raises(ValueError, match="frozen"):
        load_settings().listen = "x"
