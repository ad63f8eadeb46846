"""The cache planner: requests of many kinds on every model against a validator that shares no code with it, and the
stories of apps that it was made for."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from random import Random
from typing import Any

import pytest

from headgate.policy.forecast import prefixes
from headgate.policy.prompt_cache import LIVE_MAX, MARKS_MAX, CachePlan, PromptCache
from headgate.simulator.errors import Rejected
from headgate.simulator.models import Catalogue, load_catalogue
from headgate.simulator.prompt import build_prompt
from headgate.simulator.validate import read_ask, read_body
from headgate.wire.catalog import Model, day_start_ns, packaged
from headgate.wire.message import scan
from headgate.wire.usage import Usage

CATALOG = packaged()
NOV = day_start_ns(date(2026, 11, 22))
SIMULATED = load_catalogue()
REVIVED = Catalogue(tuple(replace(model, lifecycle="active") for model in SIMULATED.models), SIMULATED.modifiers)
SONNET, HAIKU_4_5, HAIKU_5_5, OPUS_5_5 = "claude-sonnet-4-6", "claude-haiku-4-5", "claude-haiku-5-5", "claude-opus-5-5"

MARK_5M, MARK_1H = b',"cache_control":{"type":"ephemeral"}', b',"cache_control":{"type":"ephemeral","ttl":"1h"}'
WRAP = b'[{"type":"text","text":'

ENGLISH = "The customer may return goods within thirty days, unused and in their box, and is refunded in full. "
VIETNAMESE = "Khách hàng được trả hàng trong ba mươi ngày nếu còn nguyên hộp, và được hoàn tiền đầy đủ. "
CHINESE = "顾客可在三十天内退货，商品须未使用且包装完好，并获全额退款。"
CODE = "def refund(order: Order) -> Money:\n    return sum(line.price for line in order.lines)\n"
SPACES = " \n\t" * 30 + "x"

Json = dict[str, Any]


class App:
    """One app on one planner, with a clock of its own."""

    def __init__(self, model: str = SONNET, *, cache: PromptCache | None = None, ttl: Any = "auto") -> None:
        self.cache = cache or PromptCache(CATALOG, ttl=ttl)
        self.model = model
        self.now = 1_000.0

    def ask(self, after_s: float = 1.0, *, mark: bool = True, key: str = "key_1", **body: Any) -> CachePlan:
        self.now += after_s
        return self.send({"model": self.model, "max_tokens": 100, **body}, mark=mark, key=key)

    def send(self, body: Json | bytes, *, mark: bool = True, key: str = "key_1") -> CachePlan:
        raw = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
        return self.cache.plan(
            scan(raw), key_id=key, endpoint="messages", model=self.model, at_ns=NOV, now=self.now, mark=mark
        )

    def began(self, plan: CachePlan, **usage: int) -> None:
        self.cache.began(plan, model=self.model, usage=Usage(**usage), now=self.now)


def says(text: str) -> Json:
    return {"role": "user", "content": text}


def answers(text: str) -> Json:
    return {"role": "assistant", "content": text}


def block(text: str, **more: Any) -> Json:
    return {"type": "text", "text": text, **more}


def tool(name: str, words: int = 1) -> Json:
    return {"name": name, "description": ENGLISH * words, "input_schema": {"type": "object"}}


def chars(text: str, count: int) -> str:
    return (text * (count // len(text) + 1))[:count]


def marked(plan: CachePlan) -> list[str]:
    """Where the marks of a plan stand."""
    body = json.loads(plan.body)
    found = [f"tools.{at}" for at, each in enumerate(body.get("tools", [])) if "cache_control" in each]
    system = body.get("system")
    found += [
        f"system.{at}" for at, each in enumerate(system if isinstance(system, list) else []) if "cache_control" in each
    ]
    for number, message in enumerate(body["messages"]):
        if isinstance(message["content"], list):
            found += [
                f"messages.{number}.{at}" for at, each in enumerate(message["content"]) if "cache_control" in each
            ]
    return found + (["tail"] if "cache_control" in body else [])


# ---------------------------------------------------------------------- every request, every model


class Writer:
    """Requests of apps, by dice: what they share comes from small pools, so that it recurs."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = Random(seed)
        sizes = (1, 40, 600, 1_900, 2_300, 3_400, 4_600, 7_500, 9_500, 14_000, 19_000, 22_000)
        self.texts = [chars(text, size) for text in (ENGLISH, VIETNAMESE, CHINESE, CODE, SPACES) for size in sizes]
        self.texts += [" ", "\n\t", ENGLISH + CHINESE * 30, "Ω ≈ ç √ " * 200, "😀👩‍👧" * 300, '{"a": [1, "b"]}' * 200]
        dice.shuffle(self.texts)
        self.tools = [tool(f"t{at}", dice.choice((1, 3, 30, 60))) for at in range(6)]

    def requests(self, count: int) -> Iterator[bytes]:
        for number in range(count):
            yield self.spelled(self.request(number))

    def request(self, number: int) -> Json:
        dice = self.dice
        body: Json = {"model": "m", "max_tokens": dice.choice((1, 100, 100, 100))}
        own = dice.random() < 0.15
        if dice.random() < 0.75:
            body["system"] = self.system(number, own)
        if dice.random() < 0.4:
            body["tools"] = self.some_tools(own)
        body["messages"] = self.messages(own)
        if dice.random() < 0.1:
            body["stream"] = True
        if own and dice.random() < 0.3:
            body["cache_control"] = self.mark()
        if dice.random() < 0.02:
            body["max_tokens"] = 0
        members = list(body.items())
        if dice.random() < 0.5:
            dice.shuffle(members)
        return dict(members)

    def mark(self) -> Json:
        return self.dice.choice(
            ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}, {"type": "ephemeral", "ttl": "5m"})
        )

    def text(self, own: bool) -> Json:
        found = block(self.dice.choice(self.texts))
        if own and self.dice.random() < 0.4:
            found["cache_control"] = self.mark()
        return found

    def system(self, number: int, own: bool) -> Any:
        kind = self.dice.random()
        if kind < 0.4:
            return self.dice.choice(self.texts)
        if kind < 0.5:
            return f"Now: {number}. " + self.dice.choice(self.texts)
        return [self.text(own) for _ in range(self.dice.choice((0, 1, 1, 2, 3, 12)))]

    def some_tools(self, own: bool) -> list[Json]:
        tools = [dict(each) for each in self.tools[: self.dice.randint(0, 6)]]
        if self.dice.random() < 0.2:
            self.dice.shuffle(tools)
        if tools and self.dice.random() < 0.1:
            tools[-1]["defer_loading"] = True
        if own and tools and self.dice.random() < 0.5:
            tools[self.dice.randrange(len(tools))]["cache_control"] = self.mark()
        return tools

    def messages(self, own: bool) -> list[Json]:
        found = []
        for number in range(self.dice.choice((1, 1, 1, 1, 3, 5, 6))):
            if number % 2:
                thought = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
                content: Any = [*([thought] if self.dice.random() < 0.4 else []), self.text(own)]
                found.append({"role": "assistant", "content": content})
                continue
            if self.dice.random() < 0.5:
                found.append(says(self.dice.choice(self.texts)))
                continue
            source = self.dice.choice(
                (
                    {"type": "text", "media_type": "text/plain", "data": self.dice.choice(self.texts)},
                    {"type": "base64", "media_type": "application/pdf", "data": "QUJD" * 200},
                    {"type": "url", "url": "https://example.com/a.pdf"},
                )
            )
            image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
            extras = [{"type": "document", "source": source}, image, self.text(own)]
            found.append({"role": "user", "content": [*extras[: self.dice.randint(0, 3)], self.text(own)]})
        return found

    def spelled(self, body: Json) -> bytes:
        separators = self.dice.choice(((",", ":"), (", ", ": "), (" ,\n", " : "), (",\t", ":  ")))
        return json.dumps(body, ensure_ascii=self.dice.random() < 0.3, separators=separators).encode()


def kind(model: Model) -> tuple[Any, ...]:
    """All that the planner reads of a model."""
    price = CATALOG.price_row(model.id, NOV)
    ratios = (price.cache_read_nanousd, price.cache_write_5m_nanousd, price.cache_write_1h_nanousd)
    shares = tuple(each / price.input_nanousd for each in ratios)
    return (model.cache_min_tokens, model.tokenizer, model.released >= date(2026, 9, 1), shares)


KINDS = {kind(model): model for model in CATALOG.models}


class Judge:
    """Looks at a body that was sent, once for each minimum it was sent under."""

    def __init__(self) -> None:
        self.marks = 0
        self._prompts: dict[tuple[bytes, str], int] = {}

    def judge(self, model: Model, before: bytes, plan: CachePlan) -> None:
        if plan.body == before:
            assert not plan.marks
            return
        assert not scan(before).cache_marks
        least = self._prompts.get((plan.body, model.tokenizer))
        if least is None:
            least = self._prompts[plan.body, model.tokenizer] = self._look(model, before, plan)
        assert least >= model.cache_min_tokens
        self.marks += plan.marks

    def _look(self, model: Model, before: bytes, plan: CachePlan) -> int:
        """The tokens of the shortest prefix that is marked."""
        after = plan.body
        stripped = after.replace(MARK_5M, b"").replace(MARK_1H, b"")
        count = after.count(b'"cache_control":{"type":"ephemeral"')
        assert 1 <= count == plan.marks <= MARKS_MAX
        if stripped != before:
            system = scan(before).fields["system"]
            wrapped = before[: system.start] + WRAP + system.of(before) + b"}]" + before[system.end :]
            assert stripped == wrapped
        simulated = REVIVED.find(model.id)
        assert simulated is not None
        body = read_body(after)
        prompt = build_prompt(body, simulated, thinking="off", effort="high", speed="standard", betas=frozenset())
        accepted(before, after, model)
        return min(each.tokens for each in prompt.blocks if each.ttl)


def accepted(before: bytes, after: bytes, model: Model) -> None:
    """What the API took before, it takes after."""
    refusals = []
    for raw in (before, after):
        body = read_body(raw) | {"model": model.id}
        try:
            read_ask(body, version="2023-06-01", betas=None, catalogue=REVIVED, organization="o", purpose="message")
            refusals.append("")
        except Rejected as rejected:
            refusals.append(str(rejected.error.message))
    assert refusals[0] == refusals[1]


def judge_all(models: list[Model], count: int, seed: int) -> int:
    judge = Judge()
    scanned = [scan(raw) for raw in Writer(seed).requests(count)]
    cache = PromptCache(CATALOG)
    for at, request in enumerate(scanned):
        for model in models:
            key_id = f"{model.id}{at % 3}"
            plan = cache.plan(request, key_id=key_id, endpoint="e", model=model.id, at_ns=NOV, now=at * 7.0, mark=True)
            judge.judge(model, request.body, plan)
    return judge.marks


# 10,000 requests on every model take a minute: they are the drill below.
def test_no_request_on_any_kind_of_model_is_marked_too_often_too_short_or_wrongly() -> None:
    assert judge_all(list(KINDS.values()), 1_200, seed=1) > 1_500


def test_models_of_one_kind_are_planned_alike() -> None:
    cache = PromptCache(CATALOG)
    for at, raw in enumerate(Writer(2).requests(40)):
        request = scan(raw)
        for model in CATALOG.models:
            twin = KINDS[kind(model)]
            one, other = (
                cache.plan(request, key_id=f"{model.id}{who}", endpoint="e", model=name, at_ns=NOV, now=at, mark=True)
                for who, name in enumerate((model.id, twin.id))
            )
            assert one.body == other.body


@pytest.mark.drill
def test_ten_thousand_requests_on_every_model() -> None:
    assert judge_all(list(CATALOG.models), 10_000, seed=3) > 30_000


# ---------------------------------------------------------------------- stories


STATIC = chars(ENGLISH, 41_000)
"""Some 12,000 tokens on new models, 9,500 on old ones."""


def test_a_chat_with_one_static_prompt_has_one_mark_from_its_first_request_on() -> None:
    app = App()
    first, second = (app.ask(system=STATIC, messages=[says(word)]) for word in ("Hello", "What?"))
    for plan in (first, second):
        assert marked(plan) == ["system.0"]
        assert (plan.marks, plan.ttl) == (1, "5m")
        assert plan.prefix == first.prefix
        assert plan.family == first.family
    assert first.digest != second.digest
    assert first.prefixes == second.prefixes
    assert first.reasons == ("cache:system:5m:expected",)
    assert second.reasons == ("cache:system:5m:seen",)


def test_a_time_in_front_of_the_prompt_ends_its_marks_within_five_requests() -> None:
    app = App()
    plans = [
        app.ask(system=f"It is 2026-11-24T08:{at:02}:07.{at}31Z. " + STATIC, messages=[says("Hi")]) for at in range(20)
    ]
    assert [plan.marks for plan in plans] == [1, 1, 1] + [0] * 17
    assert plans[-1].reasons == ("cache:none:varies",)
    assert len({plan.family for plan in plans}) == 1
    assert len({plan.prefix for plan in plans}) == 20


def test_blocks_before_a_time_are_marked_while_the_time_is_not() -> None:
    app = App()
    plans = [
        app.ask(system=[block(STATIC), block(f"It is 08:{at}." + chars(ENGLISH, 9_000))], messages=[says("Hi")])
        for at in range(12)
    ]
    assert all("system.0" in marked(plan) for plan in plans)
    assert marked(plans[-1]) == ["system.0"]


def test_a_block_for_each_user_leaves_the_shared_one_marked() -> None:
    app = App()
    for at in range(30):
        plan = app.ask(system=[block(STATIC), block(f"The user is number {at}.")], messages=[says("Hi")])
        assert "system.0" in marked(plan)


def test_others_wait_for_the_shared_block_and_then_for_nobody_elses() -> None:
    app = App()
    plans = [app.ask(0, system=[block(STATIC), block(f"User {at}.")], messages=[says("Hi")]) for at in range(3)]
    assert plans[0].cold == plans[1].cold == plans[2].cold != b""
    app.began(plans[0], cache_write_5m_tokens=9_600, input_tokens=9)
    later = app.ask(1, system=[block(STATIC), block("User 3.")], messages=[says("Hi")])
    assert later.cold != plans[0].cold


def test_tools_in_another_order_are_one_family_and_are_not_marked_for_long() -> None:
    app = App()
    dice = Random(4)
    tools = [tool(f"look_{at}", 12) for at in range(7)]
    plans = []
    for _ in range(15):
        dice.shuffle(tools)
        plans.append(app.ask(tools=tools, system=STATIC, messages=[says("Hi")]))
    assert len({plan.family for plan in plans}) == 1
    assert all(plan.marks == 0 for plan in plans[6:])


def test_stable_tools_under_a_system_that_varies_get_the_mark() -> None:
    app = App()
    tools = [tool(f"look_{at}", 20) for at in range(9)]
    plans = [
        app.ask(tools=tools, system=f"Now: {at}. " + chars(ENGLISH, 9_000), messages=[says("Hi")]) for at in range(9)
    ]
    assert marked(plans[-1]) == ["tools.8"]
    alone = App().ask(tools=tools, messages=[says("Hi")])
    assert marked(alone) == ["tools.8"]


def test_tools_under_a_system_that_stays_have_no_mark_of_their_own() -> None:
    app = App()
    tools = [tool(f"look_{at}", 20) for at in range(9)]
    for _ in range(3):
        assert marked(app.ask(tools=tools, system=STATIC, messages=[says("Hi")])) == ["system.0"]


def test_a_document_that_is_asked_again_is_marked() -> None:
    app = App()
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": STATIC}}
    ask = [
        app.ask(system=STATIC, messages=[{"role": "user", "content": [document, block(f"Question {at}?")]}])
        for at in range(3)
    ]
    assert [marked(plan) for plan in ask] == [["system.0"], ["system.0", "messages.0.0"], ["system.0", "messages.0.0"]]
    assert ask[1].prefix == ask[2].prefix != ask[0].prefix


def test_a_conversation_has_a_moving_mark_from_its_second_turn_on() -> None:
    app = App()
    messages = [says("Question 0?")]
    plans = []
    for turn in range(6):
        plans.append(app.ask(20, system=STATIC, messages=messages))
        messages += [answers(f"Answer {turn}."), says(f"Question {turn + 1}?")]
    assert [marked(plan) for plan in plans] == [["system.0"], *[["system.0", "tail"]] * 5]
    # What the turn before ended with is known, so that a forecast can find it.
    assert plans[3].prefixes[-2] == plans[2].prefixes[-1]


def test_conversations_that_never_go_on_lose_their_moving_mark() -> None:
    app = App()
    example = [says("One?"), answers("Two.")]
    plans = [app.ask(system=STATIC, messages=[*example, says(f"Question {at}?")]) for at in range(9)]
    assert plans[0].tail
    assert not plans[-1].tail


def test_first_turns_are_marked_where_conversations_are_known_to_go_on() -> None:
    app = App()
    for number in range(12):
        messages = [says(f"Question of {number}?")]
        for turn in range(3):
            plan = app.ask(2, system=STATIC, messages=messages)
            messages += [answers(f"Answer {turn}."), says("And?")]
    assert plan.tail
    assert app.ask(system=STATIC, messages=[says("A new one?")]).tail


@pytest.mark.parametrize(("model", "marks"), [(SONNET, 1), (HAIKU_4_5, 0), (HAIKU_5_5, 1), ("claude-of-next-year", 0)])
def test_a_prompt_of_two_thousand_tokens_is_marked_where_the_model_takes_it(model: str, marks: int) -> None:
    plan = App(model).ask(system=chars(ENGLISH, 8_600), messages=[says("Hi")])
    assert plan.marks == marks
    assert plan.prefix
    assert bool(plan.cold) is bool(marks)
    assert plan.prefix_tokens == pytest.approx(2_000 if model in (SONNET, HAIKU_4_5) else 2_529, rel=0.01)


def test_a_mark_that_did_nothing_is_not_made_again() -> None:
    app = App()
    system = chars(ENGLISH, 6_000)
    plan = app.ask(system=system, messages=[says("Hi")])
    assert plan.marks == 1
    app.began(plan, input_tokens=1_400)
    after = app.ask(system=system, messages=[says("Hi")])
    assert (after.marks, after.cold, after.body.count(b"cache_control")) == (0, b"", 0)


def test_what_anthropic_counted_replaces_the_estimate() -> None:
    app = App()
    system = chars(CODE, 4_100)
    assert app.ask(system=system, messages=[says("Hi")]).marks == 0, "too short by a careful estimate"
    longer = app.ask(system=system * 2, messages=[says("Hi")])
    app.began(longer, cache_write_5m_tokens=3_000, input_tokens=10)
    assert app.ask(system=system * 2, messages=[says("Hi")]).prefix_tokens == 3_000
    assert app.ask(system=system, messages=[says("Hi")]).family == longer.family
    assert app.ask(system=system, messages=[says("Hi")]).marks == 1, "its family has more tokens than was thought"


def test_a_prefix_is_cold_until_an_answer_began_and_again_when_it_has_died() -> None:
    app = App()
    plan = app.ask(system=STATIC, messages=[says("Hi")])
    assert plan.cold
    assert app.ask(system=STATIC, messages=[says("Ho")]).cold == plan.cold
    app.began(plan, cache_write_5m_tokens=9_600)
    assert app.ask(system=STATIC, messages=[says("Ho")]).cold == b""
    assert app.ask(290, system=STATIC, messages=[says("Ho")]).cold == b""
    assert app.ask(10, system=STATIC, messages=[says("Ho")]).cold == plan.cold
    elsewhere = App(HAIKU_5_5, cache=app.cache)
    elsewhere.now = app.now
    assert elsewhere.ask(system=STATIC, messages=[says("Ho")]).cold not in (b"", plan.cold)


def test_a_callers_marks_and_bytes_stay_and_its_prefix_is_known() -> None:
    app = App()
    mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    system = [block(STATIC, **mark), block("You speak to Ann.")]
    body = {"model": SONNET, "max_tokens": 9, "system": system, "messages": [says("Hi")]}
    raw = json.dumps(body, indent=3).encode()
    plan = app.send(raw)
    assert (plan.body, plan.marks, plan.ttl, plan.reasons) == (raw, 0, "1h", ("cache:caller",))
    assert plan.prefixes == prefixes(scan(raw)) != ()
    assert plan.cold
    system[1]["text"] = "You speak to Bob."
    other = app.send(json.dumps(body, indent=3).encode())
    assert (other.prefix, other.cold) == (plan.prefix, plan.cold)
    app.began(plan, cache_write_1h_tokens=9_600)
    app.now += 3_000
    assert app.send(json.dumps(body, indent=3).encode()).cold == b""


def test_a_mark_whose_key_is_escaped_is_a_callers_mark() -> None:
    raw = json.dumps({"model": SONNET, "max_tokens": 9, "system": STATIC, "messages": [says("Hi")]}).encode()
    spelled = raw.replace(b'"content"', b'"cache_\\u0063ontrol": null, "content"')
    assert App().send(spelled).body == spelled


def test_without_the_planner_all_but_the_marks_is_told() -> None:
    on, off = App(), App()
    with_marks = on.ask(system=STATIC, messages=[says("Hi")])
    without = off.ask(mark=False, system=STATIC, messages=[says("Hi")])
    assert without.body == without.body.replace(b"cache_control", b"")
    for name in ("prefix", "prefix_tokens", "digest", "family"):
        assert getattr(without, name) == getattr(with_marks, name)
    assert (without.marks, without.cold, without.prefixes) == (0, b"", ())


def test_equal_requests_have_equal_digests_and_no_others() -> None:
    app = App()
    one, same = (app.ask(system=STATIC, messages=[says("Hi")]) for _ in range(2))
    others = [
        app.ask(system=STATIC, messages=[says("Hi ")]),
        app.ask(system=STATIC + " ", messages=[says("Hi")]),
        app.ask(system=STATIC, messages=[says("Hi")], stream=True),
        app.ask(system=STATIC, messages=[says("Hi")], tools=[]),
    ]
    assert one.digest == same.digest
    assert len({one.digest, *(other.digest for other in others)}) == 5


def test_a_warming_request_passes_and_teaches_nothing() -> None:
    app = App()
    for _ in range(9):
        plan = app.ask(1_000, system=STATIC, messages=[says("Hi")], max_tokens=0)
        assert plan.marks == 0
    assert app.cache.families()[0].uses == 0


@pytest.mark.parametrize(("model", "system_stays"), [(OPUS_5_5, True), (SONNET, False)])
def test_a_string_system_stays_one_where_thinking_is_bound_to_it(model: str, system_stays: bool) -> None:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
    turns = [says("Hi"), {"role": "assistant", "content": [thought, block("Ho")]}, says("And?")]
    plan = App(model).ask(system=STATIC, messages=turns)
    assert isinstance(json.loads(plan.body)["system"], str) is system_stays
    assert "tail" in marked(plan)


@pytest.mark.parametrize("system", ["", "  \n", [], [block(" ")], None, 7, {"a": 1}, [7], [{"text": "no type"}]])
def test_what_cannot_be_marked_is_not(system: Any) -> None:
    plan = App().ask(system=system, messages=[says("Hi")])
    assert plan.marks == 0


def test_uses_an_hour_apart_are_not_marked_and_uses_ten_minutes_apart_for_an_hour() -> None:
    rare, often = App(), App()
    seldom = [rare.ask(7_000, system=STATIC, messages=[says("Hi")]) for _ in range(12)]
    assert [plan.marks for plan in seldom[4:]] == [0] * 8
    plans = [often.ask(600, system=STATIC, messages=[says("Hi")]) for _ in range(40)]
    assert (plans[-1].ttl, plans[-1].marks) == ("1h", 1)
    assert MARK_1H in plans[-1].body
    assert often.cache.families()[0].reason.startswith("1h: ")


@pytest.mark.parametrize("ttl", ["5m", "1h"])
def test_a_ttl_that_is_set_is_that_of_all_marks(ttl: str) -> None:
    app = App(ttl=ttl)
    messages = [says("Hi"), answers("Ho"), says("And?")]
    plan = app.ask(system=STATIC, messages=messages)
    assert plan.body.count(MARK_1H if ttl == "1h" else MARK_5M) == plan.marks == 2


def test_keys_and_endpoints_learn_apart() -> None:
    app = App()
    for at in range(9):
        app.ask(system=f"{at} " + STATIC, messages=[says("Hi")])
    assert app.ask(system="9 " + STATIC, messages=[says("Hi")]).marks == 0
    assert app.ask(key="key_2", system="9 " + STATIC, messages=[says("Hi")]).marks == 1


def test_a_family_has_its_name_also_after_a_restart() -> None:
    names = {
        App().ask(system=f"It is 08:{at}:00 on day {at}. " + STATIC, messages=[says("Hi")]).family for at in range(9)
    }
    assert len(names) == 1


def test_memory_is_bounded() -> None:
    app = App()
    for at in range(300):
        plan = app.ask(key=f"k{at}", system=f"{at:06}" + chars(ENGLISH, 150_000), messages=[says("Hi")])
        app.began(plan, cache_write_5m_tokens=40_000)
    assert app.cache._systems._bytes <= 12 << 20
    assert len(app.cache._live) <= LIVE_MAX
