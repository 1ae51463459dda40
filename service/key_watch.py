"""Applies a file of keys whenever it changes, or refuses it whole and says why."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from service.api_keys import ApiKeys, ApiKeysError, parse_keys, read_content
from service.logs import log_event
from service.metrics import Metrics

_log = logging.getLogger(__name__)
_POLL_S = 1.0


class KeyWatch:
    """Looks at a file every second. Its content counts, not its time of change.

    `apply`: takes the keys of a file that has changed. `refused`: why the file, as it stands, is
    not applied; None where it is.
    """

    def __init__(self, path: Path, *, apply: Callable[[ApiKeys], None], metrics: Metrics) -> None:
        self.refused: str | None = None
        self._path = path
        self._apply = apply
        self._metrics = metrics
        # The first look applies the file once more: it may have changed since it was first read.
        self._seen: bytes | None = None
        metrics.before_scrape(lambda: metrics.api_keys_refused.set(self.refused is not None))

    async def run(self) -> None:
        """Look, again and again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_POLL_S)

    async def look(self) -> None:
        """Apply the file if it has changed; a refusal is logged and counted once."""
        try:
            content = await asyncio.to_thread(read_content, self._path)
            if content == self._seen and self.refused is None:
                return
            keys = parse_keys(content, self._path)
            self._apply(keys)
        except ApiKeysError as error:
            self._refuse(str(error))
            return
        except Exception as error:  # noqa: BLE001  # whatever it is, the next look must come
            self._refuse(f"{self._path}: unexpected {type(error).__name__}", error=error)
            return
        is_change = self._seen is not None or self.refused is not None
        self._seen, self.refused = content, None
        if is_change:
            self._metrics.api_keys_reloads.labels("applied").inc()
            log_event(_log, logging.INFO, "api-keys-applied", keys=sorted(keys.keys))

    def _refuse(self, reason: str, *, error: Exception | None = None) -> None:
        if reason != self.refused:  # a file that is away is away at every look
            self.refused = reason
            self._metrics.api_keys_reloads.labels("refused").inc()
            log_event(_log, logging.ERROR, "api-keys-refused", error=error, reason=reason)
