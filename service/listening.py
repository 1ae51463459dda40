"""The sockets that the service listens on, and who may reach them."""

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import ip_address

from service.settings import Settings, SettingsError

# So many connections wait to be accepted, unless the system allows fewer: as uvicorn has it.
_BACKLOG = 2048


def refuse_open_doors(settings: Settings) -> None:
    """Raise SettingsError where others than this machine could reach what asks nobody for a key."""
    if settings.api_keys is not None or settings.anonymous:
        return
    for setting, host, _ in _addresses(settings):
        if not _is_loopback(host):
            raise SettingsError(
                f"{setting}: without api_keys, {host!r} would let everybody in who reaches it; "
                "name a file of keys, listen on 127.0.0.1, or set anonymous to true if something "
                "else keeps others out"
            )


def bind(settings: Settings) -> list[socket.socket]:
    """Return the bound socket of the public port, and that of the admin port where there is one.

    Nobody connects before they listen. Raises SettingsError where an address cannot be had.
    """
    with ExitStack() as opened:
        sockets = [opened.enter_context(_bound(*address)) for address in _addresses(settings)]
        opened.pop_all()
    return sockets


def listen(settings: Settings, sockets: Sequence[socket.socket]) -> None:
    """Let clients connect to what `bind` returned; they wait until somebody accepts them.

    An address can be bound by several until one listens: Linux allows it to those that would not
    wait for the last connections of a service that has ended. Raises SettingsError for the others.
    """
    for (setting, host, _), listener in zip(_addresses(settings), sockets, strict=True):
        try:
            listener.listen(_BACKLOG)
        except OSError as error:
            raise _refusal(setting, host, listener.getsockname()[1], error) from error


def _addresses(settings: Settings) -> list[tuple[str, str, int]]:
    """Return the setting that names an address, the address, and its port."""
    addresses = [("host", settings.host, settings.port)]
    if settings.admin_port is not None:
        addresses.append(("admin_host", settings.admin_host, settings.admin_port))
    return addresses


def _bound(setting: str, host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _refusal(setting, host, port, error) from error
    listener.set_inheritable(True)
    return listener


def _refusal(setting: str, host: str, port: int, error: OSError) -> SettingsError:
    reason = error.strerror or error
    return SettingsError(f"{setting}: cannot listen on {host}:{port}: {reason}")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
