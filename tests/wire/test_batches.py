"""Laws of batches as they pass: results lead back to the gateway, and nothing else is touched."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.wire.batches import rewrite_results_urls

GATEWAY = "https://gateway.example.com:8443"
RESULTS = "https://api.anthropic.com/v1/messages/batches/msgbatch_01/results"
MOVED = f"{GATEWAY}/v1/messages/batches/msgbatch_01/results"


def test_one_batch_leads_back_to_the_gateway_and_every_other_byte_stays():
    body = b'{ "id":"msgbatch_01",\n "results_url" : "%b" , "request_counts":{"succeeded":1.0}, "x":"\\u00e9" }'
    assert rewrite_results_urls(body % RESULTS.encode(), GATEWAY) == body % MOVED.encode()


def test_every_batch_of_a_list_leads_back():
    ended, running = {"id": "a", "results_url": RESULTS}, {"id": "b", "results_url": None}
    body = json.dumps({"data": [ended, running, ended, 7, "x"], "has_more": False, "results_url": RESULTS}).encode()
    moved = {"id": "a", "results_url": MOVED}
    expected = {"data": [moved, running, moved, 7, "x"], "has_more": False, "results_url": MOVED}
    assert rewrite_results_urls(body, GATEWAY) == json.dumps(expected).encode().replace(b"https:\\/\\/", b"https://")


@pytest.mark.parametrize("spelled", [RESULTS.replace("/", "\\/"), RESULTS.replace("v1", "\\u0076\\u0031")])
def test_an_escaped_url_is_understood(spelled):
    body = f'{{"results_url":"{spelled}"}}'.encode()
    assert json.loads(rewrite_results_urls(body, GATEWAY)) == {"results_url": MOVED}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"not json",
        b"{}",
        b'{"results_url":null}',
        b'{"results_url":7}',
        b'{"results_url":"https://elsewhere.example/x"}',
        b'{"results_url":"https://a/v1/messages/batches/1","results_url":"x"}',
        b'{"data":{"results_url":"https://a/v1/messages/batches/1"}}',
        b'{"data":[{"results_url":"https://a/v1/messages/batches/1","a":1,"a":2}]}',
        b'{"nested":{"results_url":"https://a/v1/messages/batches/1"}}',
        b'{"data":"results_url"}',
    ],
)
def test_what_is_no_batch_stays_as_it_is(body):
    assert rewrite_results_urls(body, GATEWAY) == body


@given(st.binary(max_size=80))
def test_no_bytes_raise(body):
    assert isinstance(rewrite_results_urls(body, GATEWAY), bytes)


@given(st.text(max_size=10), st.text(max_size=10))
def test_a_host_in_the_url_never_survives(host, rest):
    url = f"https://{host}/v1/messages/batches/{rest}"
    moved = json.loads(rewrite_results_urls(json.dumps({"results_url": url}).encode(), GATEWAY))["results_url"]
    assert moved.startswith(f"{GATEWAY}/v1/messages/batches/")
    assert moved.endswith(rest)
