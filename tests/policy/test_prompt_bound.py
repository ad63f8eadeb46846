"""What a prompt can have at most, against what is known of files and of text."""

import json

from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.prompt_bound import (
    ELSEWHERE_TOKENS,
    IMAGE_TOKENS,
    TOKENS_BESIDE_TEXT,
    WEB_SEARCHES,
    cache_writes,
    prompt_tokens_max,
    prompt_tokens_max_of,
    web_searches_max,
)
from headgate.policy.token_estimate import input_tokens
from headgate.wire.message import scan


def body_of(*blocks: dict, **more) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": list(blocks)}], **more}).encode()


def most(body: bytes) -> int:
    return prompt_tokens_max(body, input_tokens(scan(body)))


def file(kind: str, **source: str) -> dict:
    return {"type": kind, "source": source}


@given(st.text(max_size=2_000))
def test_text_is_bounded_by_its_estimate_and_its_bytes(text):
    body = body_of({"type": "text", "text": text})
    tokens = most(body) - TOKENS_BESIDE_TEXT
    assert tokens == min(len(body), 2 * input_tokens(scan(body)))
    assert prompt_tokens_max_of(input_tokens(scan(body))) >= most(body)


def test_an_image_of_few_bytes_can_have_the_tokens_of_a_large_one():
    small = file("image", type="base64", media_type="image/png", data="A" * 300)
    assert most(body_of(small)) >= IMAGE_TOKENS
    assert most(body_of(small, small)) >= 2 * IMAGE_TOKENS
    assert most(body_of(file("image", type="url", url="https://a.example/b.png"))) >= IMAGE_TOKENS


def test_the_pages_of_a_document_are_counted_by_its_bytes_and_of_one_elsewhere_by_what_is_common():
    page_bytes = 13_000
    pdf = file("document", type="base64", media_type="application/pdf", data="A" * (10 * page_bytes))
    assert most(body_of(pdf)) >= 10 * 4_000
    assert most(body_of(file("document", type="url", url="https://a.example/b.pdf"))) >= ELSEWHERE_TOKENS
    assert most(body_of(file("document", type="file", file_id="file_1"))) >= ELSEWHERE_TOKENS


def test_a_conversation_that_anthropic_holds_is_counted_too():
    assert most(body_of({"type": "text", "text": "a"}, previous_message_id="msg_1")) >= ELSEWHERE_TOKENS


def test_searches_are_counted_for_who_has_the_tool():
    with_tool = body_of({"type": "text", "text": "a"}, tools=[{"type": "web_search_20260209", "name": "web_search"}])
    assert web_searches_max(with_tool) == WEB_SEARCHES
    assert web_searches_max(body_of({"type": "text", "text": "web_search"})) == 0


def test_the_dearest_write_is_that_of_the_marks_however_they_are_spelled():
    hello = {"type": "text", "text": "Xin chào"}
    mark = {"type": "ephemeral"}
    assert cache_writes(body_of(hello)) == "none"
    assert cache_writes(body_of(hello | {"cache_control": mark})) == "5m"
    assert cache_writes(body_of(hello, cache_control=mark | {"ttl": "1h"})) == "1h"
    assert cache_writes(body_of(hello, cache_control=mark).replace(b"cache_c", b"cache_\\u0063")) == "1h"
