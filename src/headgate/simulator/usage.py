"""Tokens of one response by kind, and how the API writes them down. Does not price them: that is `bill`."""

from dataclasses import dataclass
from typing import Literal

from headgate.simulator.jsonvalue import Json, JsonObject

ServiceTier = Literal["standard", "batch"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of the Messages API. `input + read + write_5m + write_1h` is the whole prompt."""

    input_tokens: int = 0
    """After the last cache breakpoint."""
    read_tokens: int = 0
    write_5m_tokens: int = 0
    write_1h_tokens: int = 0
    output_tokens: int = 0
    """Thinking included."""
    thinking_tokens: int = 0
    web_searches: int = 0
    service_tier: ServiceTier = "standard"
    speed: str | None = None
    """None where the request did not ask for one."""
    inference_geo: str = "global"

    @property
    def prompt_tokens(self) -> int:
        """The whole prompt, cached or not."""
        return self.input_tokens + self.read_tokens + self.write_5m_tokens + self.write_1h_tokens

    def at_start(self) -> JsonObject:
        """`usage` of `message_start`: the input side, and a first output token as placeholder."""
        value: JsonObject = {
            "input_tokens": self.input_tokens,
            "cache_creation_input_tokens": self.write_5m_tokens + self.write_1h_tokens,
            "cache_read_input_tokens": self.read_tokens,
            "cache_creation": {
                "ephemeral_5m_input_tokens": self.write_5m_tokens,
                "ephemeral_1h_input_tokens": self.write_1h_tokens,
            },
            "output_tokens": 1 if self.output_tokens else 0,
            "service_tier": self.service_tier,
            "inference_geo": self.inference_geo,
        }
        if self.speed is not None:
            value["speed"] = self.speed
        return value

    def at_end(self) -> JsonObject:
        """`usage` of `message_delta`: cumulative; without what only `message_start` carries."""
        value: JsonObject = {
            "input_tokens": self.input_tokens,
            "cache_creation_input_tokens": self.write_5m_tokens + self.write_1h_tokens,
            "cache_read_input_tokens": self.read_tokens,
            "output_tokens": self.output_tokens,
        }
        return value | self._details()

    def whole(self) -> JsonObject:
        """`usage` of a message that is not streamed."""
        return self.at_start() | {"output_tokens": self.output_tokens} | self._details()

    def _details(self) -> JsonObject:
        details: dict[str, Json] = {}
        if self.thinking_tokens:
            details["output_tokens_details"] = {"thinking_tokens": self.thinking_tokens}
        if self.web_searches:
            details["server_tool_use"] = {"web_search_requests": self.web_searches, "web_fetch_requests": 0}
        return details
