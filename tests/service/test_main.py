"""`python -m service` as people run it: one clear line for their errors, nothing left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from contract.bundle import GOLDEN
from contract.golden import GoldenRows
from contract.records import decode_records
from loadtest.redis_server import free_port
from service.__main__ import main
from tests.service.histories import NOW, records, steps, write_log
from tests.service.live_service import PATIENCE_S, wait_until
from tests.service.tiny_bundle import HISTORY_LENGTH, ITEM_IDS, flip_a_byte

OFFLINE_PACKAGES = ("torch", "training", "exporter", "loadtest", "polars", "onnx", "matplotlib")


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@contextmanager
def running_service(*arguments: str | Path) -> Iterator["subprocess.Popen[str]"]:
    """Run the service in a process group of its own; kill it if the test did not end it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def is_ready(url: str, process: "subprocess.Popen[str]") -> bool:
    assert process.poll() is None, "the service has ended"
    try:
        return httpx.get(f"{url}/readyz", trust_env=False).is_success
    except httpx.TransportError:
        return False


def one_line(text: str) -> str:
    (line,) = text.splitlines()
    assert line.startswith("error: ")
    return line


class TestServe:
    def test_it_serves_a_bundle_without_torch_and_ends_on_sigterm(self, good_bundle, redis_url):
        """The golden scores over real HTTP; then no process of its group is left."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        arguments = ("--bundle", good_bundle, "--redis-url", redis_url, "--port", str(port))
        with running_service(*arguments, "--redis-timeout-s", "5") as process:
            wait_until(lambda: is_ready(url, process), "the service is ready")

            mapped = Path(f"/proc/{process.pid}/maps").read_text()
            assert "libtorch" not in mapped
            assert "onnxruntime" in mapped

            golden = GoldenRows.load(good_bundle / GOLDEN)
            for row, raw in enumerate(golden.histories):
                history = [
                    {"item_id": int(record["item"]), "time": int(record["time"])}
                    for record in decode_records(raw)
                ]
                answer = httpx.post(
                    f"{url}/score",
                    json={
                        "user_id": "golden",
                        "candidates": golden.candidates[row].tolist(),
                        "ranking_time": int(golden.ranking_times[row]),
                        "history": history,
                    },
                    headers={"X-Deadline-Ms": "30000"},
                    trust_env=False,
                )
                assert answer.status_code == 200, answer.text
                assert answer.json()["version"] == "tiny-1"
                assert answer.json()["history_length"] == min(len(history), HISTORY_LENGTH)
                np.testing.assert_allclose(answer.json()["scores"], golden.scores[row], atol=1e-5)

            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=PATIENCE_S)
        assert process.returncode in (0, -signal.SIGTERM)
        assert stdout == f"serving tiny-1 at {url}\n"
        assert stderr == ""
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz", trust_env=False)

    def test_nothing_that_trains_is_imported(self, good_bundle):
        program = (
            "import sys\n"
            "from pathlib import Path\n"
            "import service.__main__\n"
            "from service.app import create_app\n"
            "from service.model import OnnxModel\n"
            "from service.settings import Settings\n"
            "bundle = Path(sys.argv[1])\n"
            "create_app(Settings(bundle=bundle), OnnxModel(bundle))\n"
            f"print(sorted({{*sys.modules}} & {{*{OFFLINE_PACKAGES}}}))\n"
        )
        done = run("-c", program, good_bundle)
        assert (done.stdout, done.stderr) == ("[]\n", "")

    def test_a_flipped_byte_of_the_model_ends_it_with_one_line(self, bundle):
        flip_a_byte(bundle / "model.onnx")
        done = run("-m", "service", "--bundle", bundle)
        assert done.returncode == 2
        assert done.stdout == ""
        assert one_line(done.stderr).startswith(f"error: bundle {bundle}: model.onnx has sha256 ")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            pytest.param([], "bundle: Field required", id="no bundle"),
            pytest.param(["--bundle", "nowhere"], "bundle nowhere: no such folder", id="no folder"),
            pytest.param(["--bundle", "x", "--port", "-1"], "port: Input should be", id="port"),
            pytest.param(["--bundle", "x", "--provider", "tpu"], "provider: Input", id="provider"),
        ],
    )
    def test_an_error_of_the_operator_is_one_line(self, capsys, arguments, message):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert message in one_line(printed.err)
        assert printed.out == ""

    def test_an_unknown_variable_is_one_line(self, capsys, monkeypatch):
        monkeypatch.setenv("MNEME_BUNDEL", "b")
        assert main([]) == 2
        assert "unknown environment variables MNEME_BUNDEL;" in one_line(capsys.readouterr().err)

    def test_an_address_that_is_no_redis_is_one_line(self, capsys, good_bundle):
        assert main(["--bundle", str(good_bundle), "--redis-url", "nonsense"]) == 2
        assert "redis_url" in one_line(capsys.readouterr().err)

    def test_help_names_every_flag(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        assert "--max-queue-work VALUE" in capsys.readouterr().out


class TestBackfill:
    @pytest.fixture
    def backfill(self, good_bundle, redis_url, tmp_path):
        """Run the command on histories; it keeps as many behaviors as the bundle's model reads."""
        logs = iter(range(100))

        def call(histories, **flags: str) -> int:
            log = write_log(tmp_path / f"log-{next(logs)}", histories)
            given = {"bundle": str(good_bundle), "redis-url": redis_url, **flags}
            pairs = [part for name, value in given.items() for part in (f"--{name}", value)]
            return main(["backfill", str(log), *pairs])

        return call

    def test_it_loads_what_the_model_reads_and_says_how_much(self, backfill, redis, capsys):
        behaviors = steps(*range(1, HISTORY_LENGTH + 3))
        assert backfill({"ann": behaviors, "bob": steps(5)}) == 0
        printed = capsys.readouterr()
        assert printed.out == "2 histories written, 0 merged, 0 unchanged, 0 corrupt\n"
        assert "backfill: 100%" in printed.err
        assert "2/2" in printed.err
        assert redis.get("history:ann") == records(*behaviors[-HISTORY_LENGTH:])
        assert redis.get("history:bob") == records(*steps(5))

    def test_again_it_changes_nothing(self, backfill, capsys):
        backfill({"ann": steps(1), "bob": steps(2)})
        capsys.readouterr()
        assert backfill({"ann": steps(1), "bob": steps(2)}) == 0
        assert capsys.readouterr().out == (
            "0 histories written, 0 merged, 2 unchanged, 0 corrupt\n"
        )

    def test_variables_and_prefix_are_those_of_the_service(self, backfill, redis, monkeypatch):
        monkeypatch.setenv("MNEME_PORT", "9000")
        assert backfill({"ann": steps(1)}, **{"key-prefix": "shop"}) == 0
        assert redis.keys() == [b"shop:ann"]

    def test_corrupt_values_are_named_and_the_exit_code_says_so(self, backfill, redis, capsys):
        redis.set("history:eve", b"x")
        assert backfill({"ann": steps(1), "eve": steps(2)}) == 1
        printed = capsys.readouterr()
        assert printed.out == "1 histories written, 0 merged, 0 unchanged, 1 corrupt\n"
        assert printed.err.endswith("corrupt, left as they are: eve\n")

    def test_a_folder_that_is_no_log_is_one_line(self, capsys, tmp_path, good_bundle):
        assert main(["backfill", str(tmp_path), "--bundle", str(good_bundle)]) == 2
        assert "log.json is missing" in one_line(capsys.readouterr().err)

    def test_a_bundle_that_is_none_is_one_line(self, capsys, tmp_path):
        log = write_log(tmp_path / "log", {"ann": steps(1)})
        assert main(["backfill", str(log), "--bundle", str(tmp_path)]) == 2
        assert "manifest.json is missing" in one_line(capsys.readouterr().err)

    def test_an_address_that_is_no_redis_is_one_line(self, capsys, tmp_path, good_bundle):
        log = write_log(tmp_path / "log", {"ann": steps(1)})
        flags = ["--bundle", str(good_bundle), "--redis-url", "nonsense"]
        assert main(["backfill", str(log), *flags]) == 2
        assert "redis_url" in one_line(capsys.readouterr().err)

    def test_a_redis_that_is_away_is_an_error(self, backfill, capsys, away_url):
        assert backfill({"ann": steps(1)}, **{"redis-url": away_url}) == 2
        assert "error: Redis did not answer: " in capsys.readouterr().err

    def test_histories_of_a_log_are_scored(self, backfill, serve):
        """The log's bytes are what the service reads."""
        backfill({"ann": [(int(ITEM_IDS[0]), NOW)]})
        assert serve().score("ann", [1]).json()["history_length"] == 1
