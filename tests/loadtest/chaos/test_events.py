"""Events that are posted beside a load, and what is counted of them."""

import time
from collections import defaultdict

from contract.records import encode_records
from loadtest.chaos.events import EventWriter
from loadtest.redis_server import free_port
from tests.loadtest.recording_server import recording_server

EVENTS_A_POST = 4


def posted(received):
    """Return user and item of the events of a request."""
    return [(event["user_id"], event["item_id"]) for event in received.body["events"]]


def write_to(urls, *, seconds=0.5, threads=1):
    writer = EventWriter(urls, "w", threads=threads, rate=50.0)
    with writer.running(patience_s=2.0):
        time.sleep(seconds)
    return writer


def store_of(events):
    """Return how a history store that holds `events` is read."""
    items = defaultdict(list)
    for user, item in events:
        items[user].append(item)
    return lambda users: [encode_records(items[user], [1] * len(items[user])) for user in users]


def test_what_is_acknowledged_and_stored_once_is_neither_lost_nor_doubled():
    with recording_server() as server:
        writer = write_to([server.url], threads=2)
    events = [event for received in server.received for event in posted(received)]
    assert len(events) == len(set(events)) > EVENTS_A_POST
    audit = writer.audit(store_of(events))
    assert (audit.acknowledged, audit.lost, audit.doubled) == (len(events), 0, 0)
    assert (audit.retried, audit.rejected) == (0, [])


def test_an_acknowledged_event_that_is_missing_is_lost_and_one_that_stands_twice_is_doubled():
    with recording_server() as server:
        writer = write_to([server.url])
    events = [event for received in server.received for event in posted(received)]
    audit = writer.audit(store_of([*events[2:], events[-1]]))
    assert (audit.lost, audit.doubled) == (2, 1)


def test_a_post_is_repeated_with_its_key_until_it_is_acknowledged():
    """Every post is refused twice."""
    tries: dict[str, int] = defaultdict(int)

    def status(received):
        key = received.headers["idempotency-key"]
        tries[key] += 1
        return (503, 429, 200)[tries[key] - 1]

    with recording_server(status) as server:
        writer = write_to([server.url])
    bodies = defaultdict(list)
    for received in server.received:
        bodies[received.headers["idempotency-key"]].append(received.body)
    assert all(body == tried[0] for tried in bodies.values() for body in tried)
    assert {len(tried) for tried in bodies.values()} == {3}
    acknowledged = [event for received in server.received[2::3] for event in posted(received)]
    audit = writer.audit(store_of(acknowledged))
    assert audit.acknowledged == len(acknowledged)
    assert audit.retried == 2 * len(bodies)
    assert audit.lost == 0


def test_half_of_the_events_have_no_time():
    with recording_server() as server:
        write_to([server.url], seconds=0.1)
    events = server.received[0].body["events"]
    assert ["time" in event for event in events] == [False, True, False, True]


def test_what_is_never_acknowledged_may_be_stored_or_not():
    with recording_server(lambda _: 503) as server:
        writer = EventWriter([server.url], "w", threads=1, rate=50.0)
        with writer.running(patience_s=0.1):
            time.sleep(0.2)
        (event, *_) = posted(server.received[0])
    audit = writer.audit(store_of([event]))
    assert (audit.acknowledged, audit.lost, audit.doubled) == (0, 0, 0)
    assert writer.audit(store_of([event, event])).doubled == 1


def test_a_post_that_is_refused_for_good_is_not_repeated():
    with recording_server(lambda _: 422) as server:
        writer = write_to([server.url], seconds=0.2)
    keys = [received.headers["idempotency-key"] for received in server.received]
    assert len(keys) == len(set(keys))
    audit = writer.audit(store_of([]))
    assert len(audit.rejected) == len(keys)
    assert audit.rejected[0] == "422 {}"


def test_another_service_gets_what_one_that_is_away_does_not():
    with recording_server() as server:
        writer = write_to([f"http://127.0.0.1:{free_port()}", server.url])
    events = [event for received in server.received for event in posted(received)]
    audit = writer.audit(store_of(events))
    assert audit.retried == 1, "from then on the other one is asked first"
    assert audit.acknowledged == len(events) > 0
