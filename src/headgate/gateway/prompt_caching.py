"""Prompt caching as a call meets it: its marks, the wait for who writes the same prefix, and what is learned from it.

What it is: the driver of the pure parts, which are the planner (`policy/prompt_cache.py`), the linter
(`policy/cache_lint.py`) and who writes first (`policy/cold_prefixes.py`). What it is not: a decision about a prompt.
For the loop's thread; all memory is bounded where it lies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from headgate.gateway.settings import CacheSection
from headgate.policy.cache_lint import CacheDeltas, FamilyLinter, PromptParts, diagnosis
from headgate.policy.cold_prefixes import ColdPrefixes
from headgate.policy.prompt_cache import CachePlan, PromptCache
from headgate.policy.records import Principal
from headgate.wire.catalog import Catalog
from headgate.wire.message import MessageRequest, member_after, scan, splice
from headgate.wire.usage import Usage

_CLAUDE_CODE = (b"x-claude-code-", b"claude-cli/")
"""Of its header lines. It sets marks where it wants them, and what it sends without any is meant so."""
ASKED_FOR_S = 3600.0
"""How long after a prompt of a family missed, Anthropic is asked about the family's prompts."""
FAMILIES_MAX = 4_096
KEPT_BYTES_MAX = 16 << 20
"""Of bodies that are remembered to keep their prefixes warm, and as much of those whose answer has not begun."""


class KeptPrompt(msgspec.Struct, frozen=True, gc=False):
    """The last prompt of a family whose answer began: what keeping its prefix warm begins with."""

    plan: CachePlan
    principal: Principal
    endpoint: str
    model: str
    """As the body names it."""
    header_lines: bytes
    """The client's that were passed on."""
    used_at: float
    """When it was sent, monotonic: from there its prefix lives."""


class KeptPrompts:
    """A prompt for each family, of those that have a mark. Bounded by the bytes; those longest unused go first."""

    __slots__ = ("_began", "_bytes_max", "_planned")

    def __init__(self, bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._planned = _Bodies(bytes_max)
        self._began = _Bodies(bytes_max)

    @property
    def bytes(self) -> int:
        """Of all bodies that are held."""
        return self._planned.bytes + self._began.bytes

    def prompts(self) -> list[KeptPrompt]:
        """Those whose answers began, the one longest unused first."""
        return list(self._began.prompts.values())

    def planned(self, prompt: KeptPrompt) -> None:
        """It is about to be sent."""
        if prompt.plan.marked:
            self._planned.put(prompt)

    def sent(self, plan: CachePlan, now: float) -> None:
        """It leaves, or leaves again."""
        found = self._planned.prompts.get(plan.family)
        if found is not None and found.plan is plan:
            self._planned.put(msgspec.structs.replace(found, used_at=now))

    def began(self, plan: CachePlan, usage: Usage) -> None:
        """Its answer began. What was neither read nor written is not in the cache."""
        found = self._planned.prompts.get(plan.family)
        if found is None or found.plan is not plan:
            return
        self._planned.drop(plan.family)
        if usage.cache_read_tokens or usage.cache_write_5m_tokens or usage.cache_write_1h_tokens:
            self._began.put(found)

    def drop(self, family: str) -> None:
        """Its prefix is gone."""
        self._began.drop(family)

    def clear(self) -> None:
        """Nothing is kept any more."""
        self._planned = _Bodies(self._bytes_max)
        self._began = _Bodies(self._bytes_max)


class _Bodies:
    """Prompts by family, within so many bytes."""

    __slots__ = ("_bytes_max", "bytes", "prompts")

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.bytes = 0
        self.prompts: OrderedDict[str, KeptPrompt] = OrderedDict()

    def put(self, prompt: KeptPrompt) -> None:
        family = prompt.plan.family
        self.drop(family)
        if _bytes_of(prompt) > self._bytes_max // 4:
            return
        self.prompts[family] = prompt
        self.bytes += _bytes_of(prompt)
        while self.bytes > self._bytes_max or len(self.prompts) > FAMILIES_MAX:
            self.drop(next(iter(self.prompts)))

    def drop(self, family: str) -> None:
        gone = self.prompts.pop(family, None)
        if gone is not None:
            self.bytes -= _bytes_of(gone)


def _bytes_of(prompt: KeptPrompt) -> int:
    return len(prompt.plan.body) + len(prompt.header_lines)


class _Asked(msgspec.Struct, gc=False):
    """A family about which Anthropic is asked."""

    until: float
    message_id: str = ""
    """Of the answer before: what the next prompt is compared with."""


class PromptCaching:
    """What all calls of a process share."""

    def __init__(
        self, section: CacheSection, catalog: Catalog, *, clock: Callable[[], float], now_ns: Callable[[], int]
    ) -> None:
        """`clock` gives monotonic seconds, `now_ns` UTC nanoseconds."""
        self._section = section
        self._catalog = catalog
        self._clock = clock
        self._now_ns = now_ns
        self.planner = PromptCache(catalog, ttl=section.ttl)
        self.linter = FamilyLinter()
        self.kept = KeptPrompts()
        """Empty unless `cache.keep_warm` is on."""
        self._cold = ColdPrefixes(section.single_flight_wait_s)
        self._wake: dict[str, Callable[[], None]] = {}
        self._asked: OrderedDict[str, _Asked] = OrderedDict()

    def apply(self, section: CacheSection) -> None:
        """Settings were read again. What was learned stays, unless the TTL is another one."""
        if section.ttl != self._section.ttl:
            self.planner = PromptCache(self._catalog, ttl=section.ttl)
        if section.ttl != self._section.ttl or not section.keep_warm:
            self.kept.clear()
        self._section = section
        self._cold.wait_s = section.single_flight_wait_s

    def plan(
        self,
        scanned: MessageRequest,
        principal: Principal,
        *,
        endpoint: str,
        user: str,
        model: str,
        arm: str,
        at_ns: int,
        header_lines: bytes,
    ) -> CachePlan:
        """The body to send to this model and what is known of its prompt. Once for a request and model.

        `scanned` is the body for `model`; `header_lines` are the client's that are passed on; `at_ns` picks prices.
        """
        section, now = self._section, self._clock()
        ours = principal.plan_cache and not _is_claude_code(header_lines)
        mark = section.plan and ours
        plan = self.planner.plan(
            scanned, key_id=principal.key_id, endpoint=endpoint, model=model, at_ns=at_ns, now=now, mark=mark
        )
        parts = PromptParts(
            tools=scanned.raw("tools") or b"",
            system=scanned.raw("system") or b"",
            messages=scanned.raw("messages") or b"",
            model=model,
            arm=arm,
            user=user,
            automatic=plan.tail or scanned.raw("cache_control") is not None,
        )
        known = self._catalog.resolve(model)
        finding = self.linter.observe(
            plan.family,
            parts,
            at_ns=self._now_ns(),
            now=now,
            price=self._catalog.price_row(model, at_ns),
            write=plan.ttl,
            min_tokens=known.cache_min_tokens if known is not None else 0,
        )
        if section.diagnostics:
            if finding is not None:
                self._miss(plan.family, now)
            if ours:
                plan = self._asking(plan, scanned, now)
        if section.keep_warm and principal.plan_cache:
            self.kept.planned(KeptPrompt(plan, principal, endpoint, model, header_lines, now))
        return plan

    def began(self, plan: CachePlan, *, model: str, usage: Usage, message_id: str, diagnostics: bytes) -> None:
        """An answer began: what it read and wrote is known, and everybody who waited for its prefix goes on."""
        self.planner.began(plan, model=model, usage=usage, now=self._clock())
        self.linter.counted(plan.family, body_bytes=len(plan.body), prompt_tokens=usage.prompt_tokens)
        if self._section.keep_warm:
            self.kept.began(plan, usage)
        if plan.cold:
            self._wake_up(self._cold.began(plan.cold))
        asked = self._asked.get(plan.family)
        if asked is not None:
            asked.message_id = message_id
        if diagnostics:
            said = diagnosis(diagnostics)
            if said is not None:
                self.linter.note(plan.family, said, at_ns=self._now_ns())

    def __len__(self) -> int:
        """Calls that write a cold prefix or wait for that, and prefixes: 0 when no call is under way."""
        return len(self._wake) + len(self._cold)

    def take_findings(self) -> CacheDeltas:
        """What was found since the last time, and what the families are; the caller's to store."""
        at_ns = self._now_ns()
        for view in self.planner.families():
            self.linter.describe(
                view.family,
                key_id=view.key_id,
                endpoint=view.endpoint,
                model=view.model,
                at_ns=at_ns,
                ttl=view.ttl,
                ttl_reason=view.reason,
            )
        return self.linter.take_deltas()

    # who writes a cold prefix

    def goes_ahead(self, plan: CachePlan, call_id: str, wake: Callable[[], None]) -> bool:
        """Whether this call may go on; else it waits until `wait_until`, or until it is woken. Then `leave` follows.

        A call that goes ahead with a cold prefix is the one that writes it: `sent`, then `began` or `leave` follow.
        """
        if not plan.cold or not self._section.single_flight or not self.planner.is_cold(plan.cold, self._clock()):
            return True
        self._wake[call_id] = wake
        return self._cold.join(plan.cold, call_id, self._clock())

    def wait_until(self, plan: CachePlan, call_id: str) -> float | None:
        """When the wait ends at the latest, monotonic, to be asked again then; None: it has ended."""
        return self._cold.until(plan.cold, call_id, self._clock())

    def to_be_read(self, plan: CachePlan, call_id: str) -> int:
        """Tokens that this call will find in the cache though no answer has said so: another call, whose answer was
        waited for long enough, has been sent to write them. 0 of any other."""
        if not plan.cold or not self._cold.on_its_way(plan.cold, call_id):
            return 0
        return next((one.tokens for one in plan.marked if one.key == plan.cold), 0)

    def sent(self, plan: CachePlan, call_id: str) -> None:
        """The attempt leaves."""
        if self._section.keep_warm:
            self.kept.sent(plan, self._clock())
        if plan.cold:
            self._wake_up(self._cold.sent(plan.cold, call_id, self._clock()))

    def leave(self, plan: CachePlan, call_id: str) -> None:
        """The attempt failed, or the call waits no longer. Twice is once."""
        if plan.cold:
            self._wake.pop(call_id, None)
            self._wake_up(self._cold.left(plan.cold, call_id, self._clock()))

    def _wake_up(self, call_ids: list[str]) -> None:
        for call_id in call_ids:
            wake = self._wake.get(call_id)
            if wake is not None:
                wake()

    # Anthropic's own word

    def _miss(self, family: str, now: float) -> None:
        asked = self._asked.get(family)
        if asked is None:
            if len(self._asked) >= FAMILIES_MAX:
                self._asked.popitem(last=False)
            self._asked[family] = _Asked(now + ASKED_FOR_S)
        else:
            asked.until = now + ASKED_FOR_S

    def _asking(self, plan: CachePlan, scanned: MessageRequest, now: float) -> CachePlan:
        """The body with the question why it misses, where there is an answer to compare it with."""
        asked = self._asked.get(plan.family)
        if asked is None:
            return plan
        if asked.until < now:
            del self._asked[plan.family]
            return plan
        if not asked.message_id or scanned.raw("diagnostics") is not None or scanned.max_tokens == 0:
            return plan
        question = msgspec.json.encode({"previous_message_id": asked.message_id})
        at = member_after(scan(plan.body).fields["model"], "diagnostics", question)
        return msgspec.structs.replace(plan, body=splice(plan.body, [at]))


def _is_claude_code(header_lines: bytes) -> bool:
    lines = header_lines.lower()
    return _CLAUDE_CODE[0] in lines or _CLAUDE_CODE[1] in lines
