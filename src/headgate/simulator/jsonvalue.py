"""JSON as typed values: one alias and the few safe looks into it. Neither parses nor validates."""

from typing import TypeAlias, Union

Json: TypeAlias = Union[bool, int, float, str, list["Json"], dict[str, "Json"], None]  # noqa: UP007 (recursive)
JsonObject: TypeAlias = dict[str, Json]


def object_in(value: Json) -> JsonObject:
    """The object itself, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def list_in(value: Json) -> list[Json]:
    """The array itself, or an empty one for anything else."""
    return value if isinstance(value, list) else []


def text_in(value: Json) -> str:
    """The string itself, or "" for anything else."""
    return value if isinstance(value, str) else ""


def int_in(value: Json) -> int | None:
    """The integer, or None; JSON `true` is not 1."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def content_blocks(content: Json) -> list[JsonObject]:
    """Content as the API reads it: a string is one text block; entries that are not objects are left out."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [block for block in list_in(content) if isinstance(block, dict)]
