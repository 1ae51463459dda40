"""The limit of open files: raised as far as needed, refused where it can never do."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from service.descriptors import max_connections
from service.settings import Settings, SettingsError
from tests.service.live_service import PATIENCE_S

# Prints how many connections may be, and the limit of open files afterwards.
ASK = """
import resource, sys
from pathlib import Path
from service.descriptors import max_connections
from service.settings import Settings
soft, hard, asked = (int(one) if one != "None" else None for one in sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(max_connections(Settings(bundle=Path("b"), max_connections=asked)))
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def asked_with(soft: int, hard: int, connections: int | None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", ASK, str(soft), str(hard), str(connections)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4_300,
    reason="a process may open too few files here: raise the limit, ulimit -Hn 4300",
)
@pytest.mark.parametrize(
    ("soft", "hard", "connections", "most", "limit"),
    [
        pytest.param(256, 4_300, None, 2048, 4224, id="as many as usual"),
        pytest.param(256, 1128, None, 500, 1128, id="as many as fit"),
        pytest.param(256, 4_300, 100, 100, 328, id="as many as asked for"),
        pytest.param(1000, 4_300, 100, 100, 1000, id="the limit is never lowered"),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_needed(soft, hard, connections, most, limit):
    done = asked_with(soft, hard, connections)
    assert done.stdout.splitlines() == [str(most), str((limit, hard))], done.stderr


def test_more_than_can_ever_fit_are_refused():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard != resource.RLIM_INFINITY, "Linux has a limit"
    settings = Settings(bundle=Path("b"), max_connections=hard)
    message = (
        rf"max_connections: {hard:,} connections may need {2 * hard + 128:,} open files, and "
        rf"the limit of this process is {hard:,} \(ulimit -Hn\)"
    )
    with pytest.raises(SettingsError, match=message):
        max_connections(settings)
