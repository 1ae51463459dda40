"""URLs of Redis, what they say, and what is said of one that is none."""

from typing import Any

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError

from service.backfill import blocking_client
from service.redis_url import PasswordFile, read_redis_url, sentinel_options

SECRET = "s3cret"
SENTINELS = (("h1", 26379), ("h2", 5))


def options(url: str, **more: Any) -> dict[str, Any]:
    return read_redis_url(url).async_options(timeout_s=0.5, **{"password_file": None, **more})


@pytest.mark.parametrize(
    ("url", "kind", "hosts", "service"),
    [
        pytest.param("redis://h", "single", (), "", id="one"),
        pytest.param("rediss://h:1/2", "single", (), "", id="by TLS"),
        pytest.param("unix:///run/redis.sock", "single", (), "", id="a socket"),
        pytest.param("redis+sentinel://h1,h2:5/my/3", "sentinel", SENTINELS, "my", id="sentinel"),
        pytest.param("rediss+sentinel://h1,h2:5/my", "sentinel", SENTINELS, "my", id="by TLS, too"),
        pytest.param(
            "redis+cluster://h1:7000,h2",
            "cluster",
            (("h1", 7000), ("h2", 6379)),
            "",
            id="cluster",
        ),
        pytest.param("redis+cluster://[::1]:1", "cluster", (("::1", 1),), "", id="IPv6"),
    ],
)
def test_a_url_says_what_there_is(url, kind, hosts, service):
    address = read_redis_url(url)
    assert (address.kind, address.hosts, address.service) == (kind, hosts, service)


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_credentials_and_options_are_read_as_redis_py_reads_them(scheme):
    found = options(f"{scheme}://ann:p%40ss@h:1?socket_timeout=7&client_name=mneme")
    assert (found["username"], found["password"]) == ("ann", "p@ss")
    assert (found["socket_timeout"], found["client_name"]) == (7.0, "mneme")
    assert found["socket_connect_timeout"] == 0.5


def test_sentinels_have_credentials_of_their_own():
    address = read_redis_url(
        "redis+sentinel://ann:one@h/my/3?sentinel_username=bob&sentinel_password=two"
    )
    assert address.sentinel_options == {"username": "bob", "password": "two"}
    found = address.async_options(timeout_s=0.5, password_file=None)
    assert (found["username"], found["password"], found["db"]) == ("ann", "one", 3)


def test_sentinels_may_be_asked_for_each_connection_to_the_primary_at_once():
    address = read_redis_url("redis+sentinel://ann:one@h/my?max_connections=7&socket_timeout=2")
    found = address.async_options(timeout_s=0.5, password_file=None)
    asked = sentinel_options(address, found, tls=False)
    assert (asked["max_connections"], asked["socket_timeout"]) == (7, 2.0)
    assert not {"username", "password"} & set(asked)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        pytest.param("nonsense", "it must begin with one of redis://", id="no URL"),
        pytest.param("http://h", "it must begin with one of redis://", id="another scheme"),
        pytest.param(f"redis://:{SECRET}@h:port", "expected redis://", id="no port"),
        pytest.param(f"redis://:{SECRET}/a@h:1", "expected redis://", id="not encoded"),
        pytest.param(f"redis://:{SECRET}@[::1", "it is no URL", id="half an address"),
        pytest.param(f"redis://:{SECRET}@h?socket_timeout=x", "expected redis://", id="option"),
        pytest.param(f"redis://:{SECRET}@h?ssl_ca=x", "redis-py has no option 'ssl_ca'", id="none"),
        pytest.param(f"redis+cluster://:{SECRET}@h1:1:2", "expected host:port", id="two ports"),
        pytest.param(f"redis+cluster://:{SECRET}@h1,,h2", "expected host:port", id="no host"),
        pytest.param(f"redis+cluster://:{SECRET}@h/1", "a cluster has no data", id="a database"),
        pytest.param(f"redis+sentinel://:{SECRET}@h", "the name of the primary", id="no name"),
        pytest.param(f"redis+sentinel://:{SECRET}@h/my/x", "must be a number", id="odd database"),
    ],
)
def test_what_is_wrong_is_said_without_the_password(url, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_redis_url(url)
    assert SECRET not in str(raised.value)
    assert raised.value.__cause__ is None


def test_it_does_not_show_its_password():
    assert SECRET not in repr(read_redis_url(f"redis+cluster://ann:{SECRET}@h"))


class TestPasswordFile:
    def test_it_takes_the_place_of_the_urls_and_is_read_anew(self, tmp_path):
        path = tmp_path / "password"
        path.write_text(f"{SECRET}\n")
        found = options("redis://ann:other@h", password_file=path)
        assert not {"username", "password"} & set(found)
        provider = found["credential_provider"]
        assert provider.get_credentials() == ("ann", SECRET)
        path.write_text("another")
        assert provider.get_credentials() == ("ann", "another")

    async def test_without_a_user_it_is_the_default_users(self, tmp_path):
        path = tmp_path / "password"
        path.write_text(SECRET)
        assert await PasswordFile(path, None).get_credentials_async() == (SECRET,)

    def test_a_file_that_is_gone_is_an_error_of_redis(self, tmp_path):
        with pytest.raises(AuthenticationError, match="password file cannot be read: FileNotFound"):
            PasswordFile(tmp_path / "none", None).get_credentials()


def test_a_client_that_blocks_is_of_the_kind_that_the_url_says(redis_url):
    with blocking_client(redis_url, timeout_s=5.0) as client:
        assert isinstance(client, Redis)
        assert client.ping()
    with pytest.raises(ValueError, match="must begin with"):
        blocking_client("nonsense", timeout_s=5.0)
