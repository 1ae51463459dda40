"""Applies an experiments file whenever it changes, or refuses it whole and says why."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from contract.errors import ContractError
from service.errors import ServiceError
from service.experiment import Experiment, ExperimentError, parse_experiment, read_content
from service.logs import log_event
from service.metrics import Metrics

_log = logging.getLogger(__name__)


class ExperimentWatch:
    """Looks at a file every `poll_s` seconds. Its content counts, not its time of change.

    `apply`: takes a new experiment, or raises ContractError, ExperimentError or ServiceError and
    changes nothing.
    `refused`: why the file, as it stands, is not applied; None where it is.
    """

    def __init__(
        self,
        path: Path,
        *,
        apply: Callable[[Experiment], Awaitable[None]],
        poll_s: float,
        metrics: Metrics,
    ) -> None:
        self.refused: str | None = None
        self._path = path
        self._apply = apply
        self._poll_s = poll_s
        self._metrics = metrics
        self._seen: bytes | None = None

    async def load(self) -> None:
        """Apply the file for the first time; raises what keeps it from that."""
        self._seen = read_content(self._path)
        await self._apply(parse_experiment(self._seen, self._path))

    async def run(self) -> None:
        """Look, again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self._look()
            except (ContractError, ExperimentError, ServiceError) as error:
                self._refuse(str(error))
            except Exception as error:  # noqa: BLE001  # whatever it is, what is applied goes on
                self._refuse(f"{self._path}: unexpected {type(error).__name__}", error)

    async def _look(self) -> None:
        try:
            content = await asyncio.to_thread(read_content, self._path)
        except ExperimentError:
            self._seen = None
            raise
        if content == self._seen:
            return
        self._seen = content
        await self._apply(parse_experiment(content, self._path))
        self.refused = None
        self._metrics.experiment_reloads.labels("applied").inc()
        log_event(_log, logging.INFO, "experiment-applied", file=str(self._path))

    def _refuse(self, reason: str, unexpected: Exception | None = None) -> None:
        if reason == self.refused:  # said already: a file that is away is away at every look
            return
        self.refused = reason
        self._metrics.experiment_reloads.labels("refused").inc()
        log_event(_log, logging.ERROR, "experiment-refused", error=unexpected, reason=reason)
