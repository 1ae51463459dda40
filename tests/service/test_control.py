"""Messages between two ends."""

import asyncio
import socket

import pytest

from service.control import Link


@pytest.fixture
async def ends():
    one, other = socket.socketpair()
    here, there = await Link.over(one), await Link.over(other)
    yield here, there
    await here.close()
    await there.close()


async def test_what_is_said_is_heard_in_order_until_the_other_end_is_gone(ends):
    here, there = ends
    here.say("accept", experiment={"salt": "a\nb"}, background=False)
    here.say("accept")
    await here.close()
    assert [said async for said in there] == [
        {"message": "accept", "experiment": {"salt": "a\nb"}, "background": False},
        {"message": "accept"},
    ]


async def test_a_long_reason_arrives_whole(ends):
    here, there = ends
    here.say("failed", reason="x" * 200_000)
    await here.close()
    assert [len(said["reason"]) async for said in there] == [200_000]


async def test_nobody_fails_by_talking_to_a_gone_end(ends):
    here, there = ends
    await there.close()
    for _ in range(100):
        here.say("alive")
    assert [said async for said in here] == []


async def test_last_words_of_an_end_that_has_not_listened_are_heard():
    """Linux resets the connection then, and the error must not come before the words."""
    ours, theirs = socket.socketpair()
    link = await Link.over(ours)
    link.say("status")
    theirs.sendall(b'{"message": "failed"}\n')
    theirs.close()  # "status" is unread
    await asyncio.sleep(0.05)
    assert [said async for said in link] == [{"message": "failed"}]
    await link.close()
