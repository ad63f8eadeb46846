"""A conversation stays with the fallback that answered it, for a while."""

from headgate.policy.stickiness import CONVERSATIONS_MAX, STICKS_S, Stickiness


def test_a_conversation_stays_where_it_went_on_until_it_has_paused():
    sticky = Stickiness()
    assert sticky.model_of("an", "c1", 0.0) == ""
    sticky.served("an", "c1", "haiku", 0.0)
    assert sticky.model_of("an", "c1", STICKS_S - 1) == "haiku"
    sticky.served("an", "c1", "haiku", STICKS_S - 1)
    assert sticky.model_of("an", "c1", 2 * STICKS_S - 2) == "haiku"
    assert sticky.model_of("an", "c1", 2 * STICKS_S) == ""
    assert len(sticky) == 0


def test_a_conversation_is_its_persons():
    sticky = Stickiness()
    sticky.served("an", "c1", "haiku", 0.0)
    assert sticky.model_of("binh", "c1", 1.0) == ""


def test_memory_is_bounded_and_the_oldest_goes_first():
    sticky = Stickiness()
    for number in range(CONVERSATIONS_MAX + 5):
        sticky.served("an", str(number), "haiku", 0.0)
    assert len(sticky) == CONVERSATIONS_MAX
    assert sticky.model_of("an", "4", 1.0) == ""
    assert sticky.model_of("an", "5", 1.0) == "haiku"
