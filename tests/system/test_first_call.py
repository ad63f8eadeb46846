"""The shortest way through everything: a key, a call, a row."""

from __future__ import annotations


def test_an_unchanged_sdk_program_works_by_its_base_url_and_key(stack, sdk):
    simulator = stack.simulator()
    gateway = stack.gateway(simulator.url)
    client = sdk(gateway.url, gateway.key())
    message = client.messages.create(
        model="claude-sonnet-4-6", max_tokens=30, messages=[{"role": "user", "content": "Xin chào"}]
    )
    assert message.content[0].text
    (call,) = gateway.calls(1)
    assert (call["outcome"], call["state"], call["status"]) == ("completed", "settled", 200)
    assert (call["input_tokens"], call["output_tokens"]) == (message.usage.input_tokens, message.usage.output_tokens)
    assert call["cost_nanousd"] == simulator.bill()["total"]["cost_nanousd"]
