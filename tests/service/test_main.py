"""`python -m service` as people run it: one clear line for their errors, nothing left behind."""

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import pytest
from redis import Redis

from contract.bundle import GOLDEN
from contract.golden import GoldenRows
from contract.records import decode_records
from loadtest.redis_server import free_port
from service.__main__ import main
from service.api_keys import read_keys
from service.experiment import read_experiment
from tests.service.histories import NOW, records, steps, write_log
from tests.service.live_service import PATIENCE_S, wait_until
from tests.service.logged import events_of
from tests.service.running_service import put, running_service
from tests.service.tiny_bundle import HISTORY_LENGTH, ITEM_IDS, change_manifest, flip_a_byte

STARTED, STOPPED = "service-started", "service-stopped"
OFFLINE_PACKAGES = ("torch", "training", "exporter", "loadtest", "polars", "onnx", "matplotlib")


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """What `main` does to the logs of this process ends with the test."""
    root, server = logging.getLogger(), logging.getLogger("uvicorn")
    handlers, level, server_level = list(root.handlers), root.level, server.level
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)
    server.setLevel(server_level)


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def one_line(text: str) -> str:
    (line,) = text.splitlines()
    assert line.startswith("error: ")
    return line


class TestServe:
    def test_it_serves_a_bundle_without_torch_and_ends_on_sigterm(
        self, good_bundle, redis_url, tmp_path
    ):
        """The golden scores over real HTTP; then no process of its group is left."""
        arguments = ("--bundle", good_bundle, "--redis-url", redis_url)
        with running_service(*arguments, folder=tmp_path) as service:
            service.wait_until_ready()

            (worker,) = service.pids
            mapped = Path(f"/proc/{worker}/maps").read_text()
            assert "libtorch" not in mapped
            assert "onnxruntime" in mapped
            assert "onnxruntime" not in Path(f"/proc/{service.process.pid}/maps").read_text()

            golden = GoldenRows.load(good_bundle / GOLDEN)
            for row, raw in enumerate(golden.histories):
                history = [
                    {"item_id": int(record["item"]), "time": int(record["time"])}
                    for record in decode_records(raw)
                ]
                answer = service.post(
                    "/score",
                    {
                        "user_id": "golden",
                        "candidates": golden.candidates[row].tolist(),
                        "ranking_time": int(golden.ranking_times[row]),
                        "history": history,
                    },
                    **{"X-Deadline-Ms": "30000"},
                )
                assert answer.status_code == 200, answer.text
                assert answer.json()["version"] == "tiny-1"
                assert answer.json()["history_length"] == min(len(history), HISTORY_LENGTH)
                np.testing.assert_allclose(answer.json()["scores"], golden.scores[row], atol=1e-5)

            stdout, stderr = service.end()
        assert service.process.returncode == 0
        assert stdout == f"serving tiny-1 at {service.url}\n"
        started, draining, stopped = events_of(stderr)
        assert [started["event"], draining["event"], stopped["event"]] == [
            STARTED,
            "draining",
            STOPPED,
        ]
        assert started["arms"] == {"main": "tiny-1"}
        assert started["pid"] == stopped["pid"] == worker
        assert draining["pid"] == service.process.pid
        assert service.metrics_folders == []
        with pytest.raises(ProcessLookupError):
            os.killpg(service.process.pid, 0)
        with pytest.raises(httpx.ConnectError):
            service.get("/healthz")

    def test_nothing_that_trains_is_imported(self, good_bundle):
        program = (
            "import sys\n"
            "from pathlib import Path\n"
            "import service.__main__\n"
            "from service.app import create_app\n"
            "from service.model import OnnxModel\n"
            "from service.settings import Settings\n"
            "bundle = Path(sys.argv[1])\n"
            "create_app(Settings(bundle=bundle), OnnxModel)\n"
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
            pytest.param([], "settings: either a bundle or an experiments", id="no bundle"),
            pytest.param(
                ["--experiments", "nowhere.toml"], "nowhere.toml: cannot be read", id="no file"
            ),
            pytest.param(["--bundle", "nowhere"], "bundle nowhere: no such folder", id="no folder"),
            pytest.param(
                ["--bundle", "x", "--titles", "nowhere.json"],
                "titles: nowhere.json: No such file",
                id="no titles",
            ),
            pytest.param(["--bundle", "x", "--port", "-1"], "port: Input should be", id="port"),
            pytest.param(
                ["--bundle", "x", "--host", "0.0.0.0"],
                "host: without api_keys, '0.0.0.0' would let everybody in",
                id="an open door",
            ),
            pytest.param(
                ["--bundle", "x", "--api-keys", "nowhere.toml"],
                "nowhere.toml: cannot be read: No such file",
                id="no keys",
            ),
            pytest.param(
                ["--bundle", "x", "--max-connections", "1000000000"],
                "max_connections: 1,000,000,000 connections may need 2,000,000,128 open files",
                id="connections",
            ),
            pytest.param(["--bundle", "x", "--provider", "tpu"], "provider: Input", id="provider"),
        ],
    )
    def test_an_error_of_the_operator_is_one_line(self, capsys, arguments, message):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert message in one_line(printed.err)
        assert printed.out == ""

    @pytest.mark.parametrize(
        ("missing", "message"),
        [
            (["uvloop"], "uvloop must be installed"),
            (["httptools"], "httptools must be installed"),
            (["uvloop", "httptools"], "uvloop and httptools must be installed"),
        ],
        ids=["no uvloop", "no httptools", "neither"],
    )
    def test_a_slow_server_is_refused_before_anything_is_loaded(
        self, capsys, monkeypatch, missing, message
    ):
        for name in missing:
            monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        assert main(["--bundle", "nowhere"]) == 2
        printed = capsys.readouterr()
        assert message in one_line(printed.err)
        assert printed.out == ""

    @pytest.mark.parametrize("style", ["json", "text"])
    def test_slow_requests_are_lines_on_stderr(self, good_bundle, redis_url, style, tmp_path):
        """With any number of them the lines stay whole, and stdout is not theirs."""
        arguments = ("--bundle", good_bundle, "--redis-url", redis_url)
        logs = ("--log-format", style, "--slow-request-s", "1e-9", "--slow-log-per-s", "1000")
        with running_service(*arguments, *logs, folder=tmp_path) as service:
            service.wait_until_ready()
            (worker,) = service.pids
            for n in range(20):
                answer = service.post(
                    "/score",
                    {"user_id": "somebody-in-particular", "candidates": [1]},
                    **{"X-Deadline-Ms": "30000", "X-Request-Id": f"request-{n}"},
                )
                assert answer.status_code == 200, answer.text
            stdout, stderr = service.end()
        assert stdout == f"serving tiny-1 at {service.url}\n"
        assert "somebody-in-particular" not in stderr
        lines = stderr.splitlines()
        assert len(lines) == 20 + 3
        for n, line in enumerate(lines[1:-2]):
            if style == "json":
                assert json.loads(line)["request_id"] == f"request-{n}"
            else:
                assert f' request-slow logger="service.request_log" pid={worker} ' in line
                assert f' request_id="request-{n}" ' in line

    def test_tracing_without_its_extra_is_one_line(self, capsys, monkeypatch, good_bundle):
        monkeypatch.delitem(sys.modules, "service.tracing", raising=False)
        monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)  # as if it were not installed
        assert main(["--bundle", str(good_bundle), "--tracing", "otel"]) == 2
        assert "tracing: otel needs the extra `otel`" in one_line(capsys.readouterr().err)

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


class TestExperiments:
    ARMS = """
salt = "s"
[arms.a]
bundle = "{bundle}"
share = 0.5
[arms.b]
bundle = "{bundle}"
share = 0.5
history_length = 1
"""

    def test_users_keep_their_arm_over_workers_and_restarts(self, good_bundle, redis_url, tmp_path):
        path = tmp_path / "experiments.toml"
        path.write_text(self.ARMS.format(bundle=good_bundle))
        users = [f"user {n}" for n in range(40)]
        expected = [read_experiment(path).arm_of(user) for user in users]
        for _ in range(2):
            arguments = ("--experiments", path, "--redis-url", redis_url, "--workers", "2")
            with running_service(*arguments, folder=tmp_path) as service:
                service.wait_until_ready()
                # Each on a connection of its own: whichever worker takes it.
                assert [service.score(user)["arm"] for user in users] == expected

    def test_a_changed_file_is_served_whole_or_not_at_all(self, good_bundle, redis_url, tmp_path):
        path = tmp_path / "experiments.toml"
        path.write_text(self.ARMS.format(bundle=good_bundle))
        with running_service(
            "--experiments", path, "--redis-url", redis_url, folder=tmp_path
        ) as service:
            service.wait_until_ready()
            put(path, self.ARMS.format(bundle=good_bundle).replace('salt = "s"', "salt ="))
            assert "not TOML" in service.wait_for_reload(1)["reason"]
            assert "not TOML" in service.get("/experiments").json()["refused"]
            put(path, self.ARMS.format(bundle=good_bundle).replace('salt = "s"', 'salt = "t"'))
            assert service.wait_for_reload(2)["outcome"] == "applied"
            assert service.get("/experiments").json() == {
                "salt": "t",
                "shares": {"a": 0.5, "b": 0.5},
                "shadows": {},
                "refused": None,
            }
            path.unlink()
            assert "cannot be read" in service.wait_for_reload(3)["reason"]
            assert service.score()["arm"] in {"a", "b"}

    def test_a_bundle_that_is_not_there_ends_it_with_one_line(self, tmp_path):
        path = tmp_path / "experiments.toml"
        path.write_text(self.ARMS.format(bundle="nowhere"))
        done = run("-m", "service", "--experiments", path)
        assert (done.returncode, done.stdout) == (2, "")
        assert one_line(done.stderr) == f"error: bundle {tmp_path}/nowhere: no such folder"

    def test_backfill_keeps_as_much_as_the_longest_arm_reads(
        self, good_bundle, redis_url, tmp_path
    ):
        path = tmp_path / "experiments.toml"
        path.write_text(self.ARMS.format(bundle=good_bundle))
        write_log(tmp_path / "log", {"ann": steps(*ITEM_IDS[:20].tolist())})
        done = run(
            "-m", "service", "backfill", tmp_path / "log",
            "--experiments", path, "--redis-url", redis_url,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with Redis.from_url(redis_url) as redis:
            assert redis.strlen("history:ann") == 12 * min(20, HISTORY_LENGTH)


class TestWorkers:
    def test_they_serve_and_count_together_and_end_together(self, good_bundle, redis_url, tmp_path):
        arguments = ("--bundle", good_bundle, "--redis-url", redis_url, "--workers", "2")
        with running_service(*arguments, folder=tmp_path) as service:
            service.wait_until_ready()
            wait_until(lambda: len(service.serving()) == 2, "there are two workers")
            n_scored = service.score_until_all_have(service.pids)
            service.wait_for("mneme_requests_total /score", n_scored)
            for _ in range(8):  # the same sums, whichever worker is asked
                found = service.samples()
                assert found["mneme_requests_total /score"] == n_scored
                assert found["mneme_stage_seconds_count total"] == n_scored
                assert found["mneme_batch_requests_sum"] == n_scored
                assert found["mneme_history_behaviors_count"] == n_scored
                assert found["mneme_model_info"] == 1
            stdout, stderr = service.end()
            assert service.process.returncode == 0
            assert service.living() == []
        assert stdout == f"serving tiny-1 at {service.url}\n"
        told = Counter(event["event"] for event in events_of(stderr))
        assert told == {STARTED: 2, "draining": 1, STOPPED: 2}
        assert service.metrics_folders == []

    def test_a_broken_bundle_is_one_line_of_all_of_them(self, bundle, redis_url, tmp_path):
        flip_a_byte(bundle / "model.onnx")
        arguments = ("--bundle", bundle, "--redis-url", redis_url, "--workers", "2")
        with running_service(*arguments, folder=tmp_path) as service:
            stdout, stderr = service.wait()
        assert service.process.returncode == 2
        assert stdout == ""
        assert one_line(stderr).startswith(f"error: bundle {bundle}: model.onnx has sha256 ")
        assert service.metrics_folders == []


class TestPointer:
    def test_it_names_one_bundle_and_then_the_one_before(
        self, bundle, good_bundle, tmp_path, capsys
    ):
        change_manifest(bundle, model_version="tiny-2")
        pointer = tmp_path / "pointer"
        assert main(["publish", str(pointer), str(good_bundle)]) == 0
        assert main(["publish", str(pointer), str(bundle)]) == 0
        assert main(["rollback", str(pointer)]) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"{pointer} names {good_bundle} (tiny-1)",
            f"{pointer} names {bundle} (tiny-2)",
            f"{pointer} names {good_bundle} (tiny-1)",
        ]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["publish", "pointer", "nowhere"], "bundle nowhere: no such folder"),
            (["rollback", "nowhere"], "pointer nowhere: cannot be read"),
        ],
        ids=["no bundle", "no pointer"],
    )
    def test_an_error_of_the_operator_is_one_line(self, capsys, arguments, message):
        assert main(arguments) == 2
        assert message in one_line(capsys.readouterr().err)

    def test_an_address_that_is_taken_is_one_line(self, good_bundle, capsys):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            assert main(["--bundle", str(good_bundle), "--port", port]) == 2
        assert f"cannot listen on 127.0.0.1:{port}: " in one_line(capsys.readouterr().err)


class TestProfile:
    def test_it_prints_one_json_object_for_each_shape(self, capsys, good_bundle, redis_url):
        flags = ["--bundle", str(good_bundle), "--redis-url", redis_url, "--users", "2"]
        sizes = ["--batches", "1", "3", "--candidates", "4", "--lengths", "2"]
        assert main(["profile", *flags, *sizes, "--seconds", "0.05"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(row["batch"], row["candidates"], row["length"]) for row in rows] == [
            (1, 4, 2),
            (3, 4, 2),
        ]

    def test_a_redis_that_is_away_is_one_line(self, capsys, good_bundle, away_url):
        assert main(["profile", "--bundle", str(good_bundle), "--redis-url", away_url]) == 2
        assert "Redis did not answer" in one_line(capsys.readouterr().err)

    def test_a_missing_bundle_is_one_line(self, capsys):
        assert main(["profile", "--bundle", "nowhere"]) == 2
        assert "nowhere: no such folder" in one_line(capsys.readouterr().err)


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

    def test_a_password_file_that_is_not_there_is_one_line(self, backfill, capsys, good_bundle):
        flags = ["--bundle", str(good_bundle), "--redis-password-file", "nowhere"]
        assert main(flags) == 2
        line = one_line(capsys.readouterr().err)
        assert "redis_password_file: nowhere: the password file cannot be read: File" in line
        assert backfill({"ann": steps(1)}, **{"redis-password-file": "nowhere"}) == 2
        assert line == one_line(capsys.readouterr().err)

    def test_a_redis_that_is_away_is_an_error(self, backfill, capsys, away_url):
        assert backfill({"ann": steps(1)}, **{"redis-url": away_url}) == 2
        assert "error: Redis did not answer: " in capsys.readouterr().err

    def test_histories_of_a_log_are_scored(self, backfill, serve):
        """The log's bytes are what the service reads."""
        backfill({"ann": [(int(ITEM_IDS[0]), NOW)]})
        assert serve().score("ann", [1]).json()["history_length"] == 1


class TestKeys:
    def make(self, capsys, *arguments: str) -> tuple[str, str]:
        """Return the key and the lines that the command prints."""
        assert main(["make-key", *arguments]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        key, lines = printed.out.split("\n", 1)
        return key, lines

    def test_a_key_is_printed_once_with_the_lines_that_let_it_in(self, capsys, tmp_path):
        limits = ("--expires", "2027-05-01", "--requests-per-s", "20", "--burst", "7")
        key, lines = self.make(capsys, "shop", "--roles", "score", "events", *limits)
        assert key.startswith("mneme_")
        assert key not in lines
        path = tmp_path / "keys.toml"
        path.write_text(lines)
        read = read_keys(path).keys["shop"]
        assert read.sha256 == hashlib.sha256(key.encode()).hexdigest()
        assert read.roles == {"score", "events"}
        assert (read.expires, read.requests_per_s, read.burst) == (
            datetime(2027, 5, 1, tzinfo=UTC),
            20.0,
            7,
        )

    def test_a_name_that_cannot_be_is_one_line(self, capsys):
        assert main(["make-key", "The Shop", "--roles", "score"]) == 2
        assert "a key's name: " in one_line(capsys.readouterr().err)

    def test_a_role_that_does_not_exist_is_refused(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            main(["make-key", "shop", "--roles", "root"])
        assert "invalid choice: 'root'" in capsys.readouterr().err

    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers_ask_for_keys_on_both_ports(
        self, capsys, good_bundle, redis_url, tmp_path, workers
    ):
        key, lines = self.make(capsys, "all", "--roles", "score", "metrics")
        (tmp_path / "keys.toml").write_text(lines)
        admin = free_port()
        admin_url = f"http://127.0.0.1:{admin}"
        flags = ["--bundle", good_bundle, "--redis-url", redis_url, "--admin-port", str(admin)]
        flags += ["--workers", str(workers), "--api-keys", tmp_path / "keys.toml"]
        flags += ["--host", "0.0.0.0"]
        with running_service(*flags, folder=tmp_path) as service:
            service.wait_until_ready()

            def status(address: str, path: str, **headers: str) -> int:
                url = f"{address}{path}"
                return httpx.get(url, headers=headers, trust_env=False, verify=False).status_code

            with_key = {"Authorization": f"Bearer {key}"}
            for _ in range(4):  # whichever worker answers
                assert status(service.url, "/models") == 401
                assert status(service.url, "/models", **with_key) == 200
                assert status(service.url, "/metrics", **with_key) == 404
                assert status(admin_url, "/metrics") == 401
                assert status(admin_url, "/metrics", **with_key) == 200
                assert status(admin_url, "/models", **with_key) == 404
                assert status(admin_url, "/readyz") == 200
            stdout, _ = service.end()
        assert stdout.endswith(f", metrics and admin at {admin_url}\n")
