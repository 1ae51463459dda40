"""A listening socket that is about to be closed: who is inside is inside, and nobody joins."""

import socket

import pytest

from service.closing import refuse_new_connections


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_who_waits_is_accepted_and_whoever_comes_later_is_not(family):
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listener, socket.create_connection(listener.getsockname()[:2], timeout=5) as waiting:
        refuse_new_connections([listener])
        waiting.sendall(b"asked")
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.getsockname()[:2], timeout=0.3)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(5) == b"asked"
            accepted.sendall(b"answered")
            assert waiting.recv(8) == b"answered"
        address = listener.getsockname()[:2]
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=5)
