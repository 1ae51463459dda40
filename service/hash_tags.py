"""Keys of Redis Cluster that must stand in one slot.

The slot of a key is that of its hash tag: what stands between its first `{` and the next `}`, where
that is anything, and else the whole key.
"""

from binascii import crc_hqx
from functools import cache
from itertools import count

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot


def beside(key: bytes, *, prefix: str, suffix: str) -> bytes:
    """Return `<prefix>{tag}<suffix>`, in the slot of `key`; neither may hold braces."""
    return b"%b{%b}%b" % (prefix.encode(), _tag(key), suffix.encode())


def _tag(key: bytes) -> bytes:
    _, opening, rest = key.partition(b"{")
    tag, closing, _ = rest.partition(b"}")
    if opening and closing and tag:
        return tag
    # A `}` of its own would end the tag too early.
    return _tag_of_slot(key_slot(key)) if b"}" in key else key


@cache  # there are 16,384 slots
def _tag_of_slot(slot: int) -> bytes:
    tags = (b"%d" % n for n in count())
    return next(tag for tag in tags if crc_hqx(tag, 0) % REDIS_CLUSTER_HASH_SLOTS == slot)
