"""What a serving process has been told by its supervisor."""

from collections.abc import Callable

from service.schemas import Status

_CLOSE = ((b"connection", b"close"),)
_NOTHING_TOLD = Status(generation=0, workers=[], reloading=False, refused=None, last_reload=None)


def _nobody_asked() -> None:
    """Without a supervisor, as in tests, nothing is reloaded."""


class Supervised:
    """The state that routes and middleware look at; the worker changes it.

    `serving`: whether requests are taken from the beginning on. `draining`: the service is about to
    end. `closing`: headers of every answer, by which clients leave kept-alive connections by
    themselves. `ask_reload`: tells the supervisor.
    """

    def __init__(
        self, *, serving: bool = True, ask_reload: Callable[[], None] = _nobody_asked
    ) -> None:
        self.serving = serving
        self.status = _NOTHING_TOLD
        self.draining = False
        self.closing: tuple[tuple[bytes, bytes], ...] = ()
        self._ask_reload = ask_reload

    def ask_reload(self) -> Status:
        """Ask for a new generation; return the status from now on."""
        self._ask_reload()
        return self.status.model_copy(update={"reloading": True})

    def drain(self) -> None:
        """Say at once that nothing new should come, and serve what comes all the same."""
        self.draining = True
        self.let_clients_leave()

    def let_clients_leave(self) -> None:
        """Close each connection after its next answer."""
        self.closing = _CLOSE
