"""Posts events beside a load, with retries, and counts afterwards what the history store holds.

Every post has an `Idempotency-Key` and is repeated with the same key and body until it is
acknowledged, as a client must that cannot know whether an unanswered post arrived. Every event has
an item id of its own, and half of them no time: the service then takes the present one, so that
only the key can tell a repetition.
"""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from contract.records import decode_records

_EVENTS_A_POST = 4
# Few enough that no value is ever cut, whatever the model reads.
_POSTS_A_USER = 5
_POST_TIMEOUT_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_FIRST_ITEM = 10**12

Read = Callable[[Sequence[str]], Sequence[bytes]]
"""The whole values of users in the history store, b"" where there is none."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """`acknowledged` events; of these `lost`: not in the store; `doubled`: any that stand there
    more than once. `retried` posts; `rejected`: why posts were refused for good.
    """

    acknowledged: int
    lost: int
    doubled: int
    retried: int
    rejected: Sequence[str]


class EventWriter:
    """`threads` clients that post to the first of `urls` that answers, each `rate` times a second.

    `name`: what users' ids begin with.
    """

    def __init__(self, urls: Sequence[str], name: str, *, threads: int, rate: float) -> None:
        self._urls = list(urls)
        self._name = name
        self._pause_s = 1 / rate
        self._ended = threading.Event()
        self._give_up_at_s = float("inf")
        # Each thread has its own of these.
        self._acknowledged: list[list[tuple[str, int]]] = [[] for _ in range(threads)]
        self._posted: list[list[tuple[str, int]]] = [[] for _ in range(threads)]
        self._retried = [0] * threads
        self._rejected: list[str] = []
        self._threads = [
            threading.Thread(target=self._write, args=(number,)) for number in range(threads)
        ]

    @contextmanager
    def running(self, *, patience_s: float) -> Iterator[None]:
        """Post until the block ends; what is unanswered then is repeated for `patience_s` more."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._give_up_at_s = time.monotonic() + patience_s
            self._ended.set()
            for thread in self._threads:
                thread.join()

    def audit(self, read: Read) -> Audit:
        """Compare what was acknowledged with what the history store holds."""
        acknowledged = [event for events in self._acknowledged for event in events]
        posted = [event for events in self._posted for event in events]
        users = sorted({user for user, _ in posted})
        stored = Counter(
            (user, item)
            for user, raw in zip(users, read(users), strict=True)
            for item in decode_records(raw)["item"].tolist()
        )
        return Audit(
            acknowledged=len(acknowledged),
            lost=sum(not stored[event] for event in acknowledged),
            doubled=sum(stored[event] > 1 for event in posted),
            retried=sum(self._retried),
            rejected=self._rejected,
        )

    def _write(self, thread: int) -> None:
        with httpx.Client(timeout=_POST_TIMEOUT_S) as client:
            post = 0
            while not self._ended.is_set():
                started_s = time.monotonic()
                self._post(client, thread, post)
                post += 1
                self._ended.wait(started_s + self._pause_s - time.monotonic())

    def _post(self, client: httpx.Client, thread: int, post: int) -> None:
        events: list[dict[str, Any]] = []
        for number in range(_EVENTS_A_POST):
            user = f"{self._name}-{thread}-{post // _POSTS_A_USER}-{number}"
            item = _FIRST_ITEM + (thread * 10**6 + post) * _EVENTS_A_POST + number
            events.append({"user_id": user, "item_id": item})
            if number % 2:
                events[-1]["time"] = int(time.time())
        written = [(event["user_id"], event["item_id"]) for event in events]
        self._posted[thread] += written
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                answer = client.post(
                    f"{self._urls[0]}/events", json={"events": events}, headers=headers
                )
            except httpx.TransportError:
                self._urls.append(self._urls.pop(0))
            else:
                if answer.is_success:
                    self._acknowledged[thread] += written
                    return
                if answer.status_code not in _RETRIED:
                    self._rejected.append(f"{answer.status_code} {answer.text}")
                    return
            if time.monotonic() > self._give_up_at_s:
                return
            self._retried[thread] += 1
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
