"""What is asked of a device falls where there is no memory for it, and grows back."""

import asyncio

import pytest

from service.memory_limit import MemoryLimit

NEVER_S = 1e6


async def test_it_is_what_was_set_until_something_fails():
    assert MemoryLimit(1000).value == 1000


async def test_it_falls_to_half_of_what_failed():
    limit = MemoryLimit(1000, regrowth_s=NEVER_S)
    assert limit.lower(601)
    assert limit.value == 300


@pytest.mark.parametrize("failed", [600, 601, 5000], ids=["as large", "a little larger", "larger"])
async def test_it_does_not_rise_when_something_larger_fails_later(failed):
    limit = MemoryLimit(1000, regrowth_s=NEVER_S)
    limit.lower(600)
    assert not limit.lower(failed)
    assert limit.value == 300


async def test_it_never_falls_to_nothing():
    limit = MemoryLimit(1000, regrowth_s=NEVER_S)
    limit.lower(1)
    assert limit.value == 1


async def test_it_grows_back_by_quarters_to_what_was_set_and_no_further():
    limit = MemoryLimit(1000, regrowth_s=0.001)
    limit.lower(1000)
    seen = [limit.value]
    async with asyncio.timeout(30):
        while limit.value < 1000:
            await asyncio.sleep(0)
            if limit.value != seen[-1]:
                seen.append(limit.value)
    await asyncio.sleep(0.01)
    assert limit.value == 1000
    assert seen == [500, 625, 782, 978, 1000]


async def test_it_falls_again_while_it_grows():
    limit = MemoryLimit(1000, regrowth_s=0.05)
    limit.lower(1000)
    async with asyncio.timeout(30):
        while limit.value < 625:  # noqa: ASYNC110  # nobody is told of it
            await asyncio.sleep(0)
    assert limit.lower(limit.value)
    assert limit.value < 625
