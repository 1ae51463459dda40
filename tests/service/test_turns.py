"""Who runs on the device next, with turns of known length and nothing to run."""

import asyncio
import time

import pytest

from service.turns import Seat, SharedDevice

TURN_S = 0.002


async def work(seat: Seat, log: list[str], name: str, seconds: float, n: int) -> None:
    for _ in range(n):
        async with seat:
            log.append(name)
            await asyncio.sleep(seconds)


async def busy_shares(*weights_and_turns: tuple[float, float]) -> list[float]:
    """Let seats compete, each with several who wait; return their shares of the seconds."""
    device = SharedDevice()
    seats = [device.seat(weight) for weight, _ in weights_and_turns]
    spent = [0.0] * len(seats)

    async def keep_busy(number: int) -> None:
        while True:
            async with seats[number]:
                began = time.perf_counter()
                await asyncio.sleep(weights_and_turns[number][1])
                spent[number] += time.perf_counter() - began

    tasks = [asyncio.create_task(keep_busy(number)) for number in range(len(seats)) for _ in "ab"]
    await asyncio.sleep(1.2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return [one / sum(spent) for one in spent]


class TestFairness:
    async def test_busy_seats_get_the_device_by_their_weights(self):
        heavy, light = await busy_shares((3.0, TURN_S), (1.0, TURN_S))
        assert heavy == pytest.approx(0.75, abs=0.05)
        assert light == pytest.approx(0.25, abs=0.05)

    async def test_seconds_count_and_not_turns(self):
        """A model whose batches take five times as long gets no more of the device."""
        slow, quick = await busy_shares((1.0, 5 * TURN_S), (1.0, TURN_S))
        assert slow == pytest.approx(0.5, abs=0.1)
        assert quick == pytest.approx(0.5, abs=0.1)

    async def test_a_light_seat_is_never_starved(self):
        _, shadow = await busy_shares((10.0, TURN_S), (1.0, TURN_S))
        assert shadow > 0.04

    async def test_who_was_idle_has_saved_nothing_up(self):
        device = SharedDevice()
        one, other = device.seat(1.0), device.seat(1.0)
        await work(one, [], "one", 0.01, 20)
        log: list[str] = []
        await asyncio.gather(
            *(work(one, log, "one", 0.01, 10) for _ in "ab"),
            *(work(other, log, "other", 0.01, 10) for _ in "ab"),
        )
        assert log[:12].count("one") >= 4

    async def test_one_seat_alone_is_first_come_first_served(self):
        seat = SharedDevice().seat(0.01)
        log: list[str] = []
        await asyncio.gather(*(work(seat, log, name, 0.0, 1) for name in "abcdef"))
        assert log == list("abcdef")

    async def test_the_device_is_never_had_by_two(self):
        device = SharedDevice()
        inside = 0

        async def alone(seat: Seat) -> None:
            nonlocal inside
            for _ in range(50):
                async with seat:
                    inside += 1
                    assert inside == 1
                    await asyncio.sleep(0)
                    inside -= 1

        seats = [device.seat(weight) for weight in (1.0, 2.0, 3.0)]
        await asyncio.gather(*(alone(seat) for seat in seats for _ in "ab"))
        assert inside == 0


class TestGivingUp:
    async def test_who_gives_up_waiting_is_passed_over(self):
        device = SharedDevice()
        one, other = device.seat(1.0), device.seat(1.0)
        log: list[str] = []
        await one.acquire()
        leaves = asyncio.create_task(work(other, log, "leaves", 0.0, 1))
        stays = asyncio.create_task(work(other, log, "stays", 0.0, 1))
        await asyncio.sleep(0)
        leaves.cancel()
        one.release()  # before the task knows that it is cancelled
        await asyncio.gather(leaves, stays, return_exceptions=True)
        assert log == ["stays"]

    async def test_who_gives_up_just_when_it_is_granted_passes_it_on(self):
        device = SharedDevice()
        one, other = device.seat(1.0), device.seat(1.0)
        log: list[str] = []
        await one.acquire()
        leaves = asyncio.create_task(work(other, log, "leaves", 0.0, 1))
        await asyncio.sleep(0)
        one.release()
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        assert log == []
        async with asyncio.timeout(5):
            await work(one, log, "next", 0.0, 1)
        assert log == ["next"]

    async def test_an_error_in_a_turn_ends_it(self):
        seat = SharedDevice().seat(1.0)
        with pytest.raises(ZeroDivisionError):
            async with seat:
                raise ZeroDivisionError
        async with asyncio.timeout(5):
            await seat.acquire()


class TestForecast:
    def test_an_idle_device_is_free_now(self):
        assert SharedDevice().seat(1.0).free_at(100.0, own_s=1.0) == 100.0

    async def test_a_turn_that_runs_is_waited_for(self):
        seat = SharedDevice().seat(1.0)
        async with seat:
            now = time.perf_counter()
            seat.expect(0.5)
            assert seat.free_at(now, own_s=1.0) == pytest.approx(now + 0.5, abs=0.3)
        assert seat.free_at(now + 1, own_s=1.0) == now + 1

    @pytest.mark.parametrize(
        ("waiting_s", "weight", "expected_s"),
        [(0.0, 1.0, 0.0), (0.2, 1.0, 0.2), (9.0, 1.0, 1.0), (9.0, 0.5, 0.5), (9.0, 3.0, 3.0)],
        ids=["nothing waits", "all of little", "as much as ours", "half as much", "thrice"],
    )
    def test_of_what_waits_elsewhere_only_the_fair_part_comes_first(
        self, waiting_s, weight, expected_s
    ):
        device = SharedDevice()
        ours, theirs = device.seat(1.0), device.seat(weight)
        theirs.waiting_s = lambda: waiting_s
        assert ours.free_at(0.0, own_s=1.0) == pytest.approx(expected_s)

    def test_who_has_left_is_not_waited_for(self):
        device = SharedDevice()
        ours, theirs = device.seat(1.0), device.seat(1.0)
        theirs.waiting_s = lambda: 9.0
        theirs.leave()
        assert ours.free_at(0.0, own_s=1.0) == 0.0
