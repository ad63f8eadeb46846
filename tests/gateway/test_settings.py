"""Settings: one file, the same keys as variables, and a start that stops with the name, the value and the mend."""

import os
import re
from pathlib import Path

import pytest

from headgate.gateway.settings import (
    BUILT_IN_TIERS,
    LIVE,
    Settings,
    SettingsError,
    config_path,
    host_port,
    load_settings,
    reload,
    setting_names,
)
from headgate.wire.catalog import packaged

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


@pytest.mark.parametrize(
    "name",
    [name.replace("NAME", "sonnet") for name in setting_names() if "." in name and not name.startswith("experiments.")],
)
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


# tables of names


def test_a_tier_keeps_what_is_not_changed_of_it(environment, file):
    file("[tiers.paid]\nconcurrency = 4\n[tiers.free]\nrpm = 7\n")
    environment(HEADGATE_TIERS__FREE__RPM="5", HEADGATE_TIERS__PREMIUM__MODEL="claude-opus-5")
    tiers = load_settings().tiers
    assert list(tiers) == ["free", "paid", "premium", "batch"]
    assert tiers["free"] == BUILT_IN_TIERS["free"].model_copy(update={"rpm": 5})
    assert tiers["paid"] == BUILT_IN_TIERS["paid"].model_copy(update={"concurrency": 4})
    assert (tiers["premium"].rpm, tiers["premium"].model) == (100, "claude-opus-5")
    assert tiers["batch"].background


def test_a_tier_of_ones_own_begins_as_free(environment, file):
    file("[tiers.team_gold]\nweight = 9\n")
    environment(HEADGATE_TIERS__SILVER__RPM="30")
    tiers = load_settings().tiers
    assert tiers["team_gold"] == BUILT_IN_TIERS["free"].model_copy(update={"weight": 9.0})
    assert tiers["silver"].rpm == 30


def test_file_and_variables_meet_in_one_table(environment, file):
    file("[pacing]\nrpm = 9\n[pacing.classes.sonnet-4]\nitpm = 5\notpm = 6\n")
    environment(HEADGATE_PACING__CLASSES__SONNET_4__OTPM="7", HEADGATE_PACING__CLASSES__HAIKU__RPM="3")
    pacing = load_settings().pacing
    assert pacing.rpm == 9
    assert {name: limits.model_dump() for name, limits in pacing.classes.items()} == {
        "sonnet-4": {"rpm": None, "itpm": 5, "otpm": 7},
        "haiku": {"rpm": 3, "itpm": None, "otpm": None},
    }


@pytest.mark.parametrize("value", ["claude-sonnet-4-6, claude-haiku-4-5", '["claude-sonnet-4-6","claude-haiku-4-5"]'])
def test_a_list_in_a_variable_is_json_or_parted_by_commas(environment, value):
    environment(HEADGATE_ROUTING__FALLBACKS__CLAUDE_OPUS_4_7=value)
    fallbacks = load_settings().routing.fallbacks
    assert fallbacks == {"claude-opus-4-7": ("claude-sonnet-4-6", "claude-haiku-4-5")}


EXPERIMENT = """
[[experiments]]
name = "cheaper"
model = "claude-sonnet-4-6"
arms = [{ name = "sonnet", model = "claude-sonnet-4-6", weight = 3 }, { name = "haiku", model = "claude-haiku-4-5" }]
"""


def test_experiments_are_tables_of_the_file_or_json_in_one_variable(environment, file):
    file(EXPERIMENT)
    read = load_settings().experiments
    assert [(one.name, one.endpoint, [(arm.name, arm.weight) for arm in one.arms]) for one in read] == [
        ("cheaper", "", [("sonnet", 3), ("haiku", 1)])
    ]
    environment(HEADGATE_EXPERIMENTS="[]")
    assert load_settings().experiments == ()


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("HEADGATE_TIERS__FREE__RPMM", "Did you mean HEADGATE_TIERS__FREE__RPM?"),
        ("HEADGATE_TIERS__GOLD__WEIGTH", "Did you mean HEADGATE_TIERS__GOLD__WEIGHT?"),
        ("HEADGATE_TIERS__FREE", "Did you mean HEADGATE_TIERS__FREE__"),
        ("HEADGATE_PACING__CLASSES__SONNET__ITPN", "Did you mean HEADGATE_PACING__CLASSES__SONNET__ITPM?"),
        ("HEADGATE_PACING__CLASES__SONNET__ITPM", "Did you mean HEADGATE_PACING__CLASSES__"),
        ("HEADGATE_ROUTING__ALIASES", "Did you mean HEADGATE_ROUTING__ALIASES__NAME?"),
        ("HEADGATE_TIERS____RPM", "no such setting"),
        ("headgate_tiers__free__rpmm", "Did you mean HEADGATE_TIERS__FREE__RPM?"),
        ("HEADGATE_EXPERIMENTS__0__NAME", "HEADGATE_EXPERIMENTS holds it all, as JSON"),
    ],
)
def test_a_misspelt_variable_of_a_table_is_named_with_what_was_meant(environment, variable, said):
    environment(**{variable: "1"})
    assert complaint().startswith(f"{variable}: ")
    assert said in complaint()


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("[tiers.free]\nrpmm = 5\n", "tiers.free.rpmm", "Did you mean tiers.free.rpm?"),
        ("[pacing.classes.sonnet]\nitp = 5\n", "pacing.classes.sonnet.itp", "Did you mean pacing.classes.sonnet.itpm?"),
        (EXPERIMENT.replace("arms", "arm"), "experiments[0].arm", "Did you mean experiments.arms"),
        (EXPERIMENT.replace("weight", "wait"), "experiments[0].arms[0].wait", "Did you mean experiments.arms.weight?"),
    ],
)
def test_a_misspelt_key_of_a_table_is_named_with_what_was_meant(file, text, name, said):
    file(text)
    assert f"{name}: no such setting. {said}" in complaint()


# what cannot be meant


def routing(text: str) -> str:
    return f"[routing]\n{text}\n"


def experiment(arms: str, *, name: str = "e", model: str = "claude-sonnet-4-6", endpoint: str = "") -> str:
    return f'[[experiments]]\nname = "{name}"\nmodel = "{model}"\nendpoint = "{endpoint}"\narms = [{arms}]\n'


def arm(name: str, model: str = "claude-haiku-4-5", weight: str = "1") -> str:
    return f'{{ name = "{name}", model = "{model}", weight = {weight} }}'


TWO = f"{arm('a', 'claude-sonnet-4-6')}, {arm('b')}"


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        # rates and weights
        ("[tiers.free]\nrpm = 0\n", "tiers.free.rpm", "greater than or equal to 1 (it is 0)"),
        ("[tiers.free]\nrpm = -3\n", "tiers.free.rpm", "greater than or equal to 1"),
        ("[tiers.free]\nweight = 0\n", "tiers.free.weight", "greater than 0"),
        ("[tiers.free]\nconcurrency = 0\n", "tiers.free.concurrency", "greater than or equal to 1"),
        ("[tiers.Free]\nrpm = 3\n", "tiers.Free", "lower case"),
        ("[pacing]\nitpm = 0\n", "pacing.itpm", "greater than or equal to 1"),
        ("[pacing]\nburst_s = 0\n", "pacing.burst_s", "greater than or equal to 0.1"),
        ("[pacing.classes.sonnet]\nrpm = 0\n", "pacing.classes.sonnet.rpm", "greater than or equal to 1"),
        ('[pacing]\ntier = "tier5"\n', "pacing.tier", "'tier1'"),
        ("[breaker]\nfailure_ratio = 0\n", "breaker.failure_ratio", "greater than 0"),
        ("[breaker]\nfailures = 0\n", "breaker.failures", "greater than or equal to 1"),
        ("[breaker]\nopen_s = 200\n", "breaker.open_s", "above breaker.open_s_max, 120"),
        ("[queue]\nwaiting_max = 0\n", "queue.waiting_max", "greater than or equal to 1"),
        # classes
        ("[pacing.classes.sonet]\nrpm = 5\n", "pacing.classes.sonet", "Did you mean sonnet?"),
        ("[pacing.classes.zz]\nrpm = 5\n", "pacing.classes.zz", "There are: fable, fable-5, haiku, "),
        # models
        ('[tiers.premium]\nmodel = "claude-opus-47"\n', "tiers.premium.model", "Did you mean claude-opus-4-7?"),
        (routing('fallback = "claude-haiku"'), "routing.fallback", "Did you mean claude-haiku-"),
        (routing('fallback = "gpt-99"'), "routing.fallback", "This version knows: claude-fable-5-2, "),
        (routing('aliases = { fast = "claude-hiku-4-5" }'), "routing.aliases.fast", "Did you mean claude-haiku-4-5?"),
        (routing('endpoints = { chat = "nonesuch" }'), "routing.endpoints.chat", "no such model: 'nonesuch'"),
        (routing('endpoints = { chat = "claude-sonnet-4-0" }'), "routing.endpoints.chat", "was retired on 2026-06-15"),
        (routing("fallbacks = { claude-sonnet = [] }"), "routing.fallbacks.claude-sonnet", "no such model"),
        (
            routing('fallbacks = { claude-opus-4-7 = ["claude-hai"] }'),
            "routing.fallbacks.claude-opus-4-7",
            "no such model: 'claude-hai'",
        ),
        (experiment(TWO, model="claude-sonet-4-6"), "experiments.e.model", "Did you mean claude-sonnet-4-6?"),
        (experiment(f"{arm('a')}, {arm('b', 'x')}"), "experiments.e.arms.b.model", "no such model: 'x'"),
        # aliases
        (
            routing('aliases = { claude-opus-4-7 = "claude-haiku-4-5" }'),
            "routing.aliases.claude-opus-4-7",
            "Choose another name",
        ),
        (routing('aliases = { default = "claude-haiku-4-5" }'), "routing.aliases.default", "Set CLAUDE_MODEL"),
        (
            routing('aliases = { a = "b", b = "claude-haiku-4-5" }'),
            "routing.aliases.a",
            "b is an alias. Name the model itself: claude-haiku-4-5.",
        ),
        (
            routing('endpoints = { chat = "default" }'),
            "routing.endpoints.chat",
            "default is an alias. Name the model itself: claude-sonnet-4-6.",
        ),
        # fallbacks
        (routing('fallback = "claude-sonnet-4-6"'), "routing.fallback", "is CLAUDE_MODEL itself"),
        (
            routing('fallbacks = { claude-haiku-4-5 = ["claude-haiku-4-5-20251001"] }'),
            "routing.fallbacks.claude-haiku-4-5",
            "is this model itself",
        ),
        (
            routing('fallbacks = { claude-haiku-4-5 = ["claude-sonnet-4-6"] }'),
            "routing.fallbacks.claude-haiku-4-5",
            "claude-sonnet-4-6 is dearer",
        ),
        (
            routing("fallbacks = { claude-haiku-4-5 = [], claude-haiku-4-5-20251001 = [] }"),
            "routing.fallbacks.claude-haiku-4-5-20251001",
            "Keep one",
        ),
        (
            routing('fallbacks = { claude-opus-4-7 = ["claude-opus-4-6"], claude-opus-4-6 = ["claude-opus-4-7"] }'),
            "routing.fallbacks.claude-opus-4-6",
            "goes in a circle: claude-opus-4-6 → claude-opus-4-7 → claude-opus-4-6",
        ),
        # experiments
        (experiment(""), "experiments.e.arms", "at least two arms; it has 0"),
        (experiment(arm("a")), "experiments.e.arms", "at least two arms; it has 1"),
        (experiment(f"{arm('a')}, {arm('a')}"), "experiments.e.arms.a", "two arms have this name"),
        (
            experiment(f"{arm('a', weight='-1')}, {arm('b')}"),
            "experiments[0].arms[0].weight",
            "greater than or equal to 0",
        ),
        (experiment(f"{arm('a', weight='0')}, {arm('b', weight='0')}"), "experiments.e.arms", "every weight is 0"),
        (experiment(f"{arm('a:b')}, {arm('b')}"), "experiments[0].arms[0].name", "letters, digits"),
        (experiment(TWO) + experiment(TWO, endpoint="x"), "experiments.e", "two experiments have this name"),
        (
            experiment(TWO) + experiment(TWO, name="f"),
            "experiments.f",
            "e is an experiment on claude-sonnet-4-6 already",
        ),
        (
            experiment(TWO, model="claude-haiku-4-5", endpoint="chat")
            + experiment(TWO, name="f", model="claude-haiku-4-5-20251001", endpoint="chat"),
            "experiments.f",
            "at endpoint chat already",
        ),
    ],
)
def test_what_cannot_be_meant_is_named_with_its_key_and_the_mend(file, text, key, said):
    file(text)
    complained = complaint()
    assert complained.startswith(f"{key}"), complained
    assert said in complained


@pytest.mark.parametrize("model", ["claude-sonnet-46", "default", "claude-sonnet-4-0"])
def test_a_default_model_that_there_is_not_stops_the_start(environment, model):
    environment(CLAUDE_MODEL=model)
    assert complaint().startswith("CLAUDE_MODEL: ")


def test_a_value_that_is_no_json_is_named_and_never_a_traceback(environment):
    environment(HEADGATE_EXPERIMENTS="[{")
    assert complaint().startswith("experiments: ")
    environment(HEADGATE_EXPERIMENTS="[]", HEADGATE_TIERS="5")
    assert complaint().startswith("tiers: ")


@pytest.mark.parametrize(
    "text",
    [
        routing('fallback = ""'),
        routing("fallbacks = { claude-sonnet-4-6 = [] }"),
        routing('fallbacks = { claude-opus-4-7 = ["claude-opus-4-6", "claude-sonnet-4-6"] }'),
        routing('aliases = { fast = "claude-haiku-4-5", smart = "claude-opus-4-7" }'),
        experiment(TWO) + experiment(TWO, name="f", endpoint="chat"),
        experiment(f"{arm('a', weight='0')}, {arm('b')}"),
    ],
)
def test_what_can_be_meant_is_taken(file, text):
    file(text)
    load_settings()


def test_the_example_in_the_documentation_is_taken(file):
    document = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", document, re.DOTALL)
    file(example)
    settings = load_settings()
    assert (settings.tiers["partner"].rpm, settings.tiers["partner"].waiting_max) == (300, 10)
    assert settings.routing.fallbacks["claude-opus-5"] == ("claude-sonnet-5", "claude-haiku-4-5")
    assert [arm.name for arm in settings.experiments[0].arms] == ["sonnet", "haiku"]


def test_the_classes_in_the_documentation_are_those_of_the_catalogue():
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    listed = re.search(r"The classes are (.*?); the lines (.*?)\.", text, re.DOTALL)
    assert re.findall(r"`([^`]+)`", listed[1]) == list(dict.fromkeys(model.rate_class for model in by_line()))
    assert set(re.findall(r"`([^`]+)`", listed[2])) == {model.line for model in packaged().models}


def by_line():
    """The models, as they are listed: line by line."""
    lines = list(dict.fromkeys(model.line for model in packaged().models))
    return sorted(packaged().models, key=lambda model: lines.index(model.line))


def test_the_default_fallback_does_not_forbid_to_make_its_model_the_default(environment):
    environment(CLAUDE_MODEL="claude-haiku-4-5")
    assert load_settings().routing.fallback == "claude-haiku-4-5"
    environment(HEADGATE_ROUTING__FALLBACK="claude-haiku-4-5")
    assert complaint().startswith("routing.fallback: ")


# read again


def test_reading_again_changes_what_is_live_and_names_what_waits(environment, file, tmp_path):
    (tmp_path / "key").write_text("sk-one")
    environment(ANTHROPIC_API_KEY_FILE=str(tmp_path / "key"))
    running = load_settings()
    file(
        'listen = "0.0.0.0:1"\n[queue]\ndeadline_s = 5\n[upstream]\nhold_s = 0\n[retry]\nattempts_max = 2\n'
        '[tiers.free]\nrpm = 3\n[pacing]\nrpm = 4\n[breaker]\nfailures = 5\n[routing]\nfallback = ""\n' + EXPERIMENT
    )
    environment(CLAUDE_MODEL="claude-sonnet-5")
    (tmp_path / "key").write_text("sk-two")
    now, waiting = reload(running)
    assert waiting == ["ANTHROPIC_API_KEY", "listen", "upstream.hold_s"]
    assert (now.queue.deadline_s, now.retry.attempts_max, now.tiers["free"].rpm, now.pacing.rpm) == (5, 2, 3, 4)
    assert (now.breaker.failures, now.routing.fallback, now.default_model) == (5, "", "claude-sonnet-5")
    assert len(now.experiments) == 1
    assert (now.listen, now.upstream.hold_s) == (running.listen, running.upstream.hold_s)
    assert now.anthropic_api_key.get_secret_value() == "sk-one"
    assert reload(now) == (now, waiting)


def test_reading_again_without_a_change_changes_nothing(environment):
    running = load_settings()
    assert reload(running) == (running, [])


def test_what_is_refused_when_read_again_leaves_everything_as_it_is(environment, file):
    running = load_settings()
    file("[tiers.free]\nrpm = 0\n")
    with pytest.raises(SettingsError, match=r"tiers\.free\.rpm"):
        reload(running)


def test_every_section_is_live_or_waits_for_a_restart():
    assert set(Settings.model_fields) >= LIVE
    assert {"upstream", "server", "ledger", "log", "listen", "data_dir"}.isdisjoint(LIVE)
