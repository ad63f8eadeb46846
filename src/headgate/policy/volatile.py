"""What varies in a text by itself: times, ids, counters. Finds the value around a place, and masks what is shown of it.

What it is: patterns, and judgements over a window of a text.
What it is not: a comparison of prompts (`prompt_diff.py`) or a scan of a file (`prompt_files.py`); both use it.

Only what a program puts into a prompt is meant. A price, a telephone number or a date of validity is a fact that an
author wrote, and no pattern here names one from one text alone.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal, NamedTuple

ValueCause = Literal[
    "timestamp", "date", "uuid", "user_id", "counter", "random_token", "whitespace", "unicode_form", "text_changed"
]

WINDOW_CHARS = 256
"""Looked at on each side of a difference: longer than every value but a long token, whose end does not matter."""
SNIPPET_CHARS = 40
_LEAD_CHARS = 24
_SAMPLE_CHARS = 64
_RUN_CHARS_MIN = 6
_LONG_RUN_CHARS = 16

_ISO_DATE = r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}"
_DAY_FIRST = r"\d{1,2}[-/.]\d{1,2}[-/.]\d{4}"
_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
_WEEKDAY = r"(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?"
_WORDED = rf"(?:{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}|\d{{1,2}} {_MONTH},? \d{{4}})"
_VIETNAMESE = r"ngày \d{1,2} tháng \d{1,2} năm \d{4}"
_DATE = rf"(?:(?:{_WEEKDAY},? )?(?:{_ISO_DATE}|{_DAY_FIRST}|{_WORDED})|{_VIETNAMESE})"
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d{1,9})?)?(?: ?[AaPp]\.?[Mm]\b\.?)?"
_ZONE = r"(?: ?(?:Z\b|UTC|GMT|ICT|[+-]\d{2}:?\d{2}))?"
_HEAD = r"(?<![A-Za-z0-9.])"

TIMESTAMP = re.compile(
    rf"{_HEAD}(?:{_DATE}(?:T|,? (?:at )?|,? lúc ){_CLOCK}{_ZONE}|{_CLOCK}{_ZONE},? (?:on |ngày )?{_DATE})"
)
"""A date with a time of day, in the forms of ISO 8601, RFC 2822, English and Vietnamese."""
EPOCH = re.compile(r"(?<![\w.,$€£-])1\d{9}(?:\d{3}|\d{6}|\d{9})?(?:\.\d{1,9})?(?![\w])")
"""Seconds, milli-, micro- or nanoseconds since 1970, of 2001 to 2033."""
CLOCK = re.compile(rf"{_HEAD}{_CLOCK}{_ZONE}(?![\d:])")
DATE = re.compile(rf"{_HEAD}(?:{_DATE}|{_WEEKDAY}(?![a-z]))(?!\d)")
UUID = re.compile(r"(?<![0-9A-Fa-f])[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}(?![0-9A-Fa-f])")
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+")
LABELLED_USER = re.compile(
    r"(?i)(?<![A-Za-z])(?:(?:user|customer|account|member|client|tenant|patient|student|employee"
    r"|khách hàng|khách|người dùng|nhân viên|học viên)"
    r"(?:['’]s)?(?:[ _-]?(?:id|no\.?|number|name|code|mã|tên|số))?[\"']?(?:\s?[:=#]\s?|\s(?:is|là)\s)[\"'<]?"
    r"|mã (?:khách hàng|khách|người dùng|nhân viên|học viên)\s)"
    # A word that is followed by a colon is a label itself: `the user is user_id: 17`.
    r"(?P<value>(?![\w.@+-]+\s?[:=#])[\w@+][\w.@+-]{0,63})"
)
"""`user_id: 48213`, `User: lan`, `customer number is 17`, `mã khách hàng KH-17`."""
USER_TOKEN = re.compile(r"(?<![A-Za-z0-9_-])(?:usr|user|uid|cus|cust|acct)[_-][A-Za-z0-9]{2,64}(?![A-Za-z0-9])")
COUNTER = re.compile(
    r"(?:(?<=[A-Za-z][-_#])|(?<![\w.,$€£₫%/:-]))\d{1,9}"
    r"(?![\w%₫$€£]|[.,/:-]\d|\s?(?:USD|VND|VNĐ|EUR|GBP|đ\b|dollars|euros|%))"
)
"""A whole number that stands alone: no price, share, version, decimal or part of a date."""
TOKEN = re.compile(r"(?<![A-Za-z0-9_+/=-])[A-Za-z0-9_+/=.-]{8,512}")

_PATTERNS: tuple[tuple[ValueCause, re.Pattern[str]], ...] = (
    ("timestamp", TIMESTAMP),
    ("user_id", EMAIL),
    ("user_id", LABELLED_USER),
    ("user_id", USER_TOKEN),
    ("uuid", UUID),
    ("timestamp", EPOCH),
    ("date", DATE),
    ("timestamp", CLOCK),
    ("counter", COUNTER),
    ("random_token", TOKEN),
)
"""The first that fits both texts names the cause: the most particular come first."""

_READABLE = frozenset(
    re.findall(
        r"\w+",
        "a an and at by current customer date datetime day epoch for generated gmt hash hour id is it key last member "
        "message month name no nonce now number of on request run session server seed the time timestamp today token "
        "trace turn updated user utc uuid version year "
        "bây dùng giờ hiện hôm khách hàng lúc ngày người nay phiên tại tháng thời gian mã năm số",
    )
)
"""Words that a snippet keeps: they name what varies, and tell nothing of a prompt beyond that."""
_WORD = re.compile(r"[^\W\d_]+")
_VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"})


class Value(NamedTuple):
    """The varying value around a difference: `start` in both texts, and where it ends in each."""

    cause: ValueCause
    start: int
    before_end: int
    after_end: int


def first_difference(one: str, other: str) -> int:
    """Index of the first character in which two texts differ; the shorter one's length when it begins the other."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def classify(before: str, after: str, at: int, *, user_before: str = "", user_after: str = "") -> Value:
    """What differs at index `at`, the first one in which the texts differ. Users are who sent each, where known."""
    named = _of_users(before, after, at, user_before, user_after)
    if named is not None:
        return named
    form = _form(before, after, at)
    if form is not None:
        return form
    for cause, pattern in _PATTERNS:
        found = _on_both(pattern, before, after, at)
        if found is None:
            continue
        start, before_end, after_end = found
        if cause == "random_token" and not (
            looks_random(before[start:before_end]) and looks_random(after[start:after_end])
        ):
            continue
        return Value(cause, start, before_end, after_end)
    return Value("text_changed", at, at + 1, at + 1)


def looks_random(token: str) -> bool:
    """Whether a token is made by a program rather than written: letters and digits taking turns, or cases that do."""
    for run in re.findall(r"[A-Za-z0-9]+", token):
        kinds = re.sub(r"[0-9]+", "0", re.sub(r"[A-Za-z]+", "a", run))
        if len(run) >= _RUN_CHARS_MIN and len(kinds) >= 3:
            return True
        if len(run) >= _LONG_RUN_CHARS and "0" in kinds:
            return True
        if len(run) >= 2 * _RUN_CHARS_MIN and len(re.findall(r"[a-z][A-Z]{1,3}(?=[a-z]|$)", run)) >= 3:
            return True
    return False


def snippet(text: str, value_at: int, *, cause: str) -> str:
    """At most 40 characters of `text`, from a little before the varying value on, masked.

    Digits become 0 and letters x, so that a value shows as its shape; words of `_READABLE` stay, so that `user id: xxx`
    can be read. Of a change of white space or of the form of a letter the signs themselves are shown.
    """
    start = max(value_at - _LEAD_CHARS, 0)
    window = text[start : start + SNIPPET_CHARS]
    masked = _mask(window)
    if cause == "whitespace":
        return masked.translate(_VISIBLE)
    if cause == "unicode_form":
        return " ".join(f"U+{ord(sign):04X}" for sign in text[value_at : value_at + 3])
    return " ".join(masked.split())


def _mask(text: str) -> str:
    def word(found: re.Match[str]) -> str:
        return found[0] if found[0].lower() in _READABLE else "x" * len(found[0])

    masked = _WORD.sub(word, text)
    return "".join(
        "0" if sign.isdigit() else sign if sign.isalpha() or sign.isspace() or sign.isascii() else "?"
        for sign in masked
        if not unicodedata.combining(sign)
    )


def _on_both(pattern: re.Pattern[str], before: str, after: str, at: int) -> tuple[int, int, int] | None:
    """Where a value of the pattern stands in both texts, from the same place on, and the difference within it."""
    ends = dict(_around(pattern, before, at))
    for start, end in _around(pattern, after, at):
        # One of two values may begin the other, but then the longer one goes on where they part.
        if start in ends and at < max(end, ends[start]):
            return start, ends[start], end
    return None


def _around(pattern: re.Pattern[str], text: str, at: int) -> list[tuple[int, int]]:
    group = "value" if "value" in pattern.groupindex else 0
    found = pattern.finditer(text, max(at - WINDOW_CHARS, 0), at + WINDOW_CHARS)
    return [each.span(group) for each in found if each.start(group) <= at <= each.end(group)]


def _of_users(before: str, after: str, at: int, user_before: str, user_after: str) -> Value | None:
    """Whether each text names its own user where they part."""
    if len(user_before) < 2 or len(user_after) < 2 or user_before == user_after:
        return None
    starts = _covering(before, user_before, at)
    for start in _covering(after, user_after, at):
        if start in starts:
            return Value("user_id", start, start + len(user_before), start + len(user_after))
    return None


def _covering(text: str, name: str, at: int) -> list[int]:
    first = max(at - len(name), 0)
    starts = []
    start = text.find(name, first, at + len(name))
    while 0 <= start <= at:
        starts.append(start)
        start = text.find(name, start + 1, at + len(name))
    return starts


def _form(before: str, after: str, at: int) -> Value | None:
    """Whether the texts say the same with other white space, or with letters composed in another way."""
    # From a letter before, for a mark that combines belongs to it.
    start = max(at - 1, 0)
    one, other = before[start : start + WINDOW_CHARS], after[start : start + WINDOW_CHARS]
    if not one.isascii() or not other.isascii():
        composed = [unicodedata.normalize("NFC", text)[:_SAMPLE_CHARS] for text in (one, other)]
        if composed[0] == composed[1]:
            # A letter that is taken apart begins with the letter itself: the value is the whole of it.
            combining = any(text[at : at + 1] and unicodedata.combining(text[at]) for text in (before, after))
            return Value("unicode_form", at - 1 if combining and at else at, at + 1, at + 1)
    spaces = [text[at : at + 1].isspace() for text in (before, after)]
    if any(spaces) or at in (len(before), len(after)):
        bare = ["".join(text[at : at + WINDOW_CHARS].split())[:_SAMPLE_CHARS] for text in (before, after)]
        if bare[0] == bare[1] and any(spaces):
            return Value("whitespace", at, at + 1, at + 1)
    return None
