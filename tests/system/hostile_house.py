"""The gateway that hostile clients meet, and what a test asks of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.system.conftest import Gateway, Stack
from tests.system.hostile import (
    Answer,
    Recorder,
    post,
    talk,
)

HEADER_TIMEOUT_S = 2.0
BODY_TIMEOUT_S = 2.0


@dataclass
class House:
    """A gateway, its keys, and the upstream that hears all."""

    gateway: Gateway
    upstream: Recorder
    key: str
    app_key: str = ""
    admin_key: str = ""

    @property
    def url(self) -> str:
        return self.gateway.url

    @property
    def pid(self) -> int:
        return self.gateway.process.popen.pid

    def healthy(self) -> Answer:
        """A good request is served."""
        (answer,) = talk(self.url, post(self.key), count=1)
        assert answer.status == 200, answer
        return answer


def start(stack: Stack, upstream: Recorder, **settings: str) -> House:
    gateway = stack.gateway(
        upstream.url,
        **{
            "SERVER__HEADER_TIMEOUT_S": str(HEADER_TIMEOUT_S),
            "SERVER__BODY_TIMEOUT_S": str(BODY_TIMEOUT_S),
            "RETRY__BASE_DELAY_S": "0.05",
            "QUEUE__DEADLINE_S": "5",
            "SERVER__BAD_KEYS_PER_MIN": "1000000",
            **settings,
        },
    )
    return House(gateway, upstream, key=gateway.key("plain"))


def newest_calls(house: House, count: int) -> list[dict[str, Any]]:
    """The last calls of the ledger, the newest first."""
    calls: list[dict[str, Any]] = json.loads(house.gateway.headgate("calls", "--limit", str(count), "--json").stdout)[
        "calls"
    ]
    return calls
