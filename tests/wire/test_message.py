"""Laws of the request scanner: it sees what a JSON parser sees, and what it does not replace stays to the byte."""

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headgate.wire.message import (
    DEPTH_MAX,
    InvalidBody,
    MessageRequest,
    Span,
    Splice,
    elements,
    member_after,
    members,
    scan,
    splice,
    without,
    without_elements,
)

WHITESPACE = st.sampled_from(["", "", " ", "\n\t", "\r\n  "])
CHARACTERS = st.one_of(
    st.sampled_from('"\\/{}[]:,\b\f\n\r\t\x00\x1f\x7f\u2028é漢字ế😀'),
    st.characters(exclude_categories=["Cs"]),
)
TEXTS = st.text(CHARACTERS, max_size=12)
NUMBERS = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["0", "-0", "1e5", "1E+5", "-1.50e-7", "1e999", "-1e999", "9" * 400]),
)
KEYS = st.one_of(
    st.sampled_from(["model", "stream", "max_tokens", "messages", "metadata", "cache_control", "", "a", "b"]), TEXTS
)
_SHORT = {'"': '\\"', "\\": "\\\\", "/": "\\/", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


DICE = st.integers(0, (1 << 48) - 1)


def spelled(text: str, dice: int) -> str:
    """A JSON string, each character spelled plainly, short or as `\\uXXXX` as the dice fall."""
    pieces = []
    for number, character in enumerate(text):
        roll = dice >> (3 * number % 48)
        escape = "\\u%04X" if roll & 4 else "\\u%04x"
        spellings = ["".join(escape % unit for unit in memoryview(character.encode("utf-16-le")).cast("H"))]
        if character in _SHORT:
            spellings.append(_SHORT[character])
        if character >= " " and character not in '"\\':
            spellings.append(character)
        pieces.append(spellings[roll % len(spellings)])
    return '"' + "".join(pieces) + '"'


def strings(texts=TEXTS):
    """JSON strings in many spellings."""
    return st.builds(spelled, texts, DICE)


def padded(inner):
    """`inner` with whitespace around it."""
    return st.builds("{}{}{}".format, WHITESPACE, inner, WHITESPACE)


def objects(values, *, max_size=4):
    """JSON objects as text; no two keys of one are equal, whatever their spelling."""
    pairs = st.tuples(padded(strings(KEYS)), padded(values))
    return st.lists(pairs, max_size=max_size, unique_by=lambda pair: json.loads(pair[0])).map(
        lambda drawn: "{" + ",".join(map(":".join, drawn)) + "}"
    )


def arrays(values):
    """JSON arrays as text."""
    return st.lists(padded(values), max_size=3).map(lambda drawn: "[" + ",".join(drawn) + "]")


SCALARS = st.one_of(st.sampled_from(["true", "false", "null"]), NUMBERS, strings())
VALUES = st.recursive(SCALARS, lambda inner: objects(inner) | arrays(inner), max_leaves=6)
BODIES = st.one_of(padded(objects(VALUES)).map(str.encode), st.just(b" { } "))


def decoded(raw: bytes):
    """What the standard library makes of it; numbers stay text, so that none is out of range."""
    return json.loads(raw, parse_int=str, parse_float=str)


def nested(depth: int) -> bytes:
    """A body whose deepest value lies `depth` levels down."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def mixed(depth: int) -> bytes:
    """The same with objects and arrays in turn."""
    opening = [b'{"a":' if level % 2 == 0 else b"[" for level in range(depth)]
    closing = [b"}" if level % 2 == 0 else b"]" for level in reversed(range(depth))]
    return b"".join(opening) + b"1" * (depth % 2) + b"".join(closing)


@given(BODIES)
def test_every_span_holds_the_value_that_a_json_parser_finds(body):
    fields = scan(body).fields
    parsed = decoded(body)
    assert list(fields) == list(parsed)
    assert {key: decoded(span.of(body)) for key, span in fields.items()} == parsed


@given(BODIES)
def test_a_span_is_the_value_without_the_whitespace_around_it(body):
    for span in scan(body).fields.values():
        raw = span.of(body)
        assert raw == raw.strip(b" \t\n\r") != b""
        assert body[: span.start].rstrip(b" \t\n\r").endswith(b":")
        assert body[span.end :].lstrip(b" \t\n\r")[:1] in (b",", b"}")


@given(BODIES)
def test_characters_are_counted_and_not_bytes(body):
    assert scan(body).chars == len(body.decode())


@given(BODIES)
def test_members_and_elements_agree_with_a_json_parser_at_every_depth(body):
    def check(span: Span, parsed) -> None:
        if isinstance(parsed, dict):
            found = members(body, span)
            assert list(found) == list(parsed)
            for key, inner in found.items():
                check(inner, parsed[key])
        elif isinstance(parsed, list):
            parts = elements(body, span)
            assert len(parts) == len(parsed)
            for inner, value in zip(parts, parsed, strict=True):
                check(inner, value)
        else:
            assert decoded(span.of(body)) == parsed

    for key, span in scan(body).fields.items():
        check(span, decoded(body)[key])


@given(BODIES, st.data())
def test_a_splice_replaces_what_it_names_and_keeps_every_other_byte(body, data):
    request = scan(body)
    chosen = [name for name in request.fields if data.draw(st.booleans())]
    inserts = {name: data.draw(padded(SCALARS)).encode() for name in chosen}
    edits = [Splice(request.fields[name].start, request.fields[name].end, inserts[name]) for name in chosen]
    edited = splice(body, data.draw(st.permutations(edits)))

    assert decoded(edited) == decoded(body) | {name: decoded(insert) for name, insert in inserts.items()}
    around, at = [], 0
    for edit in edits:
        around.append(body[at : edit.start])
        at = edit.end
    around.append(body[at:])
    rest = edited
    for kept, name in zip(around, [*chosen, None], strict=True):
        assert rest.startswith(kept)
        rest = rest[len(kept) + len(inserts.get(name, b"")) :]
    assert rest == b""


@given(BODIES)
def test_no_splice_changes_nothing(body):
    assert splice(body, []) == body


def test_an_insertion_lands_where_it_says():
    assert splice(b"abc", [Splice(3, 3, b"!"), Splice(0, 0, b"<"), Splice(1, 2, b"B")]) == b"<aBc!"


@pytest.mark.parametrize(
    "edits",
    [[Splice(0, 2, b""), Splice(1, 3, b"")], [Splice(2, 1, b"")], [Splice(0, 4, b"")], [Splice(-1, 1, b"")]],
)
def test_splices_that_overlap_or_lie_outside_are_refused(edits):
    with pytest.raises(ValueError, match="splice"):
        splice(b"abc", edits)


def whole(body: bytes) -> Span:
    """The span of the body's own object."""
    return Span(body.index(b"{"), body.rindex(b"}") + 1)


def is_cut_of(shorter: bytes, body: bytes, cuts: list[Splice]) -> bool:
    """Whether nothing was put in, and every byte outside of the cuts is there in its order."""
    gone = {at for cut in cuts for at in range(cut.start, cut.end)}
    return bytes(byte for at, byte in enumerate(body) if at not in gone) == shorter and not any(
        cut.insert for cut in cuts
    )


@given(BODIES, st.data())
def test_members_are_taken_out_and_every_other_byte_stays(body, data):
    parsed = decoded(body)
    gone = {name for name in parsed if data.draw(st.booleans())}
    cuts = without(body, whole(body), gone | {"no member of it"})
    shorter = splice(body, cuts)
    assert list(decoded(shorter).items()) == [(name, value) for name, value in parsed.items() if name not in gone]
    assert is_cut_of(shorter, body, cuts)
    assert list(scan(shorter).fields) == [name for name in parsed if name not in gone]


@given(padded(arrays(VALUES)).map(str.encode), st.data())
def test_elements_are_taken_out_and_every_other_byte_stays(body, data):
    parsed = decoded(body)
    gone = {at for at in range(len(parsed)) if data.draw(st.booleans())}
    cuts = without_elements(body, Span(body.index(b"["), body.rindex(b"]") + 1), gone | {len(parsed)})
    shorter = splice(body, cuts)
    assert decoded(shorter) == [value for at, value in enumerate(parsed) if at not in gone]
    assert is_cut_of(shorter, body, cuts)


@pytest.mark.parametrize(
    ("names", "left"),
    [
        ("a", b'{ "b" : 2 ,\n"c":[","] }'),
        ("b", b'{ "a":1 ,\n"c":[","] }'),
        ("c", b'{ "a":1 , "b" : 2 }'),
        ("ab", b'{ "c":[","] }'),
        ("bc", b'{ "a":1 }'),
        ("ac", b'{ "b" : 2 }'),
        ("abc", b"{  }"),
        ("", b'{ "a":1 , "b" : 2 ,\n"c":[","] }'),
    ],
)
def test_a_member_goes_with_one_comma(names, left):
    body = b'{ "a":1 , "b" : 2 ,\n"c":[","] }'
    assert splice(body, without(body, whole(body), names)) == left


@given(BODIES, st.data())
def test_a_member_is_put_in_behind_one_that_stays_while_others_go_and_change(body, data):
    fields = scan(body).fields
    if not fields or "new\n" in fields:
        return
    anchor = data.draw(st.sampled_from(list(fields)))
    gone = {name for name in fields if name != anchor and data.draw(st.booleans())}
    edits = [member_after(fields[anchor], "new\n", b"[7]"), *without(body, whole(body), gone)]
    expected = {name: value for name, value in decoded(body).items() if name not in gone} | {"new\n": ["7"]}
    if data.draw(st.booleans()):
        edits.append(Splice(fields[anchor].start, fields[anchor].end, b'"other"'))
        expected[anchor] = "other"
    edited = decoded(splice(body, data.draw(st.permutations(edits))))
    assert edited == expected
    assert list(edited)[list(edited).index(anchor) + 1] == "new\n"


def test_no_object_and_no_array_has_nothing_to_take_out():
    with pytest.raises(InvalidBody):
        without(b"[1]", Span(0, 3), "a")
    with pytest.raises(InvalidBody):
        without_elements(b'{"a":1}', Span(0, 7), {0})


@given(BODIES, st.data())
def test_a_key_that_stands_twice_is_refused_however_it_is_spelled_and_wherever_it_stands(body, data):
    fields = scan(body).fields
    if not fields:
        return
    key = data.draw(st.sampled_from(list(fields)))
    again = data.draw(strings(st.just(key))) + ":" + data.draw(st.sampled_from(["1", "null", '"a"', "[1,1]"]))
    at = data.draw(st.sampled_from(sorted({body.index(b"{") + 1, body.rindex(b"}")})))
    joined = again + "," if at == body.index(b"{") + 1 else "," + again
    with pytest.raises(InvalidBody, match="twice"):
        scan(splice(body, [Splice(at, at, joined.encode())]))


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":1}',
        b'{"a":1,"a":2,"b":3}',
        b'{"a":1,"b":2,"a":1}',
        b'{"a":12,"a":1}',
        b'{"a":1,"a":12}',
        b'{"a":1.5e3,"a":1.5}',
        b'{"a":1,"\\u0061":1}',
        b'{"\\u0061":1,"a":1}',
        b'{"model":"m","\\u006dodel":"m"}',
        # What the decoder keeps is as long as what stands first, so that a walk by lengths alone would fit.
        b'{"a":"x\\",\\"b\\":1","b":1,"a":"xxxxxxxxxxx"}',
        b'{"a":[1,2],"b":3,"a":[1,9]}',
        b'{"a":{"b":1},"a":{"b":2}}',
        b'{"":1,"":1}',
    ],
)
def test_a_key_that_stands_twice_is_refused(body):
    with pytest.raises(InvalidBody, match="twice"):
        scan(body)


def test_a_nested_key_that_stands_twice_passes_the_scan_and_not_the_look_at_its_members():
    body = b'{"metadata":{"a":1,"a":2}}'
    span = scan(body).fields["metadata"]
    with pytest.raises(InvalidBody, match="twice"):
        members(body, span)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b'"a"',
        b"1",
        b"null",
        b"{}x",
        b"{} {}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":[NaN]}',
        b'{"a":1,}',
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":.5}',
        b'{"a":1.}',
        b'{"a":"\\x"}',
        b'{"a":"\\u12"}',
        b'{"a":"\n"}',
        b'{"a":"\x00"}',
        b"{'a':1}",
        b'{"a":1//x\n}',
        b'{"a":"\\ud800"}',
        b'{"a":"\\udc00"}',
        b'{"a":"\\ud800\\u0041"}',
        b'{"\\ud800":1}',
        b'{"a":{"b":["\\udfff"]}}',
        b'{"a":"\xff"}',
        b'{"a":"\xc3"}',
        b'{"a":"\xc0\xaf"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\xf4\x90\x80\x80"}',
        b'\xef\xbb\xbf{"a":1}',
        b'\x00{"a":1}',
        b'{"a":1}\x00',
    ],
)
def test_what_a_json_object_cannot_be_is_refused(body):
    with pytest.raises(InvalidBody):
        scan(body)


@pytest.mark.parametrize("build", [nested, mixed])
def test_two_hundred_levels_pass_and_one_more_is_refused(build):
    assert scan(build(DEPTH_MAX)).fields
    with pytest.raises(InvalidBody, match="deeper than 200"):
        scan(build(DEPTH_MAX + 1))


@pytest.mark.parametrize("build", [nested, mixed])
@pytest.mark.parametrize("depth", [400, 1_000, 5_000, 100_000])
def test_any_greater_depth_is_refused(build, depth):
    with pytest.raises(InvalidBody):
        scan(build(depth))


@pytest.mark.parametrize("bracket", [b"[", b'{"a":', b'[{"a":'])
def test_a_depth_that_is_never_closed_is_refused(bracket):
    with pytest.raises(InvalidBody):
        scan(b'{"a":' + bracket * 100_000)


@given(
    st.lists(strings(st.text('{}[]"\\\n\u0000n', max_size=6)), min_size=60, max_size=70),
    st.sampled_from([DEPTH_MAX - 3, DEPTH_MAX + 1]),
)
@settings(max_examples=50, deadline=None)
@example(['"{\\n"'] * 300, 3)
@example(['"\\\\"', '"[[["'] * 150, DEPTH_MAX - 3)
def test_brackets_in_strings_are_no_depth(texts, depth):
    inside = nested(depth)[len(b'{"a":') : -1]
    items = ",".join('{"c":[' + text + "]}" for text in texts)
    body = f'{{"m":[{items}],"a":{inside.decode()}}}'.encode()
    if depth <= DEPTH_MAX:
        assert list(scan(body).fields) == ["m", "a"]
    else:
        with pytest.raises(InvalidBody, match="deeper than 200"):
            scan(body)


@pytest.mark.parametrize("size", [2 << 20, 32 << 20])
def test_megabytes_of_brackets_are_refused_without_a_look_at_each(size):
    element = b"[" * 190 + b"]" * 190 + b","
    with pytest.raises(InvalidBody, match="brackets"):
        scan(b'{"a":[' + element * (size // len(element)) + b"[]]}")


@given(st.binary(max_size=60))
@settings(max_examples=400)
def test_no_bytes_raise_anything_but_invalid_body(body):
    try:
        request = scan(body)
    except InvalidBody:
        return
    assert list(request.fields) == list(decoded(body))


@given(BODIES, st.data())
@settings(max_examples=200)
def test_a_broken_body_raises_nothing_but_invalid_body_and_what_passes_is_json(body, data):
    at = data.draw(st.integers(0, len(body)))
    cut = data.draw(st.integers(0, 3))
    junk = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from([b'"', b"\\", b"{", b"}", b",", b":", b"\\ud8"])))
    broken = body[:at] + junk + body[at + cut :]
    try:
        request = scan(broken)
    except InvalidBody:
        return
    pairs = json.loads(broken, parse_int=str, parse_float=str, object_pairs_hook=list, parse_constant=pytest.fail)
    assert [key for key, _ in pairs] == list(request.fields)
    read_everything(request)


def read_everything(request: MessageRequest) -> None:
    """Every field that the gateway reads; InvalidBody is the one thing that may be raised."""
    for name in ("model", "stream"):
        try:
            getattr(request, name)
        except InvalidBody:
            pass
    assert request.max_tokens >= 0
    assert isinstance(request.metadata_user_id, str)
    assert request.cache_marks >= 0
    assert request.uses_server_state in (True, False)


@given(
    st.dictionaries(
        st.sampled_from(["model", "stream", "max_tokens", "metadata", "container", "cache_control"]), VALUES, max_size=4
    )
)
def test_reading_the_fields_raises_nothing_but_invalid_body(fields):
    read_everything(scan(("{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}").encode()))


@pytest.mark.parametrize(
    ("model", "read"),
    [
        (b'"claude-sonnet-4-6"', "claude-sonnet-4-6"),
        (b'"claude\\u002dsonnet"', "claude-sonnet"),
        ('"mô-hình"'.encode(), "mô-hình"),
        (b'""', ""),
    ],
)
def test_the_model_is_read_in_any_spelling(model, read):
    assert scan(b'{"model": ' + model + b"}").model == read


@pytest.mark.parametrize("body", [b"{}", b'{"model":null}', b'{"model":1}', b'{"model":["a"]}', b'{"Model":"a"}'])
def test_a_request_without_a_model_is_refused_when_it_is_asked_for_one(body):
    with pytest.raises(InvalidBody, match="model"):
        scan(body).model  # noqa: B018


@pytest.mark.parametrize(
    ("raw", "streamed"), [(b'{"stream":true}', True), (b'{"stream":false}', False), (b'{"stream":null}', False)]
)
def test_a_stream_is_asked_for_by_true_alone(raw, streamed):
    assert scan(raw).stream is streamed
    assert scan(b"{}").stream is False


@pytest.mark.parametrize("value", [b"1", b"0", b'"true"', b"{}", b"[]"])
def test_a_stream_that_is_no_boolean_is_refused(value):
    with pytest.raises(InvalidBody, match="stream"):
        scan(b'{"stream":' + value + b"}").stream  # noqa: B018


@pytest.mark.parametrize(
    ("value", "read"),
    [(b"1024", 1024), (b"0", 0), (b"-1", 0), (b"1.0", 0), (b"1e3", 0), (b'"1024"', 0), (b"null", 0), (b"9" * 19, 0)],
)
def test_max_tokens_is_a_whole_number_or_nothing(value, read):
    assert scan(b'{"max_tokens":' + value + b"}").max_tokens == read
    assert scan(b"{}").max_tokens == 0


@pytest.mark.parametrize(
    ("metadata", "user"),
    [
        (b'{"user_id":"an"}', "an"),
        (b'{"x":{"user_id":"no"},"user\\u005fid" : "b\\u1ea3o"}', "bảo"),
        (b'{"user_id":null}', ""),
        (b'{"user_id":7}', ""),
        (b'{"user_id":["an"]}', ""),
        (b"{}", ""),
        (b"null", ""),
        (b'"an"', ""),
        (b'{"user_id":"an","score":1e999}', "an"),
        (b'{"user_id":"an","count":' + b"9" * 5000 + b"}", "an"),
    ],
)
def test_the_user_of_the_metadata_is_read_whatever_stands_beside_it(metadata, user):
    assert scan(b'{"metadata":' + metadata + b"}").metadata_user_id == user
    assert scan(b"{}").metadata_user_id == ""


@given(VALUES)
def test_cache_marks_are_the_cache_control_keys_of_the_whole_body(value):
    def count(parsed) -> int:
        if isinstance(parsed, dict):
            return sum((key == "cache_control") + count(inner) for key, inner in parsed.items())
        return sum(map(count, parsed)) if isinstance(parsed, list) else 0

    body = json.dumps({"a": json.loads(value, parse_float=str)}).encode()
    assert scan(body).cache_marks == count(json.loads(body))


def test_text_that_speaks_of_cache_control_is_no_mark():
    texts = ["cache_control", '"cache_control": {}', "cache_control:"]
    body = json.dumps({"messages": texts, "name": "cache_control", "system": [{"cache_control": None}]}).encode()
    assert scan(body).cache_marks == 1


@pytest.mark.parametrize("name", ["thread", "previous_message_id", "container"])
def test_state_that_lives_at_anthropic_is_seen(name):
    assert scan(json.dumps({name: "x"}).encode()).uses_server_state
    assert not scan(json.dumps({"messages": [{name: "x"}]}).encode()).uses_server_state


def test_numbers_keep_their_spelling():
    body = b'{"temperature":1.0,"top_p":1E-0,"max_tokens":0.10}'
    request = scan(body)
    assert (request.raw("temperature"), request.raw("top_p"), request.raw("nothing")) == (b"1.0", b"1E-0", None)
    assert math.isclose(float(request.raw("max_tokens")), 0.1)


@pytest.mark.parametrize("raw", [b"1", b'"a"', b"[]", b"null"])
def test_members_of_what_is_no_object_are_refused(raw):
    with pytest.raises(InvalidBody):
        members(raw, Span(0, len(raw)))


@pytest.mark.parametrize("raw", [b"1", b'"a"', b"{}", b"null"])
def test_elements_of_what_is_no_array_are_refused(raw):
    with pytest.raises(InvalidBody):
        elements(raw, Span(0, len(raw)))


def test_a_body_with_more_keys_than_any_use_has_is_refused_before_they_are_made():
    many = b'{"model":"m","metadata":{' + b",".join(b'"%d":1' % number for number in range(100_001)) + b"}}"
    with pytest.raises(InvalidBody, match="keys"):
        scan(many)


def test_strings_full_of_brackets_are_looked_through_up_to_a_bound():
    with pytest.raises(InvalidBody, match="brackets"):
        scan(b'{"a":[' + b",".join([b'"[{"'] * 300_000) + b"]}")


@pytest.mark.parametrize("spaces", [0, 1, 15, 16, 17, 1000, 300_000])
def test_any_run_of_spaces_is_stepped_over(spaces):
    body = (
        b'{"a":1,'
        + b" " * spaces
        + b'"model"'
        + b"\n" * spaces
        + b":"
        + b"\t" * spaces
        + b'"m"'
        + b"\r" * spaces
        + b"}"
    )
    assert scan(body).fields["model"].of(body) == b'"m"'


@pytest.mark.parametrize(
    ("raw", "speed"),
    [
        ('"fast"', "fast"),
        ('"f\\u0061st"', "fast"),
        ('"standard"', "standard"),
        ("null", "standard"),
        ('["\\n"]', "standard"),
    ],
)
def test_speed_is_what_is_asked_for_however_it_is_spelled(raw, speed):
    assert scan(b'{"model":"m","speed":%b}' % raw.encode()).speed == speed
