"""Bodies that a Messages API takes and nobody would write: the same seed, the same bodies.

What it is: JSON text made by hand, in every spelling the grammar allows. What it is not: an encoder; nothing here goes
through one, so that no habit of an encoder (order, escapes, numbers, spaces) can hide what a gateway changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

DEEPEST = 180
"""Levels of nesting; the gateway refuses more than 200."""

_SPACES = ("", "", "", "", "", "", " ", " ", "\n", "\t", "\r\n", "  ", "\n    ", " \t\r\n ")
_NUMBERS = (
    *("0", "-0", "7", "-12", "3.0", "0.10", "1.50000000000000000001", "-0.0", "1e5", "1E+05", "2.5e-3", "-7E-10"),
    *("9007199254740993", "18446744073709551616", "123456789012345678901234567890", "1e308", "5e-324"),
)
_WORDS = (
    *("Xin chào", "thế giới", "日本語のテキスト", "中文內容", "한국어", "שלום", "naïve", "Ω", "plain words", "x"),
    *("👩‍👩‍👧‍👦", "🇻🇳", "😀", "𝔘𝔫𝔦", "\u2028", "\u00a0", "\ufeff", "\ufffe", "e\u0301", "\x7f", "null"),
    *("</script>", "{}[],:", "a/b", 'say "hi"', "C:\\dir", "line\nbreak", "\ttab", "\r\n", "\x00", "\x1f", "\b\f"),
    *("data: x", "event: message_stop", '{"model": "x", "stream": true}', '"cache_control"', "\\u0041", "${HOME}"),
)
_KEYS = ("x", "ключ", "鍵", "a key", "model", "stream", "messages", "", "🔑", "cache_control", 'a"b', "a\\b", "type")


def bodies(count: int, *, seed: int) -> Iterator[tuple[bytes, bool]]:
    """So many bodies, each with whether it asks for a stream. Half of them do."""
    dice = Random(seed)
    spelled = [_spellings(word, dice) for word in _WORDS]
    keys = [_spellings(key, dice) for key in _KEYS]
    for number in range(count):
        streamed = number % 2 == 0
        yield _Writer(dice, spelled, keys).body(streamed).encode(), streamed


def _spellings(text: str, dice: Random) -> list[str]:
    """The inside of a JSON string for this text, in several ways."""
    short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    plain = "".join(short.get(char) or (f"\\u{ord(char):04x}" if char < " " else char) for char in text)
    escaped = "".join(_escape(char) for char in text)
    mixed = "".join(_escape(char) if dice.random() < 0.4 else short.get(char, char) for char in text if char >= " ")
    slashed = plain.replace("/", "\\/")
    return [plain, plain, escaped, escaped.upper().replace("\\U", "\\u"), mixed, slashed]


def _escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


class _Writer:
    """Writes one body."""

    def __init__(self, dice: Random, words: list[list[str]], keys: list[list[str]]) -> None:
        self._dice = dice
        self._words = words
        self._keys = keys

    def body(self, streamed: bool) -> str:
        dice = self._dice
        members = [
            ("model", '"claude-haiku-4-5"'),
            ("max_tokens", str(dice.randint(1, 9))),
            ("messages", self._messages()),
        ]
        if streamed:
            members.append(("stream", "true"))
        elif dice.random() < 0.5:
            members.append(("stream", dice.choice(("false", "null"))))
        marked = dice.random() < 0.3
        if dice.random() < 0.4:
            members.append(("system", self._system(marked)))
        if dice.random() < 0.3:
            members.append(("tools", self._tools(marked)))
        if dice.random() < 0.3:
            members.append(("metadata", self._object([("user_id", self._string()), *self._unknown(1)])))
        if dice.random() < 0.3:
            members.append(("temperature", dice.choice(("0", "1", "1.0", "0.70", "5e-1", "0.30000000000000004"))))
        if dice.random() < 0.2:
            members.append(("stop_sequences", '["never said",' + self._space() + '"§§"]'))
        for number in range(dice.randint(0, 3)):
            # Top-level keys stand once; a number keeps two of them apart.
            members.append((f"x{number}_", self._value(0)))
        if dice.random() < 0.05:
            members.append(("deep", self._deep(dice.randint(20, DEEPEST))))
        dice.shuffle(members)
        return self._space() + self._object(members, spell=True) + self._space()

    def _messages(self) -> str:
        turns = []
        for number in range(self._dice.choice((1, 1, 1, 3, 5))):
            role = ("user", "assistant")[number % 2]
            content = self._string() if self._dice.random() < 0.5 else self._array([self._text() for _ in range(2)])
            members = [("role", f'"{role}"'), ("content", content), *self._unknown(1)]
            self._dice.shuffle(members)
            turns.append(self._object(members))
        return self._array(turns)

    def _system(self, marked: bool) -> str:
        if not marked and self._dice.random() < 0.5:
            return self._string()
        return self._array([self._text(marked=marked), self._text()])

    def _tools(self, marked: bool) -> str:
        schema = self._object([("type", '"object"'), ("properties", self._object(self._unknown(3))), *self._unknown(1)])
        members = [("name", '"look_up"'), ("description", self._string()), ("input_schema", schema)]
        if marked:
            members.append(("cache_control", self._mark()))
        self._dice.shuffle(members)
        return self._array([self._object(members)])

    def _text(self, *, marked: bool = False) -> str:
        members = [("type", '"text"'), ("text", self._string()), *self._unknown(1)]
        if marked:
            members.append(("cache_control", self._mark()))
        self._dice.shuffle(members)
        return self._object(members)

    def _mark(self) -> str:
        members = [("type", '"ephemeral"')]
        if self._dice.random() < 0.5:
            members.append(("ttl", '"5m"'))
        return self._object(members)

    def _unknown(self, most: int) -> list[tuple[str, str]]:
        """Fields that no API has; below the top level a key may stand twice."""
        return [(f"_{self._dice.randint(0, 1)}", self._value(2)) for _ in range(self._dice.randint(0, most))]

    def _value(self, depth: int) -> str:
        kind = self._dice.random()
        if depth < 4 and kind < 0.2:
            return self._array([self._value(depth + 1) for _ in range(self._dice.randint(0, 3))])
        if depth < 4 and kind < 0.45:
            pairs = [(None, self._value(depth + 1)) for _ in range(self._dice.randint(0, 3))]
            return self._object(pairs)
        if kind < 0.7:
            return self._dice.choice(_NUMBERS)
        if kind < 0.9:
            return self._string()
        return self._dice.choice(("true", "false", "null"))

    def _deep(self, levels: int) -> str:
        opened, closed = [], []
        for _ in range(levels):
            if self._dice.random() < 0.5:
                opened.append("[" + self._space())
                closed.append("]")
            else:
                opened.append('{"d":')
                closed.append(self._space() + "}")
        return "".join(opened) + "[]" + "".join(reversed(closed))

    def _string(self) -> str:
        return '"' + "".join(self._dice.choice(self._dice.choice(self._words)) for _ in range(3)) + 'ok"'

    def _key(self) -> str:
        return '"' + self._dice.choice(self._dice.choice(self._keys)) + '"'

    def _object(self, members: list[tuple[str | None, str]] | list[tuple[str, str]], *, spell: bool = False) -> str:
        space = self._space
        return (
            "{"
            + ",".join(
                f"{space()}{self._key() if key is None else self._named(key, spell)}{space()}:{space()}{value}{space()}"
                for key, value in members
            )
            + (space() if not members else "")
            + "}"
        )

    def _named(self, key: str, spell: bool) -> str:
        if spell and self._dice.random() < 0.1:
            at = self._dice.randrange(len(key))
            return f'"{key[:at]}{_escape(key[at])}{key[at + 1 :]}"'
        return json.dumps(key)

    def _array(self, elements: list[str]) -> str:
        return "[" + ",".join(f"{self._space()}{element}{self._space()}" for element in elements) + "]"

    def _space(self) -> str:
        return self._dice.choice(_SPACES)
