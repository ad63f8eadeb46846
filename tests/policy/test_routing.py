"""Which model a request goes to and who may answer instead: the rules as tables, and what holds whatever the rules."""

import json
from importlib import resources

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.experiments import Arm, Experiment
from headgate.policy.fallback import is_dearer, rewrite
from headgate.policy.records import Plan
from headgate.policy.routing import Router, RoutingRules
from headgate.policy.token_estimate import input_tokens
from headgate.wire.catalog import day_start_ns, load_catalog, packaged
from headgate.wire.message import InvalidBody, scan

CATALOG = packaged()
SONNET, HAIKU, OPUS = "claude-sonnet-4-6", "claude-haiku-4-5", "claude-opus-4-7"
HAIKU_DATED = "claude-haiku-4-5-20251001"
NEW_SONNET, NEW_HAIKU = "claude-sonnet-5-5", "claude-haiku-5-5"
AT_NS = day_start_ns(CATALOG.as_of)

TIERS = {"free": "", "paid": "", "premium": OPUS}
BASE = RoutingRules(default_model=SONNET, fallback=HAIKU, tier_models=TIERS)
A_B = Experiment(name="e", model=SONNET, arms=(Arm("a", SONNET), Arm("b", HAIKU)))


def body(model: str = SONNET, **fields) -> bytes:
    fields = {"max_tokens": 1024, "x": 1.0, "messages": [{"role": "user", "content": "hi"}]} | fields
    return b'{"model": %b, "stream":true, %b' % (json.dumps(model).encode(), json.dumps(fields).encode()[1:])


def route(rules: RoutingRules = BASE, model: str = SONNET, *, fields: dict | None = None, catalog=CATALOG, **who):
    who = {
        "principal_models": (),
        "tier": "free",
        "endpoint": "messages",
        "conversation": "",
        "user": "an",
        "received_at": 100.0,
        "at_ns": AT_NS,
        "deadline_s": 20.0,
    } | who
    return Router(rules, catalog).route(scan(body(model, **(fields or {}))), **who)


def rules(**changes) -> RoutingRules:
    return msgspec.structs.replace(BASE, **changes)


def arm_of(unit: str) -> str:
    """The arm of A_B that a unit is in."""
    return route(rules(experiments=(A_B,)), conversation=unit).arm.removeprefix("e:")


UNIT = {arm: next(unit for unit in map(str, range(99)) if arm_of(unit) == arm) for arm in ("a", "b")}
"""A conversation of each arm."""


# the common case


def test_a_plan_is_what_the_body_asks_for():
    request = scan(body())
    made = Router(BASE, CATALOG).route(
        request,
        principal_models=(),
        tier="free",
        endpoint="messages",
        conversation="",
        user="an",
        received_at=100.0,
        at_ns=AT_NS,
        deadline_s=20.0,
    )
    assert made.models == (SONNET, HAIKU)
    assert made.body is request.body
    assert made.streamed
    assert made.max_tokens == 1024
    assert made.deadline == 120.0
    assert made.input_tokens_estimate == input_tokens(request) > 0
    assert (made.model_asked, made.arm, made.reasons) == (SONNET, "", ())


ASKED = {"principal_models": (), "tier": "", "endpoint": "", "conversation": "", "user": "", "at_ns": AT_NS}


def planned(sent: bytes) -> Plan:
    return Router(BASE, CATALOG).route(scan(sent), **ASKED, received_at=0.0, deadline_s=1.0)


def test_without_rules_only_the_model_that_is_asked_for_answers():
    made = route(RoutingRules(default_model=SONNET))
    assert (made.models, made.reasons) == ((SONNET,), ())


def test_a_request_without_stream_and_max_tokens_is_planned_all_the_same():
    made = planned(b'{"model":"m"}')
    assert (made.streamed, made.max_tokens) == (False, 0)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b'{"stream":true}', "model: Field required"),
        (b'{"model":7}', "model: Input should be a valid string"),
        (b'{"model":"m","stream":1}', "stream: Input should be a valid boolean"),
        (b'{"model":"%b"}' % (b"m" * 257), "at most 256 characters"),
    ],
)
def test_what_is_no_request_is_refused_in_the_words_of_the_api(sent, said):
    with pytest.raises(InvalidBody, match=said):
        planned(sent)


# names


@pytest.mark.parametrize(
    ("asked", "model"),
    [("fast", HAIKU), ("smart", OPUS), ("default", SONNET), (SONNET, SONNET), ("claude-next-1", "claude-next-1")],
)
def test_an_alias_is_the_model_it_stands_for_and_no_other_byte_changes(asked, model):
    ruled = rules(aliases={"fast": HAIKU, "smart": OPUS})
    made = route(ruled, asked)
    assert made.models[0] == Router(ruled, CATALOG).resolve(asked) == model
    assert made.body == Router(ruled, CATALOG).resolved_body(scan(body(asked))) == body(model)
    assert made.model_asked == asked
    assert made.reasons == ((f"alias:{asked}",) if asked != model else ())


def test_an_alias_changes_the_name_alone_also_where_the_model_would_refuse_the_rest():
    thinking = {"thinking": {"type": "adaptive"}}
    made = route(rules(aliases={"fast": HAIKU}), "fast", fields=thinking)
    assert made.body == body(HAIKU, **thinking)


def test_a_body_with_an_alias_may_be_written_in_any_way():
    request = scan(b' {\n "stream" : false , "mod\\u0065l" :\t"def\\u0061ult" , "messages":[]} ')
    assert Router(BASE, CATALOG).resolved_body(request) == (
        b' {\n "stream" : false , "mod\\u0065l" :\t"claude-sonnet-4-6" , "messages":[]} '
    )


# precedence

ENDPOINTS = {"classify": HAIKU, "deep": OPUS}


@pytest.mark.parametrize(
    ("asked", "tier", "endpoint", "model", "reasons"),
    [
        (SONNET, "free", "messages", SONNET, ()),
        (SONNET, "premium", "messages", OPUS, ("tier:premium",)),
        ("default", "premium", "messages", OPUS, ("alias:default", "tier:premium")),
        (HAIKU, "premium", "messages", HAIKU, ()),  # not the default model: asked for on purpose
        (SONNET, "nonesuch", "messages", SONNET, ()),
        (SONNET, "free", "classify", HAIKU, ("endpoint:classify",)),
        (OPUS, "free", "classify", HAIKU, ("endpoint:classify",)),
        (SONNET, "premium", "classify", HAIKU, ("endpoint:classify",)),  # the label wins over the tier
        ("smart", "free", "classify", HAIKU, ("alias:smart", "endpoint:classify")),
        ("smart", "premium", "deep", OPUS, ("alias:smart", "endpoint:deep")),
    ],
)
def test_the_label_comes_before_the_tier_and_the_tier_before_the_default(asked, tier, endpoint, model, reasons):
    made = route(rules(endpoints=ENDPOINTS, aliases={"smart": OPUS}), asked, tier=tier, endpoint=endpoint)
    assert (made.models[0], made.reasons) == (model, reasons)
    assert made.body == body(model)
    assert made.model_asked == asked


def test_a_tier_that_nobody_named_is_the_free_one():
    free_to_opus = rules(tier_models={"free": OPUS, "paid": ""})
    assert route(free_to_opus, tier="nonesuch").models[0] == OPUS
    assert route(free_to_opus, tier="paid").models[0] == SONNET


@pytest.mark.parametrize(
    ("asked", "tier", "endpoint", "arm"),
    [
        (SONNET, "free", "messages", "e:b"),
        ("default", "free", "messages", "e:b"),
        (OPUS, "free", "messages", ""),
        (HAIKU, "free", "messages", ""),
        (SONNET, "premium", "messages", ""),  # goes to Opus, which nothing is tried with
        (OPUS, "free", "as-sonnet", "e:b"),
        (SONNET, "free", "classify", ""),
    ],
)
def test_an_experiment_is_on_the_model_that_a_request_would_go_to(asked, tier, endpoint, arm):
    ruled = rules(experiments=(A_B,), endpoints=ENDPOINTS | {"as-sonnet": SONNET})
    made = route(ruled, asked, tier=tier, endpoint=endpoint, conversation=UNIT["b"])
    assert made.arm == arm
    if arm:
        assert made.models[0] == HAIKU
        assert made.body == body(HAIKU)
        assert made.reasons[-1] == "arm:e:b"


def test_the_arm_that_stays_keeps_every_byte():
    made = route(rules(experiments=(A_B,)), conversation=UNIT["a"])
    assert (made.arm, made.models, made.body) == ("e:a", (SONNET, HAIKU), body())


def test_an_experiment_at_an_endpoint_wins_over_one_everywhere():
    at_chat = Experiment(name="f", model=SONNET, endpoint="chat", arms=(Arm("x", HAIKU), Arm("y", OPUS)))
    ruled = rules(experiments=(A_B, at_chat))
    assert route(ruled, endpoint="chat").arm.startswith("f:")
    assert route(ruled, endpoint="other").arm.startswith("e:")
    assert route(rules(experiments=(at_chat,)), endpoint="other").arm == ""


def test_a_premium_person_may_be_in_an_experiment_on_the_premium_model():
    on_opus = Experiment(name="o", model=OPUS, arms=(Arm("down", SONNET), Arm("off", OPUS, 0)))
    made = route(rules(experiments=(on_opus,)), tier="premium")
    assert (made.arm, made.models[0], made.body) == ("o:down", SONNET, body())
    assert made.reasons == ("tier:premium", "arm:o:down")


def test_a_model_is_the_same_by_all_of_its_names():
    ruled = RoutingRules(
        default_model=HAIKU_DATED,
        tier_models=TIERS,
        fallbacks={HAIKU: ()},
        experiments=(Experiment(name="h", model=HAIKU_DATED, arms=(Arm("a", HAIKU_DATED), Arm("b", HAIKU_DATED))),),
    )
    assert route(ruled, HAIKU, tier="premium").models[0] == OPUS
    made = route(ruled, HAIKU)
    assert (made.arm[:2], made.models, made.body) == ("h:", (HAIKU,), body(HAIKU))


# stickiness


@given(conversation=st.text(min_size=1), user=st.text(), other=st.text())
def test_a_conversation_keeps_its_arm_whoever_speaks(conversation, user, other):
    ruled = rules(experiments=(A_B,))
    assert (
        route(ruled, conversation=conversation, user=user).arm
        == route(ruled, conversation=conversation, user=other, fields={"max_tokens": 7}).arm
        != ""
    )


@given(user=st.text(min_size=1))
def test_a_person_keeps_the_arm_where_there_is_no_conversation(user):
    ruled = rules(experiments=(A_B,))
    assert route(ruled, user=user).arm == route(ruled, user=user, received_at=5.0, at_ns=AT_NS + 7).arm != ""


def test_who_cannot_be_told_apart_has_no_arm():
    assert route(rules(experiments=(A_B,)), user="").arm == ""


# what cannot be moved


def test_a_request_that_does_not_fit_stays_where_it_was_asked_for_and_says_why():
    prefill = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "{"}]}
    made = route(rules(endpoints={"deep": OPUS}), HAIKU, endpoint="deep", fields=prefill)
    assert (made.models[0], made.body) == (HAIKU, body(HAIKU, **prefill))
    assert made.reasons == (f"unfit:{OPUS}:prefill",)


@pytest.mark.parametrize("unit", ["a", "b"])
def test_a_request_that_one_arm_could_not_take_is_in_none(unit):
    # Or the arm that can would be given all the hard ones.
    forced = {"tools": [{"name": "t", "input_schema": {}}], "tool_choice": {"type": "any"}}
    to_new = Experiment(name="e", model=SONNET, arms=(Arm("a", SONNET), Arm("b", NEW_SONNET)))
    made = route(rules(experiments=(to_new,)), conversation=UNIT[unit], fields=forced)
    assert (made.arm, made.models[0], made.body) == ("", SONNET, body(**forced))
    assert made.reasons == (f"no_arm:e:{NEW_SONNET}:forced_tool_choice",)


def test_a_body_for_another_model_is_what_fallback_makes_of_it():
    thinking = {"thinking": {"type": "adaptive"}}
    made = route(rules(experiments=(A_B,)), conversation=UNIT["b"], fields=thinking)
    expected = rewrite(
        scan(body(**thinking)), source=SONNET, target=HAIKU, catalog=CATALOG, input_tokens=1, at_ns=AT_NS
    )
    assert made.body == expected != body(HAIKU, **thinking)


def test_a_turn_under_way_goes_on_with_the_model_that_began_it():
    under_way = {
        "tools": [{"name": "t", "input_schema": {}}],
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "", "signature": "s"},
                    {"type": "tool_use", "id": "1", "name": "t", "input": {}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "b"}]},
        ],
    }
    made = route(tier="premium", fields=under_way)
    assert (made.models[0], b'"signature"' in made.body) == (OPUS, True)


@pytest.mark.parametrize("field", ["container", "thread", "previous_message_id"])
@pytest.mark.parametrize("asked", [SONNET, "default"])
def test_a_request_with_state_at_anthropic_stays_and_has_no_fallback(field, asked):
    ruled = rules(experiments=(A_B,), endpoints=ENDPOINTS)
    for who in ({"tier": "premium"}, {"endpoint": "classify"}, {"conversation": UNIT["b"]}):
        made = route(ruled, asked, fields={field: "id"}, **who)
        assert (made.models, made.arm, made.body) == ((SONNET,), "", body(**{field: "id"}))
        assert made.reasons[-1] == "server_state"


# keys that may use some models


@pytest.mark.parametrize(
    ("models", "who", "expected"),
    [
        ((SONNET,), {}, (SONNET,)),
        ((SONNET, HAIKU), {}, (SONNET, HAIKU)),
        ((SONNET, HAIKU_DATED), {}, (SONNET, HAIKU)),
        ((SONNET,), {"tier": "premium"}, (SONNET,)),
        ((SONNET, OPUS), {"tier": "premium"}, (OPUS,)),
        ((SONNET,), {"endpoint": "classify"}, (SONNET,)),
        ((SONNET, OPUS), {"endpoint": "classify", "tier": "premium"}, (OPUS,)),  # the label's step is left out
        ((SONNET,), {"conversation": UNIT["b"]}, (SONNET,)),
        ((SONNET,), {"conversation": UNIT["a"]}, (SONNET,)),
        ((SONNET, HAIKU), {"conversation": UNIT["b"]}, (HAIKU,)),
    ],
)
def test_a_key_is_never_sent_to_a_model_it_may_not_use(models, who, expected):
    ruled = rules(endpoints=ENDPOINTS, experiments=(A_B,) if "conversation" in who else ())
    made = route(ruled, principal_models=models, **who)
    assert made.models == expected
    assert bool(made.arm) == (HAIKU in models and "conversation" in who)


# who may answer instead


@pytest.mark.parametrize(
    ("changes", "asked", "instead"),
    [
        ({}, SONNET, (HAIKU,)),
        ({}, OPUS, (HAIKU,)),
        ({}, HAIKU, ()),
        ({}, HAIKU_DATED, ()),
        ({}, NEW_HAIKU, ()),  # costs less than the fallback
        ({}, "claude-next-1", ()),
        ({"fallback": ""}, SONNET, ()),
        ({"fallback": OPUS}, SONNET, ()),
        ({"fallbacks": {SONNET: ()}}, SONNET, ()),
        ({"fallbacks": {SONNET: ()}}, OPUS, (HAIKU,)),
        ({"fallbacks": {OPUS: (SONNET, HAIKU)}}, OPUS, (SONNET, HAIKU)),
        ({"fallbacks": {OPUS: (HAIKU, SONNET)}}, OPUS, (HAIKU, SONNET)),
        ({"fallbacks": {OPUS: (OPUS, "claude-opus-4-6")}}, OPUS, ("claude-opus-4-6",)),
        ({"fallbacks": {HAIKU_DATED: (NEW_HAIKU,)}}, HAIKU, (NEW_HAIKU,)),
    ],
)
def test_who_answers_instead_is_neither_the_model_itself_nor_a_dearer_one(changes, asked, instead):
    assert route(rules(**changes), asked).models == (asked, *instead)


def test_the_chain_is_that_of_the_model_a_request_is_sent_to():
    ruled = rules(fallbacks={OPUS: (SONNET,)})
    assert route(ruled, tier="premium").models == (OPUS, SONNET)


def test_whether_a_model_is_dearer_is_asked_of_the_day():
    text = (
        (b"effective_from = 2025-10-15, ", b"effective_from = 2025-10-15, effective_to = 2027-01-01, "),
        (
            b'cache_read = 0.10, output = 5.0, source = "docs-2026-08" },\n',
            b'cache_read = 0.10, output = 5.0, source = "docs-2026-08" },\n'
            b'  { effective_from = 2027-01-01, speed = "standard", prompt_over = 0, input = 4.0, cache_write_5m = 5.0, '
            b'cache_write_1h = 8.0, cache_read = 0.40, output = 20.0, source = "docs-2026-08" },\n',
        ),
    )
    data = resources.files("headgate.wire").joinpath("catalog.toml").read_bytes()
    for before, after in text:
        assert data.count(before) == 1
        data = data.replace(before, after)
    catalog = load_catalog(data)
    new_year = day_start_ns(catalog.as_of.replace(year=2027, month=1, day=1))
    assert route(catalog=catalog, at_ns=new_year - 1).models == (SONNET, HAIKU)
    assert route(catalog=catalog, at_ns=new_year).models == (SONNET,)
    assert route(catalog=catalog, at_ns=new_year, model=OPUS).models == (OPUS, HAIKU)


# what holds whatever the rules

NAMES = sorted(name for model in CATALOG.models if model.status != "retired" for name in (model.id, *model.aliases))
names = st.sampled_from(NAMES)
experiments = st.builds(
    lambda model, arms, endpoint: Experiment(
        name="e", model=model, endpoint=endpoint, arms=tuple(Arm(f"arm{n}", *arm) for n, arm in enumerate(arms))
    ),
    names,
    st.lists(st.tuples(names, st.sampled_from([0.5, 1.0, 3.0])), min_size=2, max_size=3),
    st.sampled_from(["", "chat"]),
)
all_rules = st.builds(
    RoutingRules,
    default_model=names,
    fallback=st.just("") | names,
    fallbacks=st.dictionaries(names, st.lists(names, max_size=3).map(tuple), max_size=3),
    aliases=st.dictionaries(st.sampled_from(["fast", "smart"]), names),
    endpoints=st.dictionaries(st.sampled_from(["chat", "classify"]), names),
    tier_models=st.fixed_dictionaries({"free": st.just("") | names, "premium": st.just("") | names}),
    experiments=st.lists(experiments, max_size=1).map(tuple),
)
everybody = st.fixed_dictionaries(
    {
        "principal_models": st.just(()) | st.lists(names, max_size=4).map(tuple),
        "tier": st.sampled_from(["free", "premium", "x"]),
        "endpoint": st.sampled_from(["messages", "chat", "classify"]),
        "conversation": st.sampled_from(["", "c1", "c2"]),
        "user": st.sampled_from(["an", "binh"]),
    }
)
requests = st.fixed_dictionaries(
    {},
    optional={
        "container": st.just("c"),
        "thinking": st.sampled_from([{"type": "adaptive"}, {"type": "disabled"}]),
        "tool_choice": st.just({"type": "any"}),
        "temperature": st.just(0.5),
    },
)


def same(model: str) -> str:
    return CATALOG.resolve(model).id


@given(all_rules, names | st.sampled_from(["fast", "smart", "default", "claude-next-1"]), everybody, requests)
def test_whatever_the_rules(ruled, asked, who, fields):
    made = route(ruled, asked, fields=fields, **who)
    router = Router(ruled, CATALOG)
    resolved = router.resolve(asked)
    allowed = {same(model) for model in who["principal_models"]}

    # The body is for the first model, and valid JSON with everything else that was there at the top.
    sent = json.loads(made.body)
    assert sent["model"] == made.models[0]
    assert sent["messages"] == [{"role": "user", "content": "hi"}]
    if made.models[0] == asked:
        assert made.body == body(asked, **fields)

    # A key goes to a model it asked for or may use, and nowhere else.
    if allowed:
        assert made.models[0] == resolved or same(made.models[0]) in allowed
        assert all(same(model) in allowed for model in made.models[1:])

    # Nobody dearer answers, nobody twice for himself, nobody for state or for what is not known.
    assert not any(is_dearer(made.models[0], model, CATALOG, AT_NS) for model in made.models[1:])
    if CATALOG.resolve(made.models[0]):
        assert same(made.models[0]) not in [same(model) for model in made.models[1:]]
    if "container" in fields or CATALOG.resolve(made.models[0]) is None:
        assert made.models == (made.models[0],)
    if "container" in fields:
        assert (made.models[0], made.arm) == (resolved, "")

    # Precedence, told once more from the other end.
    moved_by = [reason.partition(":")[0] for reason in made.reasons]
    assert moved_by == [
        one for one in ("alias", "server_state", "endpoint", "unfit", "tier", "no_arm", "arm") if one in moved_by
    ]
    assert not {"endpoint", "tier"} <= set(moved_by)
    assert bool(made.arm) == ("arm" in moved_by)
    if same_or_none(made.models[0]) != same_or_none(resolved):
        assert {"endpoint", "tier", "arm"} & set(moved_by)
    assert made == route(ruled, asked, fields=fields, **who)


def same_or_none(model: str) -> str | None:
    known = CATALOG.resolve(model)
    return known.id if known else None
