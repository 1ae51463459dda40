"""The sockets that workers accept connections from."""

import socket

from service.settings import Settings, SettingsError


def bind(settings: Settings) -> list[socket.socket]:
    """Return the sockets of the service, bound and not listening yet.

    Connections are refused until the first worker listens. Raises SettingsError where the address
    cannot be had.
    """
    place = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise SettingsError(f"cannot listen on {place}: {error.strerror or error}") from error
    return [listener]
