"""The peers' share of the work: a batch gets the scores that onnxruntime gives each request."""

import json
import os
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import onnxruntime as ort
import pytest
from redis import Redis

from contract.bundle import read_catalogue, read_manifest
from contract.encoding import encode
from contract.errors import RecordError
from contract.features import DAY_S
from contract.records import encode_records
from loadtest.peers.install import HEADERS, PEERS, Peer, PeerUnavailableError, ensure_venv, start
from loadtest.peers.scoring import BatchScorer, PeerOptions, bundle_scorer
from loadtest.redis_server import redis_server
from tests.service.tiny_bundle import HISTORY_LENGTH, ITEM_IDS, make_bundle

UNKNOWN_ITEM = 999
HISTORY_LENGTHS = [0, 1, HISTORY_LENGTH - 3, HISTORY_LENGTH, HISTORY_LENGTH + 5]
TORCH = next(peer for peer in PEERS if peer.name == "torch")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module")
def now() -> int:
    return int(time.time())


@pytest.fixture(scope="module")
def histories(now) -> dict[str, bytes]:
    """One user for each length; times stand in the middle of their buckets, away from any edge."""
    rng = np.random.default_rng(0)
    elapsed = DAY_S * 3 // 2 * 2 ** np.arange(6)
    items = np.append(ITEM_IDS, UNKNOWN_ITEM)
    return {
        f"user-{n}": encode_records(rng.choice(items, n), np.sort(now - rng.choice(elapsed, n)))
        for n in HISTORY_LENGTHS
    }


@pytest.fixture(scope="module")
def redis_url(histories):
    with redis_server() as url, Redis.from_url(url) as redis:
        for user_id, raw in histories.items():
            redis.set(f"history:{user_id}", raw)
        redis.set("history:broken", b"\1" * 11)
        yield url


def options(bundle, redis_url, *, dummy=False) -> PeerOptions:
    return PeerOptions(model=bundle, redis_url=redis_url, port=0, threads=1, dummy=dummy)


@pytest.fixture(scope="module")
def expected(bundle, histories, now):
    """What onnxruntime gives one request alone, with a history of full length."""
    manifest = read_manifest(bundle)
    catalogue = read_catalogue(bundle, manifest)
    session = ort.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])

    def score(user_id, candidates):
        inputs, _ = encode(
            [histories.get(user_id, b"")],
            np.array([candidates]),
            np.array([now]),
            catalogue,
            manifest.features,
        )
        return session.run(["scores"], inputs.as_feed())[0][0]

    return score


@pytest.mark.parametrize("n", HISTORY_LENGTHS)
def test_one_request_gets_the_scores_of_onnxruntime(bundle, redis_url, expected, n):
    request = (f"user-{n}", [10, 11, UNKNOWN_ITEM, 59])
    (scores_C,) = bundle_scorer(options(bundle, redis_url))([request])
    np.testing.assert_allclose(scores_C, expected(*request), atol=1e-6)


def test_a_batch_gives_each_request_its_own_scores(bundle, redis_url, expected):
    """Users differ in the length of the history, requests in the number of candidates."""
    requests = [
        (user_id, ITEM_IDS[u : 2 * u + 1].tolist())
        for u, user_id in enumerate([*(f"user-{n}" for n in HISTORY_LENGTHS), "nobody"])
    ]
    scores = bundle_scorer(options(bundle, redis_url))(requests)
    assert [len(row) for row in scores] == [len(candidates) for _, candidates in requests]
    for row, request in zip(scores, requests, strict=True):
        np.testing.assert_allclose(row, expected(*request), atol=1e-6)
    assert len({float(row[-1]) for row in scores}) == len(scores)


@pytest.mark.parametrize(
    ("users", "length"),
    [
        pytest.param(["nobody"], 1, id="nobody"),
        pytest.param(["user-1", "user-5"], 5, id="short"),
        pytest.param(["user-1", "user-13"], HISTORY_LENGTH, id="overlong"),
    ],
)
def test_a_batch_is_one_run_as_long_as_its_longest_history(bundle, redis_url, users, length):
    manifest = read_manifest(bundle)
    shapes = []

    def model(inputs):
        shapes.append((inputs.history_items.shape, inputs.candidate_items.shape))
        return np.zeros(inputs.candidate_items.shape, dtype=np.float32)

    scorer = BatchScorer(redis_url, read_catalogue(bundle, manifest), manifest.features, model)
    scorer([(user_id, [10, 11]) for user_id in users])
    assert shapes == [((len(users), length), (len(users), 2))]


def test_a_value_that_is_no_history_is_an_error(bundle, redis_url):
    with pytest.raises(RecordError, match="11 bytes"):
        bundle_scorer(options(bundle, redis_url))([("broken", [10])])


def test_the_dummy_answers_a_constant_for_every_candidate(bundle, redis_url):
    scores = bundle_scorer(options(bundle, redis_url, dummy=True))(
        [("user-1", [10]), ("a", [1, 2])]
    )
    assert [row.tolist() for row in scores] == [[0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("name", "body", "answer"),
    [
        ("bentoml", {"requests": [{"user_id": "u", "candidates": [1, 2]}]}, [[0.5, 0.25]]),
        ("litserve", {"user_id": "u", "candidates": [1, 2]}, {"scores": [0.5, 0.25]}),
        (
            "triton",
            {
                "inputs": [
                    {"name": "user_id", "datatype": "BYTES", "shape": [1, 1], "data": ["u"]},
                    {"name": "candidates", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]},
                ]
            },
            {"outputs": [{"name": "scores", "data": [0.5, 0.25]}]},
        ),
    ],
)
def test_each_peer_is_asked_in_its_own_form(name, body, answer):
    peer = next(peer for peer in PEERS if peer.name == name)
    assert json.loads(peer.body("u", [1, 2])) == body
    assert peer.scores(json.dumps(answer).encode()) == [0.5, 0.25]


def test_peers_share_the_versions_of_the_project():
    """Other packages may race, not other versions of the same; PyTriton excludes numpy 2."""
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    ours = dict(line.split("==") for line in constraints if "==" in line)
    for peer in PEERS:
        pins = dict(pin.split("==") for pin in peer.requirements)
        other = {name for name, version in pins.items() if ours.get(name, version) != version}
        assert other == ({"numpy"} if peer.name == "triton" else set()), peer.name


def test_a_started_peer_scores_and_is_gone_after_the_block(bundle, redis_url, expected):
    """The torch peer needs nothing that this environment lacks."""
    checkpoint = bundle.parent / "model.pt"
    core = min(os.sched_getaffinity(0))
    request = (f"user-{HISTORY_LENGTH}", [10, 11])
    with (
        start(TORCH, Path(sys.executable), checkpoint, redis_url, cores=[core]) as url,
        httpx.Client(base_url=url, headers=HEADERS) as client,
    ):
        answer = client.post(TORCH.score_path, content=TORCH.body(*request))
    np.testing.assert_allclose(TORCH.scores(answer.content), expected(*request), atol=1e-4)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_server_that_ends_is_unavailable_and_its_words_are_kept(tmp_path, redis_url):
    with (
        pytest.raises(PeerUnavailableError, match=r"(?s)status 1\n.*no such file"),
        start(TORCH, Path(sys.executable), tmp_path / "nothing.pt", redis_url),
    ):
        pytest.fail("the block must not run")


def test_a_peer_without_its_python_is_unavailable(tmp_path):
    peer = Peer(**{**vars(TORCH), "python": Path("/nowhere/python")})
    with pytest.raises(PeerUnavailableError, match="/nowhere/python: No such file"):
        ensure_venv(peer, tmp_path)
