"""onnxruntime without memory, for real: a process that may not have more than it has."""

import json
import subprocess
import sys

from tests.service.live_service import PATIENCE_S

# Scores requests one by one, then takes the memory away, and scores all of them in one batch.
PROGRAM = """
import asyncio, json, resource, sys
from pathlib import Path
import numpy as np
from service.batcher import Batcher
from service.cost import BatchCost
from service.history import HistoryStore
from service.metrics import Metrics
from service.model import OnnxModel
from service.redis_nodes import connect
from service.scorer import BatchScorer, DeviceThread, ScoreRequest
from service.turns import SharedDevice
from tests.service.histories import NOW, records, steps
from tests.service.tiny_bundle import ITEM_IDS

REQUESTS, CANDIDATES, SLACK_BYTES = 1024, 1000, 12 * 2**20

async def main():
    model = OnnxModel(Path(sys.argv[1]), threads=1)
    metrics = Metrics()
    arm = metrics.of_arm("main", "tiny-1")
    store = HistoryStore(connect("redis://127.0.0.1:1/0", timeout_s=1.0), prefix="h", keep=8)
    device = DeviceThread()
    scorer = BatchScorer(model, store, arm, device=device, on_redis_failure="refuse")
    rng = np.random.default_rng(1)
    ready = []
    for n in range(REQUESTS):
        request = ScoreRequest(
            user_id=str(n),
            candidates=rng.choice(ITEM_IDS, CANDIDATES),
            ranking_time=NOW + 10,
            history=records(*steps(*rng.choice(ITEM_IDS, 8).tolist())),
        )
        ready += await scorer.prepare([request])
    expected = [(await scorer.run([one]))[0].scores for one in ready]

    async def prepared(batch):
        return batch

    batcher = Batcher(
        seat=SharedDevice().seat(1.0), prepare=prepared, run=scorer.run,
        size=scorer.prepared_size, prepared_size=scorer.prepared_size, shapes=model.shapes,
        cost=BatchCost(), short_s=0.0, margin_s=0.0, max_batch_work=10**9, max_queue_work=10**9,
        metrics=arm,
    )
    batcher.start()
    lines = Path("/proc/self/status").read_text().splitlines()
    size_bytes = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + SLACK_BYTES,) * 2)
    answers = [batcher.submit(one, deadline=float("inf")) for one in ready]
    found = [(await answer)[0].scores for answer in answers]
    wrong = sum(not np.allclose(*pair, atol=1e-6) for pair in zip(found, expected, strict=True))
    metrics.text()
    value = metrics.registry.get_sample_value
    labels = {"arm": "main", "version": "tiny-1"}
    print(json.dumps({
        "answered": len(found), "wrong": wrong,
        "failures": value("mneme_device_memory_failures_total", labels),
        "batches": value("mneme_batch_requests_count", labels) - REQUESTS,
        "limit": value("mneme_batch_work_limit", labels),
    }))
    await batcher.stop()
    device.shutdown()

asyncio.run(main())
"""


def test_a_batch_for_which_there_is_no_memory_is_scored_in_parts(good_bundle):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, good_bundle],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["answered"], said["wrong"]) == (1024, 0)
    assert said["failures"] >= 1
    assert said["batches"] >= 2
    assert said["limit"] <= 1024 * 1000 * 8 / 2
    assert done.stderr == "device-out-of-memory\n", "onnxruntime has its own words for it"
