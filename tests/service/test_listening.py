"""Where the service listens, and that nobody is let in by mistake."""

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from loadtest.redis_server import free_port
from service.listening import bind, listen, refuse_open_doors
from service.settings import Settings, SettingsError


def settings(**changes) -> Settings:
    return Settings(**{"bundle": Path("unused"), **changes})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_this_machine_alone_no_keys_are_needed(host):
    refuse_open_doors(settings(host=host))


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "", "10.0.0.1", "::ffff:10.0.0.1", "shop.example", "localhost.example"],
)
def test_on_any_other_address_they_are(host):
    with pytest.raises(SettingsError, match=r"^host: without api_keys, .* would let everybody in"):
        refuse_open_doors(settings(host=host))
    refuse_open_doors(settings(host=host, api_keys=Path("keys.toml")))
    refuse_open_doors(settings(host=host, anonymous=True))


def test_the_admin_port_is_a_door_too():
    with pytest.raises(SettingsError, match=r"^admin_host: without api_keys, '0\.0\.0\.0' would"):
        refuse_open_doors(settings(admin_port=1, admin_host="0.0.0.0"))
    refuse_open_doors(settings(admin_host="0.0.0.0"))  # nobody listens there


def test_a_socket_is_bound_for_each_port():
    port, admin_port = free_port(), free_port()
    with ExitStack() as opened:
        public, admin = map(
            opened.enter_context, bind(settings(port=port, admin_port=admin_port, host="127.0.0.1"))
        )
        assert public.getsockname() == ("127.0.0.1", port)
        assert admin.getsockname() == ("127.0.0.1", admin_port)
    with ExitStack() as opened:
        (alone,) = map(opened.enter_context, bind(settings(port=0)))
        assert alone.getsockname()[1] > 0


def test_an_address_of_ipv6_is_bound_as_one():
    try:
        (listener,) = bind(settings(host="::1", port=0))
    except SettingsError:
        pytest.skip("this machine has no IPv6: enable it")
    with listener:
        assert listener.family == socket.AF_INET6


def test_an_address_that_cannot_be_had_is_named_and_nothing_stays_open():
    """A socket that is left open is a warning, and so an error of this test."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(SettingsError, match=f"^host: cannot listen on 127.0.0.1:{taken}: Addr"):
            bind(settings(port=taken))
        with pytest.raises(SettingsError, match=f"^admin_host: .* 127.0.0.1:{taken}: Address"):
            bind(settings(port=0, admin_port=taken))
    with pytest.raises(SettingsError, match=r"^host: cannot listen on no\.example:0: "):
        bind(settings(host="no.example", port=0))


def test_of_several_that_have_bound_an_address_one_may_listen():
    chosen = settings(port=free_port(), admin_port=free_port())
    with ExitStack() as opened:
        first = [opened.enter_context(one) for one in bind(chosen)]
        second = [opened.enter_context(one) for one in bind(chosen)]
        listen(chosen, first)
        with socket.create_connection(("127.0.0.1", chosen.admin_port)):
            """They wait until they are accepted."""
        with pytest.raises(
            SettingsError, match=f"^host: cannot listen on 127.0.0.1:{chosen.port}: "
        ):
            listen(chosen, second)
        first[0].close()
        with pytest.raises(
            SettingsError, match=f"^admin_host: cannot listen on 127.0.0.1:{chosen.admin_port}: "
        ):
            listen(chosen, second)
