"""Keys beside others in a cluster's slots."""

from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from service.hash_tags import beside

BRACES = st.text(alphabet="{}ab", max_size=8)


@given(BRACES | st.text(max_size=20))
def test_it_stands_in_the_same_slot_whatever_the_braces(user):
    key = f"history:{user}".encode()
    assert key_slot(beside(key, prefix="other:", suffix=":more")) == key_slot(key)


def test_it_reads_like_the_key_that_it_stands_beside():
    assert beside(b"history:ann", prefix="p:", suffix=":s") == b"p:{history:ann}:s"
    assert beside(b"{shop}:ann", prefix="p:", suffix=":s") == b"p:{shop}:s"
