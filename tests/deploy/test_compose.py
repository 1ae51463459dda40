"""The compose file, the Dockerfile and what they mount agree, and hold what they promise."""

import os
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

from loadtest.redis_server import find_redis_server, free_port

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
# Name of a stage -> what it starts from, and its text.
STAGES = {
    name: (base, text)
    for base, name, text in re.findall(
        r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL
    )
}
BUILT = sorted({service["build"]["target"] for service in SERVICES.values() if "build" in service})

each_service = pytest.mark.parametrize("name", sorted(SERVICES))


def started(*profiles: str) -> set[str]:
    """The services that compose starts with these profiles."""
    return {
        name
        for name, service in SERVICES.items()
        if not service.get("profiles") or set(service["profiles"]) & set(profiles)
    }


def ancestry(stage: str) -> Iterator[str]:
    """The texts of a stage and of those it starts from, nearest first."""
    while stage in STAGES:
        stage, text = STAGES[stage]
        yield text


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="needs docker and its compose plugin: install Docker's docker-compose-plugin",
)
@pytest.mark.parametrize("profile", ["cpu", "gpu", "load"])
def test_compose_itself_accepts_the_file(profile):
    command = ["docker", "compose", "--profile", profile, "config", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@each_service
def test_every_mounted_path_exists(name):
    for volume in SERVICES[name].get("volumes", []):
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (ROOT / source).exists(), source
            assert volume.endswith(":ro"), volume
        else:
            assert source in COMPOSE["volumes"]


@each_service
def test_a_container_can_write_only_where_it_must_and_gains_no_rights(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & set(service)
    assert "mem_limit" in service


@each_service
def test_nothing_runs_as_root(name):
    service = SERVICES[name]
    if "build" in service:
        users = [
            user
            for text in ancestry(service["build"]["target"])
            for user in reversed(re.findall(r"^USER (\S+)", text, re.MULTILINE))
        ]
        assert users[:1] == ["10001:10001"]
        assert "user" not in service
    else:
        assert service["user"] in ("redis", "nobody", "472")


@each_service
def test_ports_are_published_on_this_machine_alone(name):
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


@each_service
def test_a_service_without_keys_says_so(name):
    """It listens on all addresses of its container, and would refuse to start otherwise."""
    service = SERVICES[name]
    if service.get("build", {}).get("target", "").startswith("service-"):
        assert service["environment"]["MNEME_ANONYMOUS"] == "true"
        assert "MNEME_API_KEYS" not in service["environment"]


def test_every_image_is_pinned_to_a_release():
    bases = {base for base, _ in STAGES.values() if base not in STAGES}
    images = {service["image"] for service in SERVICES.values() if "image" in service}
    for image in sorted(bases | images):
        assert re.search(r":v?\d+\.\d+\.\d+(-[\w-]+)?$", image), image


def test_every_target_is_a_stage_of_the_dockerfile():
    assert BUILT == ["load", "service-cpu", "service-cuda", "train"]
    assert set(BUILT) <= set(STAGES)


def test_what_the_dockerfile_copies_is_there_and_sent_to_the_builder():
    sent = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copies = [line.split()[1:-1] for line in re.findall(r"^COPY (?!--).*$", DOCKERFILE, re.M)]
    for source in {source for sources in copies for source in sources}:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in sent


@pytest.mark.parametrize(
    ("profile", "serving"), [("cpu", "service"), ("gpu", "service-cuda"), ("load", "service")]
)
def test_each_profile_starts_one_service_with_all_that_it_depends_on(profile, serving):
    running = started(profile)
    assert running & {"service", "service-cuda"} == {serving}
    for name in running:
        assert set(SERVICES[name].get("depends_on", {})) <= running


def test_the_service_on_the_cpu_is_what_starts_unless_a_profile_is_named():
    lines = (ROOT / ".env").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["COMPOSE_PROFILES=cpu"]


def test_prometheus_scrapes_names_of_this_network():
    aliases = SERVICES["service-cuda"]["networks"]["default"]["aliases"]
    assert aliases == ["service"]
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    targets = [
        target
        for job in config["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    ]
    assert "service:8000" in targets
    assert {target.split(":")[0] for target in targets} <= {*SERVICES, "localhost"}


@pytest.mark.parametrize("target", ["service-cpu", "service-cuda", "load"])
def test_only_the_trainer_has_torch(target):
    packages = installed_by(f"build-{target}")
    assert packages >= ({"fastapi", "redis"} if target.startswith("service") else {"locust"})
    assert not packages & {"torch", "onnx", "onnxscript", "triton"}
    assert "torch" in installed_by("build-train")


def installed_by(stage: str) -> set[str]:
    """The packages that a stage installs through the project's extras, and all that they need."""
    _, text = STAGES[stage]
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    pending = [Requirement(line) for extra in extras.split(",") for line in optional[extra]]
    found: set[str] = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name == "mneme":
            pending += [Requirement(line) for one in requirement.extras for line in optional[one]]
            continue
        if name in found:
            continue
        found.add(name)
        # One of onnxruntime and onnxruntime-gpu is not installed here; both need the same.
        with suppress(PackageNotFoundError):
            pending += [
                needed
                for needed in map(Requirement, requires(name) or [])
                if needed.marker is None
                or any(
                    needed.marker.evaluate({"extra": extra})
                    for extra in (requirement.extras or {""})
                )
            ]
    return found


# A stand-in for Python: it notes what it was asked to run, and an export makes its folder.
NOTING_PYTHON = """#!/bin/sh
echo "$2 $3" >> steps
if [ "$2" = "$FAILS" ]; then exit 1; fi
if [ "$2" = exporter ]; then mkdir "$4"; fi
"""


def test_the_job_trains_once_and_begins_anew_after_a_failure(tmp_path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(NOTING_PYTHON)
    python.chmod(0o755)
    steps = tmp_path / "steps"

    def run(fails: str = "") -> tuple[int, list[str]]:
        steps.unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FAILS": fails}
        done = subprocess.run(SERVICES["train"]["command"], cwd=tmp_path, env=environment)
        return done.returncode, steps.read_text().splitlines()

    whole = [
        *("loadtest world", "training prepare", "training train"),
        *("exporter run/model.pt", "service backfill"),
    ]
    assert run(fails="exporter") == (1, whole[:-1])
    assert run() == (0, whole)
    assert run() == (0, ["service backfill"])


def test_the_job_trains_a_run_that_there_is():
    (name,) = re.findall(r"training train (\S+)", SERVICES["train"]["command"][-1])
    assert (ROOT / "training/runs" / f"{name}.toml").exists()


@contextmanager
def configured_redis(folder: Path, *flags: str) -> Iterator[tuple[Redis, "subprocess.Popen[str]"]]:
    """A real Redis with the deployed configuration, on a free port and with its data in folder."""
    port = free_port()
    command = [
        *(str(find_redis_server()), str(ROOT / "deploy/redis/redis.conf")),
        *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), *flags),
    ]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True) as process,
        Redis(port=port) as redis,
    ):
        try:
            deadline = time.monotonic() + 10.0
            while not answers(redis):
                assert process.poll() is None, "Redis refused its configuration"
                assert time.monotonic() < deadline, "Redis did not answer"
                time.sleep(0.02)
            yield redis, process
        finally:
            process.kill()


def answers(redis: Redis) -> bool:
    try:
        return bool(redis.ping())
    except RedisConnectionError:
        return False


def test_a_full_redis_refuses_to_write_and_loses_no_history(tmp_path):
    history = bytes(12_000)
    written: list[str] = []

    def write_without_end(redis: Redis) -> None:
        while True:
            key = f"history:{len(written)}"
            redis.set(key, history)
            written.append(key)

    with configured_redis(tmp_path, "--maxmemory", "4mb") as (redis, _):
        with pytest.raises(OutOfMemoryError):
            write_without_end(redis)
        assert len(written) > 10
        assert redis.mget(written) == [history] * len(written)


def test_a_killed_redis_has_its_histories_when_it_is_back(tmp_path):
    with configured_redis(tmp_path) as (redis, process):
        redis.append("history:1", b"a behavior..")
        process.kill()
    with configured_redis(tmp_path) as (redis, _):
        assert redis.get("history:1") == b"a behavior.."


def test_redis_may_use_half_of_its_containers_memory(tmp_path):
    with configured_redis(tmp_path) as (redis, _):
        maxmemory = redis.info("memory")["maxmemory"]
    assert SERVICES["redis"]["mem_limit"] == "1g"
    assert 2 * maxmemory == 2**30
