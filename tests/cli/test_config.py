"""`headgate config`, run as a process."""


def test_settings_without_a_file_are_valid(headgate) -> None:
    assert headgate.json("config", "validate") == {"valid": True}


def test_a_misspelt_setting_is_refused_with_what_was_meant(headgate) -> None:
    (headgate.folder / "headgate.toml").write_text("[queue]\ndeadlines_s = 5\n")
    code, said = headgate.refusal("config", "validate")
    assert code == 3
    assert "queue.deadline_s" in said


def test_what_is_in_force_is_environment_over_file_over_default(headgate) -> None:
    (headgate.folder / "headgate.toml").write_text('listen = "127.0.0.1:1"\n[queue]\ndeadline_s = 5\n')
    shown = headgate.json("config", "show", HEADGATE_QUEUE__DEADLINE_S="7")
    assert shown["listen"] == "127.0.0.1:1"
    assert shown["queue"]["deadline_s"] == 7
    assert shown["upstream"]["hold_s"] == 1


def test_no_secret_is_shown(headgate) -> None:
    secrets = {
        "ANTHROPIC_API_KEY": "sk-ant-verysecret",
        "HEADGATE_DATABASE_URL": "postgresql://headgate:verysecret@db/headgate",
        "HEADGATE_REDIS_URL": "redis://:verysecret@cache/0",
    }
    for arguments in (["config", "show"], ["config", "show", "--json"]):
        done = headgate(*arguments, **secrets)
        assert done.returncode == 0
        assert "verysecret" not in done.stdout + done.stderr
        assert "postgresql://headgate:***@db/headgate" in done.stdout


def test_tables_of_names_and_lists_are_shown_line_by_line(headgate) -> None:
    (headgate.folder / "headgate.toml").write_text(
        "[tiers.gold]\nrpm = 7\n"
        '[routing.fallbacks]\nclaude-opus-4-7 = ["claude-sonnet-4-6", "claude-haiku-4-5"]\nclaude-opus-5 = []\n'
        '[[experiments]]\nname = "e"\nmodel = "claude-sonnet-4-6"\n'
        'arms = [{ name = "a", model = "claude-sonnet-4-6" }, { name = "b", model = "claude-haiku-4-5", weight = 2 }]\n'
    )
    shown = dict(line.split(None, 1) for line in headgate("config", "show").stdout.splitlines() if " " in line)
    shown = {name: value.strip() for name, value in shown.items()}
    assert (shown["tiers.gold.rpm"], shown["tiers.free.rpm"], shown["tiers.free.model"]) == ("7", "20", "–")
    assert shown["routing.fallbacks.claude-opus-4-7"] == "claude-sonnet-4-6, claude-haiku-4-5"
    assert (shown["routing.fallbacks.claude-opus-5"], shown["routing.aliases"]) == ("–", "–")
    assert (shown["experiments.e.arms.b.model"], shown["experiments.e.arms.b.weight"]) == ("claude-haiku-4-5", "2.0")
