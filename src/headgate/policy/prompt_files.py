"""Checks files that hold prompts, before they are used: what in them will vary, and cache marks that cannot work.

What it is: a scan of one file (`lint`) and a comparison of two versions (`compare_files`), over bytes that are given.
What it is not: a reader of files, and no judge of prose. A knowledge base has dates, prices, telephone numbers and
addresses; only what is filled in by a program, or says of itself that it is of now, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import msgspec

from headgate.policy import volatile
from headgate.policy.cache_lint import check
from headgate.policy.prompt_diff import MENDS, Cause, Finding, PromptParts, compare, compare_texts, raw_offset
from headgate.policy.records import Record
from headgate.wire.message import InvalidBody, Span, elements, members, scan

Severity = Literal["error", "note"]

FINDINGS_MAX = 200
"""Of one file."""
FILE_BYTES_MAX = 32 << 20

_NOW = re.compile(
    r"(?i)(?:\b(?:now|today|current(?:ly)?|time|timestamp|datetime|epoch|as of|generated|rendered|this moment)\b"
    r"|bây giờ|hiện tại|hiện giờ|hôm nay|thời gian)[^\n.!?]{0,24}$"
)
"""What stands before a value that is of now."""
_EXACT = re.compile(r":\d{2}:\d{2}")
_TODAY = re.compile(r"(?i)(?:\b(?:today(?:'s date)?|current date|date today)\b|hôm nay|ngày hiện tại)[^\n.!?]{0,12}$")
_EPOCH_LABEL = re.compile(r"(?i)(?:\b(?:time|timestamp|epoch|now|generated|unix)\b)[^\n.!?]{0,12}$")
_COUNTER = re.compile(
    r"(?i)(?<![A-Za-z])(?:request|turn|session|message|conversation|visit|attempt|lượt|phiên|yêu cầu)"
    r"(?: (?:no\.?|number|số))?\s?(?:[:#]\s?)?(?P<value>\d{3,9})(?!\w|[.,:/-]\d"
    r"|\s?(?:%|words?|tokens?|char(?:acter)?s?|minutes?|seconds?|hours?|days?|times|items|[km]b|usd|vnd|đ|từ|phút)\b)"
)
_YEAR = re.compile(r"(?:19|20)\d\d")
_TOKEN_LABEL = re.compile(
    r"(?i)(?<![A-Za-z])(?:session|trace|nonce|request|run|correlation|conversation|seed|cache.?bust\w*|phiên|yêu cầu)"
    r"(?:[ _-]?(?:id|token|key))?[\"']?\s?[:=]\s?[\"']?(?P<value>[A-Za-z0-9_+/=.-]{8,256})"
)
_PLACEHOLDER = re.compile(
    r"\{\{\{?\s*(?P<a>[A-Za-z_][\w.\[\]|: -]{0,63}?)\s*\}\}|\$\{(?P<b>[A-Za-z_]\w{0,63})\}"
    r"|<%=?\s*(?P<c>[\w.]{1,64})\s*%>|(?<![{$\w])\{(?P<d>[a-z][a-z0-9_]{0,63})\}(?!\})"
)
_VARYING_NAME = re.compile(
    r"(?i)(?:^|[_.\s])(?:khach\w*|nguoi_dung|ten|ma|ngay|gio|hom_nay|bay_gio|phien|cau_hoi|lich_su|tin_nhan|user\w*|customer\w*|client\w*|account\w*|member\w*|e?mail|name|id|uuid|guid|now|today|time"
    r"|timestamp|date|datetime|session\w*|request\w*|conversation\w*|trace\w*|nonce|random|seed|counter|question|query"
    r"|history|message|input)(?:$|[_.\s|])"
)


_ADDRESS = "An e-mail address. Where it is the user's and not your own, put it into the last user message."


class UnreadablePrompt(ValueError):
    """A file that holds no prompt of a form that is known; the text says what is wrong."""


class FileFinding(Record, frozen=True):
    """A finding with its place in a file: line and column from 1, the column in characters."""

    line: int
    column: int
    cause: Cause
    severity: Severity
    message: str
    snippet: str
    """The file's own words around it, at most 40 characters. Not masked: who reads it has the file."""


class PromptFile(Record, frozen=True):
    """A file that was read: its bytes, and where its fields stand in it."""

    data: bytes
    parts: PromptParts
    is_json: bool
    tools_at: int = 0
    system_at: int = 0
    messages_at: int = 0


def read(data: bytes, *, is_json: bool) -> PromptFile:
    """A prompt from the bytes of a file: a text is a system prompt, JSON a Messages body or a part of one.

    Raises UnreadablePrompt.
    """
    if len(data) > FILE_BYTES_MAX:
        raise UnreadablePrompt(f"it has {len(data):,} bytes; at most {FILE_BYTES_MAX:,} are read")
    if not is_json:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise UnreadablePrompt(f"it is not UTF-8 at byte {error.start}; save it as UTF-8") from None
        return PromptFile(data, PromptParts(b"", data, b"", ""), is_json=False)
    try:
        request = scan(data)
        fields = request.fields
        model = request.model if "model" in fields else ""
    except (InvalidBody, IndexError) as error:
        wrong = str(error).replace("The request body", "it").rstrip(".")
        raise UnreadablePrompt(f"{wrong}. It should be a Messages body, or have system or tools") from None
    if not {"system", "tools", "messages"} & fields.keys():
        raise UnreadablePrompt("it has none of system, tools and messages; a text belongs into a file .md or .txt")
    raws = {name: fields[name].of(data) if name in fields else b"" for name in ("tools", "system", "messages")}
    parts = PromptParts(raws["tools"], raws["system"], raws["messages"], model, automatic="cache_control" in fields)
    starts = {f"{name}_at": fields[name].start for name in raws if name in fields}
    return PromptFile(data, parts, is_json=True, **starts)


def lint(file: PromptFile, *, min_tokens: int = 0) -> list[FileFinding]:
    """What will keep this prompt from being cached, by its place; at most 200 findings.

    Messages are not scanned: they vary by nature. `min_tokens` is the model's minimum, 0: unknown.
    """
    found: list[FileFinding] = []
    if not file.is_json:
        whole = file.data.decode()
        for start, end, cause, severity in scan_text(whole)[:FINDINGS_MAX]:
            at = len(whole[:start].encode())
            found.append(_at(file, at, cause, severity, _mend(cause, severity), whole[start:end]))
    else:
        for raw_at, raw in _texts(file):
            text = msgspec.json.decode(raw, type=str)
            for start, end, cause, severity in scan_text(text)[: FINDINGS_MAX - len(found)]:
                at = raw_at + raw_offset(raw, start)
                found.append(_at(file, at, cause, severity, _mend(cause, severity), text[start:end]))
        of_marks = check(file.parts, min_tokens=min_tokens)
        if of_marks is not None:
            shown = " and ".join(filter(None, (of_marks.before, of_marks.after)))
            found.append(_at(file, _offset(file, of_marks), of_marks.cause, "error", of_marks.message, shown))
    return sorted(found, key=lambda one: (one.line, one.column))[:FINDINGS_MAX]


def compare_files(previous: PromptFile, current: PromptFile) -> FileFinding | None:
    """Where two versions of a prompt part, placed in the second. An edited text is a note, all else an error."""
    if previous.is_json and current.is_json:
        found = compare(previous.parts, current.parts)
    else:
        found = compare_texts(previous.parts.system, current.parts.system)
    if found is None:
        return None
    severity: Severity = "note" if found.cause in {"text_changed", "tools_changed"} else "error"
    return _at(file=current, at=_offset(current, found), cause=found.cause, severity=severity, message=found.message)


def scan_text(text: str) -> list[tuple[int, int, Cause, Severity]]:
    """Spans of a text that vary, the first cause of those that overlap."""
    taken: list[tuple[int, int, Cause, Severity]] = []
    # By the start of what is taken: a text with thousands of values must not cost their square.
    covered = bytearray(len(text))
    for start, end, cause, severity in _candidates(text):
        if any(covered[start:end]):
            continue
        covered[start:end] = b"\x01" * (end - start)
        taken.append((start, end, cause, severity))
    return sorted(taken)


def _candidates(text: str) -> Iterator[tuple[int, int, Cause, Severity]]:
    for found in _PLACEHOLDER.finditer(text):
        name = next(group for group in found.groups() if group is not None)
        # {word} in prose and code is often no placeholder at all; only a name that varies makes it one.
        is_varying = bool(_VARYING_NAME.search(name))
        if is_varying or found["d"] is None:
            yield *found.span(), "placeholder", "error" if is_varying else "note"
    for found in volatile.TIMESTAMP.finditer(text):
        is_now = _EXACT.search(found[0]) or _before(_NOW, text, found.start())
        yield *found.span(), "timestamp", "error" if is_now else "note"
    for found in volatile.LABELLED_USER.finditer(text):
        value = found["value"]
        if "@" in value or any(sign.isdigit() for sign in value):
            yield *found.span("value"), "user_id", "error"
    for found in volatile.UUID.finditer(text):
        yield *found.span(), "uuid", "error"
    for found in volatile.EMAIL.finditer(text):
        yield *found.span(), "user_id", "note"
    for found in _TOKEN_LABEL.finditer(text):
        if volatile.looks_random(found["value"]):
            yield *found.span("value"), "random_token", "error"
    for found in _COUNTER.finditer(text):
        if not _YEAR.fullmatch(found["value"]):
            yield *found.span("value"), "counter", "error"
    for found in volatile.EPOCH.finditer(text):
        if _before(_EPOCH_LABEL, text, found.start()):
            yield *found.span(), "timestamp", "error"
    for found in volatile.CLOCK.finditer(text):
        # Opening hours have no seconds, and a duration is not said to be of now.
        if _EXACT.search(found[0]) and _before(_NOW, text, found.start()):
            yield *found.span(), "timestamp", "error"
    for found in volatile.DATE.finditer(text):
        if _before(_TODAY, text, found.start()) and any(sign.isdigit() for sign in found[0]):
            yield *found.span(), "date", "error"


def _before(label: re.Pattern[str], text: str, at: int) -> bool:
    return label.search(text[max(at - 64, 0) : at]) is not None


def _mend(cause: Cause, severity: Severity) -> str:
    return _ADDRESS if (cause, severity) == ("user_id", "note") else MENDS[cause]


def _texts(file: PromptFile) -> Iterator[tuple[int, bytes]]:
    """Every text of system and tools: where its raw JSON string starts in the file, and the string."""
    for at, raw in ((file.tools_at, file.parts.tools), (file.system_at, file.parts.system)):
        if raw:
            for span in _strings(raw, Span(0, len(raw))):
                yield at + span.start, span.of(raw)


def _strings(raw: bytes, span: Span) -> Iterator[Span]:
    kind = raw[span.start : span.start + 1]
    if kind == b'"':
        yield span
    try:
        inner = elements(raw, span) if kind == b"[" else list(members(raw, span).values()) if kind == b"{" else []
    except InvalidBody:
        inner = []
    for each in inner:
        yield from _strings(raw, each)


def _offset(file: PromptFile, found: Finding) -> int:
    """The byte of the file that a finding is about."""
    starts = {"tools": file.tools_at, "system": file.system_at, "messages": file.messages_at}
    return starts.get(found.part, 0) + found.value_at


def _at(
    file: PromptFile, at: int, cause: Cause, severity: Severity, message: str, shown: str | None = None
) -> FileFinding:
    line = file.data.count(b"\n", 0, at) + 1
    line_at = file.data.rfind(b"\n", 0, at) + 1
    text = file.data[at : at + 160].decode("utf-8", "replace") if shown is None else shown
    column = len(file.data[line_at:at].decode("utf-8", "replace")) + 1
    return FileFinding(line, column, cause, severity, message, " ".join(text.split())[: volatile.SNIPPET_CHARS])
