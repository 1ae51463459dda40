"""What a worker says of itself, to somebody who plays its supervisor."""

import json
import os
import socket
import subprocess
import sys

from service.experiment import Experiment
from service.metrics import FOLDER_VARIABLE
from service.settings import Settings, write_settings
from tests.service.live_service import PATIENCE_S


def test_who_cannot_accept_says_so_and_never_that_it_serves(good_bundle, redis_url, tmp_path):
    settings = Settings(bundle=good_bundle, redis_url=redis_url, threads=1)
    start = {
        "experiment": Experiment.of_bundle(good_bundle).model_dump(mode="json"),
        "background": False,
    }
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(type=socket.SOCK_DGRAM) as no_listener:
        handed = [theirs.fileno(), no_listener.fileno()]
        ours.sendall(b'{"message": "accept"}\n')
        done = subprocess.run(
            [sys.executable, "-m", "service.worker", *map(str, handed)],
            pass_fds=handed,
            input=json.dumps(start).encode(),
            stderr=subprocess.DEVNULL,
            env={**os.environ, **write_settings(settings), FOLDER_VARIABLE: str(tmp_path)},
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 1
        theirs.close()
        said = [json.loads(line) for line in ours.makefile("rb")]
    told = [one for one in said if one["message"] != "alive"]
    assert told == [
        {"message": "ready"},
        {"message": "failed", "reason": "unexpected ValueError"},
    ]
