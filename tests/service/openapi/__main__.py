"""`python -m tests.service.openapi` asks a live service what its schema allows and forbids.

Prints one JSON object: how many requests were made, and the failures; ends with 1 where there are
some.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from loadtest.redis_server import redis_server
from service.app import create_app
from tests.service.conftest import patient_settings
from tests.service.dummy_model import DummyModel
from tests.service.live_service import live_service
from tests.service.openapi.schema_run import run_schemathesis


def main() -> int:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.service.openapi", description=__doc__)
    parser.add_argument("--examples", type=int, default=500, help="of each route")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    model = DummyModel(explains=True)
    with redis_server() as url, TemporaryDirectory() as folder:
        settings = patient_settings(url)
        with live_service(create_app(settings, lambda _: model), model, settings) as service:
            found = run_schemathesis(
                service, Path(folder), examples=chosen.examples, seed=chosen.seed
            )
    print(json.dumps({"requests": found.requests, "failures": found.failures}))
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
