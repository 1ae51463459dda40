"""The end of listening sockets, without an end of connections that wait in their queues."""

import ctypes
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

# linux/asm-generic/socket.h; Python does not name it.
_SO_ATTACH_FILTER = 26
_FLAGS_BYTE = 13
_SYN = 0x02
_ALL = 0xFFFFFFFF
# Classic BPF over the TCP header: (operation, jump if true, jump if false, operand).
_DROP_SYN = (
    (0x30, 0, 0, _FLAGS_BYTE),  # load a byte
    (0x45, 0, 1, _SYN),  # has it the bit?
    (0x06, 0, 0, 0),  # keep nothing
    (0x06, 0, 0, _ALL),  # keep all
)


def refuse_new_connections(listeners: Sequence[socket.socket]) -> None:
    """Let nobody join the queues of sockets that are about to be closed.

    A listening socket that is closed resets the connections that wait in its queue, among them
    those whose clients have sent a request already. From now on only these are left in it, to be
    accepted; whoever comes later tries again in a second, and finds the socket closed.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in _DROP_SYN))
    described = struct.pack("@HP", len(_DROP_SYN), ctypes.addressof(program))
    for listener in listeners:
        # Where the system cannot, a few clients meet a reset: no reason to stay.
        with suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)
