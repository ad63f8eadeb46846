"""`headgate plan`, run as a process."""

ARTICLE = ("plan", "--requests-per-day", "50000", "--system-tokens", "8000")


def test_the_articles_workload_and_the_plain_answer_to_its_claim(headgate) -> None:
    found = headgate.json(*ARTICLE)
    month = {one["model"]: one["prices"][1]["month_nanousd"] for one in found["models"]}
    assert month["claude-sonnet-4-6"] == 10_575 * 10**9
    assert found["holding"] == []
    assert found["verdict"].startswith("Nothing here holds it under $200.00 a month. The nearest is claude-haiku-5-5")
    text = headgate(*ARTICLE).stdout
    assert found["verdict"] in text.replace("\n", " ")
    assert "start" in text


def test_a_policy_that_holds_the_target_is_named(headgate) -> None:
    found = headgate.json(*ARTICLE, "--target-usd-month", "500")
    assert found["verdict"] == "claude-haiku-5-5 with 5m cache holds it under $500.00: $445.62 a month."
    assert found["models"][0]["requests_per_day_max"] > 50_000


def test_what_makes_no_sense_is_refused_in_a_line(headgate) -> None:
    for wrong in (("--conversation-turns", "0"), ("--counted-on", "gpt")):
        code, text = headgate.refusal(*ARTICLE, *wrong)
        assert code in (2, 4)
        assert text
