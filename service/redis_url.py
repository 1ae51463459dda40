"""Where Redis is, by URL: one server, one behind Sentinel, or a cluster.

| URL | |
|---|---|
| `redis://`, `rediss://` (TLS), `unix://` | one server, as redis-py reads them |
| `redis+sentinel://h1:26379,h2:26379/mymaster/0` | the primary that the sentinels name |
| `redis+cluster://h1:7000,h2:7001` | a cluster, found by any of the nodes |

`rediss+sentinel` and `rediss+cluster` are the same by TLS. `user:password@` before the hosts and
redis-py's options after a `?` hold for all of them.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from redis.asyncio import connection as asynchronous
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError

Kind = Literal["single", "sentinel", "cluster"]

_KINDS: dict[str, Kind] = {
    "redis": "single",
    "rediss": "single",
    "unix": "single",
    "redis+sentinel": "sentinel",
    "rediss+sentinel": "sentinel",
    "redis+cluster": "cluster",
    "rediss+cluster": "cluster",
}
_DEFAULT_PORTS = {"sentinel": 26379, "cluster": 6379}
_HOST = re.compile(r"(?P<name>[^][:@/,]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?")
_SHARED_OPTIONS = frozenset({"retry", "protocol", "driver_info", "max_connections"})
_SENTINEL_OPTIONS = {"sentinel_username": "username", "sentinel_password": "password"}


@dataclass(frozen=True, kw_only=True)
class RedisAddress:
    """A URL, read. `hosts`: of sentinels or of nodes, none for one server; `service`: what the
    sentinels call the primary; `node_url`: what redis-py makes a connection's options of.
    """

    kind: Kind
    hosts: tuple[tuple[str, int], ...]
    service: str
    node_url: str = field(repr=False)
    sentinel_options: dict[str, Any] = field(repr=False)

    def options(self, *, timeout_s: float, password_file: Path | None) -> dict[str, Any]:
        """Return the options of a connection that blocks, with redis-py's names."""
        given = parse_url(self.node_url)  # type: ignore[no-untyped-call]
        return self._completed(given, timeout_s, password_file)

    def async_options(self, *, timeout_s: float, password_file: Path | None) -> dict[str, Any]:
        """Return the options of a connection for asyncio; it repeats nothing by itself."""
        given = dict(asynchronous.parse_url(self.node_url))
        options = self._completed(given, timeout_s, password_file)
        return {
            "retry": AsyncRetry(NoBackoff(), 0),
            # Without a word of greeting: a connection is of use as soon as it stands. (A client
            # that blocks must be greeted: it takes what TLS sends first for an answer.)
            "protocol": 2,
            "driver_info": None,
            **options,
        }

    def _completed(
        self, given: dict[str, Any], timeout_s: float, password_file: Path | None
    ) -> dict[str, Any]:
        options = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            **given,
        }
        if self.kind != "single":
            del options["host"]
            options.pop("port", None)
        if password_file is not None:
            options.pop("password", None)
            username = options.pop("username", None)
            options["credential_provider"] = PasswordFile(password_file, username)
        return options


class PasswordFile(CredentialProvider):
    """The password of a user, read for each connection: a file that is replaced is a new one."""

    def __init__(self, path: Path, username: str | None) -> None:
        self._path = path
        self._username = username

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Return password, or user and password; raises AuthenticationError without a file."""
        try:
            password = self._path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise AuthenticationError(
                f"the password file cannot be read: {type(error).__name__}"
            ) from error
        return (password,) if self._username is None else (self._username, password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """Return the same: the file is small, and connections are rare."""
        return self.get_credentials()


def read_redis_url(url: str) -> RedisAddress:
    """Return what a URL says. Raises ValueError, whose message quotes none of it: it may hold a
    password.
    """
    try:
        split = urlsplit(url)
    except ValueError:
        raise ValueError("it is no URL") from None
    kind = _KINDS.get(split.scheme)
    if kind is None:
        raise ValueError(f"it must begin with one of {', '.join(f'{one}://' for one in _KINDS)}")
    hosts, service, node_url, sentinel_options = (
        ((), "", url, {}) if kind == "single" else _of_several(kind, split)
    )
    address = RedisAddress(
        kind=kind,
        hosts=hosts,
        service=service,
        node_url=node_url,
        sentinel_options=sentinel_options,
    )
    try:
        options = address.async_options(timeout_s=1.0, password_file=None)
    except ValueError:
        raise ValueError(
            "expected redis://[user:password@]host[:port][/database][?option=value], with "
            "reserved characters of user and password percent-encoded"
        ) from None
    if kind == "cluster" and options.get("db"):
        raise ValueError("a cluster has no databases")
    make = options.pop("connection_class", asynchronous.Connection)
    options.pop("max_connections", None)  # the pool's
    try:
        make(**options)
    except TypeError as error:
        unknown = str(error).rpartition(" ")[2]
        raise ValueError(f"redis-py has no option {unknown}") from None
    return address


def takes_tls(options: dict[str, Any]) -> bool:
    """Take the class of connections out of redis-py's options; return whether it encrypts.

    Its classes for Sentinel and Cluster choose their own, and ask for a flag.
    """
    chosen = options.pop("connection_class", None)
    return chosen is not None and chosen.__name__ == "SSLConnection"


def sentinel_options(
    address: RedisAddress, options: dict[str, Any], *, tls: bool
) -> dict[str, Any]:
    """Return the options of connections to sentinels, of those to the primary: what is said of
    sockets, of TLS and of their number (each to the primary may need one), and credentials of their
    own.
    """
    shared = {
        name: value
        for name, value in options.items()
        if name.startswith(("socket_", "ssl_")) or name in _SHARED_OPTIONS
    }
    return {**shared, **address.sentinel_options, "ssl": tls}


def _of_several(
    kind: Literal["sentinel", "cluster"], split: SplitResult
) -> tuple[tuple[tuple[str, int], ...], str, str, dict[str, str]]:
    """Return the hosts, the service, the URL of one node, and what holds for sentinels alone."""
    credentials, at, listed = split.netloc.rpartition("@")
    hosts = tuple(_host(one, _DEFAULT_PORTS[kind]) for one in listed.split(","))
    path = split.path.strip("/")
    service = ""
    if kind == "sentinel":
        service, _, path = path.partition("/")
        if not service:
            raise ValueError("after the sentinels, the name of the primary: /mymaster")
    if path and not path.isdecimal():
        raise ValueError("the database must be a number")
    asked = parse_qsl(split.query, keep_blank_values=True)
    own = {_SENTINEL_OPTIONS[name]: value for name, value in asked if name in _SENTINEL_OPTIONS}
    rest = urlencode([(name, value) for name, value in asked if name not in _SENTINEL_OPTIONS])
    scheme = split.scheme.partition("+")[0]
    node = urlunsplit((scheme, f"{credentials}{at}{listed.split(',')[0]}", f"/{path}", rest, ""))
    return hosts, unquote(service), node, own


def _host(text: str, default_port: int) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    if found is None:
        raise ValueError("expected host:port,host:port,... after the credentials")
    return found["name"].strip("[]"), int(found["port"] or default_port)
