"""What the scorer takes without HTTP, measured on the predictable model."""

import pytest

from service.errors import CorruptHistoryError
from service.profile import profile, shapes_of
from service.shapes import Shape
from tests.service.dummy_model import HISTORY_LENGTH, DummyModel

SHAPE = Shape(3, 5, 4)


def test_shapes_are_every_combination():
    assert shapes_of([1, 8], [10], [5, 50]) == [
        *(Shape(1, 10, 5), Shape(1, 10, 50), Shape(8, 10, 5), Shape(8, 10, 50))
    ]


async def test_each_shape_is_run_as_it_was_asked(store):
    model = DummyModel()
    (row,) = await profile(model, store, [SHAPE], users=4, seconds=0.05)
    assert (row.batch, row.candidates, row.length) == SHAPE
    assert {run.history_items.shape for run in model.runs} == {(3, 4)}
    assert {run.candidate_items.shape for run in model.runs} == {(3, 5)}
    assert all(run.history_items.all() for run in model.runs), "nobody's history is shorter"


async def test_the_stages_of_a_batch_add_up_to_what_requests_take(store):
    """A stage may overlap the run of the batch before; the run itself overlaps no other."""
    model = DummyModel()
    model.takes_s = 0.01
    (row,) = await profile(model, store, [SHAPE], users=4, seconds=0.1)
    assert row.infer_ms >= 10
    assert row.fetch_ms > 0
    assert row.encode_ms > 0
    assert 0 < row.requests_per_s <= 3 / 0.01
    assert row.added_peak_bytes >= 0
    assert row.as_dict()["infer_ms"] == row.infer_ms


async def test_each_length_has_users_of_its_own_and_no_others_are_touched(store, redis):
    redis.set("history:ann", b"x" * 12)
    shapes = [Shape(1, 1, 2), Shape(1, 1, HISTORY_LENGTH)]
    rows = await profile(DummyModel(), store, shapes, users=2, seconds=0.01)
    assert [row.length for row in rows] == [2, HISTORY_LENGTH]
    lengths = {key.decode(): redis.strlen(key) // 12 for key in redis.scan_iter()}
    assert lengths == {
        "history:ann": 1,
        "history:profile-2-0": 2,
        "history:profile-2-1": 2,
        f"history:profile-{HISTORY_LENGTH}-0": HISTORY_LENGTH,
        f"history:profile-{HISTORY_LENGTH}-1": HISTORY_LENGTH,
    }


async def test_a_request_that_fails_ends_it(store, redis):
    for user in range(2):
        redis.set(f"history:profile-4-{user}", b"x")
    with pytest.raises(CorruptHistoryError):
        await profile(DummyModel(), store, [SHAPE], users=2, seconds=0.01)
