"""Cache diagnostics: the first thing in which a request's prompt differs from an earlier one. Pure. Docs "cache
diagnostics".
"""

from headgate.simulator.jsonvalue import JsonObject
from headgate.simulator.prompt import Level, Prompt
from headgate.simulator.world import Fingerprint


def diagnose(previous: Fingerprint | None, now: Fingerprint) -> JsonObject | None:
    """`diagnostics` of the response to a request that names an earlier message; None when nothing diverged."""
    if previous is None:
        return _reason("previous_message_not_found")
    if (previous.model, previous.speed) != (now.model, now.speed):
        return _reason("model_changed", previous.prompt.tokens)
    levels: tuple[tuple[Level, str], ...] = (("tools", "tools_changed"), ("system", "system_changed"))
    for level, name in levels:
        if previous.prompt.end_of(level) != now.prompt.end_of(level):
            return _reason(name, previous.prompt.tokens - _common(previous.prompt, now.prompt))
    if previous.prompt.render != now.prompt.render:
        return _reason("unavailable")
    before = previous.prompt.blocks
    if before and before[-1].prefix not in {block.prefix for block in now.prompt.blocks}:
        return _reason("messages_changed", previous.prompt.tokens - _common(previous.prompt, now.prompt))
    return None


def _common(one: Prompt, other: Prompt) -> int:
    """Tokens of the longest prefix both have."""
    tokens = 0
    for mine, theirs in zip(one.blocks, other.blocks, strict=False):
        if mine.prefix != theirs.prefix:
            break
        tokens = mine.tokens
    return tokens


def _reason(kind: str, missed_tokens: int | None = None) -> JsonObject:
    reason: JsonObject = {"type": kind}
    if missed_tokens is not None:
        reason["cache_missed_input_tokens"] = missed_tokens
    return {"cache_miss_reason": reason}
