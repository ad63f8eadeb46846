"""Times in lines, against the standard library."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from headgate.telemetry.timestamp import Timestamps

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@given(st.lists(st.integers(0, 2**62)))
def test_every_time_is_what_the_standard_library_says_in_any_order(moments: list[int]) -> None:
    times = Timestamps()
    for at_ns in moments:
        exact = EPOCH + timedelta(milliseconds=at_ns // 1_000_000)
        assert times.text(at_ns) == exact.isoformat(timespec="milliseconds").replace("+00:00", "Z")
