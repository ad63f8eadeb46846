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
