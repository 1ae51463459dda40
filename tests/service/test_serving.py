"""What a worker says of itself, to somebody who plays its supervisor."""

import asyncio
import json
import os
import socket
from contextlib import closing

from service.experiment import Experiment
from service.forks import Template
from service.metrics import FOLDER_VARIABLE
from service.settings import Settings, write_settings
from tests.service.live_service import PATIENCE_S


async def test_who_cannot_accept_says_so_and_never_that_it_serves(good_bundle, redis_url, tmp_path):
    settings = Settings(bundle=good_bundle, redis_url=redis_url, threads=1)
    start = {
        "experiment": Experiment.of_bundle(good_bundle).model_dump(mode="json"),
        "background": False,
    }
    environment = {**os.environ, **write_settings(settings), FOLDER_VARIABLE: str(tmp_path)}
    ours, theirs = socket.socketpair()
    with (
        closing(Template(environment)) as template,
        ours,
        socket.socket(type=socket.SOCK_DGRAM) as no_listener,
        (tmp_path / "start").open("w+b") as file,
    ):
        file.write(json.dumps(start).encode())
        file.seek(0)
        ours.sendall(b'{"message": "accept"}\n')
        with theirs:
            worker = template.fork([one.fileno() for one in (file, theirs, no_listener)])
        async with asyncio.timeout(PATIENCE_S):
            assert await worker.wait() == 1
        said = [json.loads(line) for line in ours.makefile("rb")]
    told = [one for one in said if one["message"] != "alive"]
    assert told == [
        {"message": "ready"},
        {"message": "failed", "reason": "unexpected ValueError"},
    ]
