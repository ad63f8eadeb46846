"""Who may be let in: scopes and models of a key."""

import pytest

from headgate.policy.admission import admit
from headgate.policy.records import Admitted, Principal, Refused


def principal(*scopes: str, models: tuple[str, ...] = ()) -> Principal:
    return Principal(key_id="k", user="an", scopes=frozenset(scopes), models=models)


@pytest.mark.parametrize(
    ("held", "asked", "let_in"),
    [
        ("messages", "messages", True),
        ("app", "messages", True),
        ("app", "batch", False),
        ("messages", "app", False),
        ("messages", "batch", False),
        ("batch", "batch", True),
        ("batch", "messages", False),
        ("admin:read", "messages", False),
        ("admin:write", "admin:read", False),
        ("admin:read", "admin:read", True),
    ],
)
def test_a_key_opens_what_its_scope_names(held, asked, let_in):
    decision = admit(principal(held), scope=asked, model="m")
    assert isinstance(decision, Admitted) == let_in
    if not let_in:
        assert (decision.status, decision.error_type, decision.error_code) == (403, "permission_error", "scope_missing")
        assert asked in decision.message
        assert decision.retry_after_s is None


def test_a_key_without_a_scope_opens_nothing():
    assert isinstance(admit(principal(), scope="messages", model=None), Refused)


@pytest.mark.parametrize(
    ("model", "let_in"), [("haiku", True), ("sonnet", True), ("opus", False), ("", False), (None, True)]
)
def test_a_key_for_some_models_opens_those_alone_and_requests_about_none(model, let_in):
    decision = admit(principal("messages", models=("haiku", "sonnet")), scope="messages", model=model)
    assert isinstance(decision, Admitted) == let_in
    if not let_in:
        assert decision.error_code == "model_not_allowed"
        assert "haiku, sonnet" in decision.message


def test_a_key_without_a_list_of_models_opens_all():
    assert admit(principal("messages"), scope="messages", model="anything") == Admitted()
