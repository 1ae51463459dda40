"""Who may use Redis, and by what: ACL users, passwords in files, TLS."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from redis import Redis

from contract.history_log import HistoryLog
from loadtest.redis_cluster import redis_cluster, redis_sentinels
from loadtest.redis_server import redis_process
from service.backfill import backfill, blocking_client
from service.errors import HistoryUnavailableError
from service.history import Idempotency
from tests.service.histories import NOW, records, steps, write_log
from tests.service.proxies import proxy
from tests.service.redis_stores import KEEP, fill, open_store, some_histories

HISTORIES = some_histories(30)
USERS = list(HISTORIES)
PASSWORD = "s3cret"
DEPLOYING = Path(__file__).parents[2] / "docs/deploying.md"


def least_rights(of: str) -> str:
    """Return the ACL rule that docs/deploying.md gives for a program."""
    lines = DEPLOYING.read_text().splitlines()
    (rule,) = [line for line in lines if line.startswith(f"user {of} ")]
    return rule.replace("PASSWORD", PASSWORD)


class TestAcl:
    async def test_the_documented_rights_are_enough_for_the_service(self):
        rule = least_rights("mneme")
        with redis_process(config=f"{rule}\nuser default off\n") as process:
            url = process.url.replace("://", f"://mneme:{PASSWORD}@")
            async with open_store(url) as store:
                await fill(store, HISTORIES)
                idempotency = Idempotency.of("one", b"body")
                await store.append({"a}b": records((1, NOW))}, idempotency=idempotency)
                long = {"long": records(*steps(*range(1, 3 * KEEP)))}
                await store.append(long, idempotency=Idempotency.of("two", b"body"))
                assert await store.fetch(USERS, KEEP) == list(HISTORIES.values())
                assert await store.some_users(3)
                assert await store.is_ready()

    def test_the_documented_rights_are_enough_for_a_backfill(self, tmp_path):
        log = HistoryLog(write_log(tmp_path / "log", {"ann": steps(1, 2), "bob": steps(3)}))
        rule = least_rights("mneme-backfill")
        with redis_process(config=f"{rule}\nuser default off\n") as process:
            url = process.url.replace("://", f"://mneme-backfill:{PASSWORD}@")
            with blocking_client(url, timeout_s=5.0) as client:
                assert backfill(client, log, prefix="history", keep=1).written == 2
                assert backfill(client, log, prefix="history", keep=2).merged == 1

    async def test_the_documented_rights_are_enough_in_a_cluster(self):
        with redis_cluster(3) as cluster:
            for node in range(3):
                cluster.command(node, "ACL", "SETUSER", *least_rights("mneme").split()[1:])
            url = cluster.url.replace("://", f"://mneme:{PASSWORD}@")
            async with open_store(url) as store:
                await fill(store, HISTORIES)
                assert await store.fetch(USERS, KEEP) == list(HISTORIES.values())
                assert await store.is_ready()

    @pytest.mark.parametrize("command", ["flushall", "keys *", "config get *", "del history:ann"])
    def test_they_are_no_more_than_that(self, command):
        rule = least_rights("mneme")
        with redis_process(config=rule) as process:
            url = process.url.replace("://", f"://mneme:{PASSWORD}@")
            with Redis.from_url(url) as client, pytest.raises(Exception, match="no permissions"):
                client.execute_command(*command.split())


class TestPasswordFile:
    async def test_it_is_used_and_read_anew_for_a_new_connection(self, tmp_path):
        path = tmp_path / "password"
        path.write_text("wrong")
        with redis_process(None, "--requirepass", PASSWORD) as process:
            async with open_store(process.url, password_file=path) as store:
                (error,) = await store.fetch(["ann"], KEEP)
                assert isinstance(error, HistoryUnavailableError)
                assert error.detail == "Redis did not answer: AuthenticationError"
                path.write_text(f"{PASSWORD}\n")
                await fill(store, HISTORIES)

    def test_a_service_with_it_tells_nobody_the_password(self, serve, tmp_path, logged, capfd):
        path = tmp_path / "password"
        path.write_text(PASSWORD)
        with redis_process(None, "--requirepass", PASSWORD) as process:
            service = serve(redis_url=process.url, redis_password_file=path)
            assert service.events(("ann", 1, NOW)).status_code == 200
            process.stop()
            answers = [service.score("ann").text for _ in range(8)]
            answers += [service.client.get(path).text for path in ("/readyz", "/metrics")]
        told = "".join([*answers, logged.text, *capfd.readouterr()])
        assert PASSWORD not in told


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A certificate of 127.0.0.1, signed by itself, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with the program openssl: install openssl")
    folder: Path = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", folder / "key.pem", "-out", folder / "certificate.pem"),
        ],
        check=True,
        capture_output=True,
    )
    return folder


class TestTls:
    """The end of TLS is a program between: the redis-server of a wheel is built without."""

    @pytest.fixture
    def server_side(self, certificate):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate / "certificate.pem", certificate / "key.pem")
        return context

    async def test_a_server_is_believed_by_its_authority(self, certificate, server_side):
        with redis_process() as process:
            async with proxy(process.port, tls=server_side) as port:
                url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}/certificate.pem"
                async with open_store(url) as store:
                    await fill(store, HISTORIES)
                    assert await store.fetch(USERS, KEEP) == list(HISTORIES.values())

    async def test_a_server_of_an_unknown_authority_is_not(self, server_side):
        with redis_process() as process:
            async with (
                proxy(process.port, tls=server_side) as port,
                open_store(f"rediss://127.0.0.1:{port}/0") as store,
            ):
                (error,) = await store.fetch(["ann"], KEEP)
        assert isinstance(error, HistoryUnavailableError)
        assert error.detail == "Redis did not answer: ConnectionError"


class TestBackfill:
    @pytest.fixture
    def log(self, tmp_path):
        histories = {user: steps(n + 1, n + 2, n + 3) for n, user in enumerate(USERS)}
        return HistoryLog(write_log(tmp_path / "log", histories))

    def test_histories_are_spread_over_a_cluster_and_merged_there(self, log):
        with redis_cluster(3) as cluster, blocking_client(cluster.url, timeout_s=5.0) as client:
            assert backfill(client, log, prefix="history", keep=2).written == len(USERS)
            assert backfill(client, log, prefix="history", keep=3).merged == len(USERS)
            assert backfill(client, log, prefix="history", keep=3).unchanged == len(USERS)
            assert client.get(f"history:{USERS[4]}") == records(*steps(5, 6, 7))

    def test_a_cluster_that_is_away_is_one_clear_error(self, away_url):
        url = away_url.replace("redis://", "redis+cluster://").removesuffix("/0")
        with pytest.raises(HistoryUnavailableError, match="Redis did not answer: RedisCluster"):
            blocking_client(url, timeout_s=5.0)

    def test_sentinels_say_where_it_writes(self, log):
        with redis_sentinels("shop") as (primary, url):
            with blocking_client(url, timeout_s=5.0) as client:
                assert backfill(client, log, prefix="history", keep=2).written == len(USERS)
            with Redis(port=primary.port) as client:
                assert client.dbsize() == len(USERS)
