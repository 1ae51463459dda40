"""Messages between two ends."""

import asyncio
import socket
from typing import Any

import pytest
import uvloop

from service.control import Link


@pytest.fixture
async def ends():
    one, other = socket.socketpair()
    here, there = Link(one), Link(other)
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
    link = Link(ours)
    link.say("status")
    theirs.sendall(b'{"message": "failed"}\n')
    theirs.close()  # "status" is unread
    await asyncio.sleep(0.05)
    assert [said async for said in link] == [{"message": "failed"}]
    await link.close()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_the_end_of_an_end_that_has_not_listened_is_noticed_by_one_that_has_not(new_loop):
    """The supervisor's loop is asyncio's, that of workers uvloop's, which tells of it once."""

    async def heard() -> list[dict[str, Any]]:
        ours, theirs = socket.socketpair()
        link = Link(ours)
        link.say("alive")
        theirs.sendall(b'{"message": "status"}\n')
        theirs.close()
        async with asyncio.timeout(10.0):
            found = [said async for said in link]
        await link.close()
        return found

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(heard()) == [{"message": "status"}]


async def test_last_words_are_heard_by_an_end_that_goes_on_talking():
    """It finds on writing that the other one is gone, before it has read."""
    ours, theirs = socket.socketpair()
    link = Link(ours)
    theirs.sendall(b'{"message": "failed"}\n')
    theirs.close()
    link.say("status")
    link.say("status")
    assert [said async for said in link] == [{"message": "failed"}]
    await link.close()


async def test_an_end_that_is_closed_says_nothing():
    ours, theirs = socket.socketpair()
    with theirs:
        link = Link(ours)
        await link.close()
        link.say("status")
        await link.close()
        assert theirs.recv(1) == b""
