"""How many files a process may have open, and so how many connections."""

import resource

from service.settings import Settings, SettingsError

_DEFAULT_MOST = 2048
# Each connection may ask for a connection to Redis. The rest is for what a process has open anyway:
# its sockets and pipes, the files of a bundle while it is opened, those of the metrics.
_FILES_OF_ONE = 2
_OTHER_FILES = 128


def max_connections(settings: Settings) -> int:
    """Return how many connections a worker of this process may hold.

    The soft limit of open files is raised as far as they need, and no further: programs that go
    through all possible descriptors take their time over a billion of them. Raises SettingsError
    where the hard limit is too low for what is asked.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else 2**30
    fitting = max(1, (most - _OTHER_FILES) // _FILES_OF_ONE)
    asked = settings.max_connections
    if asked is not None and asked > fitting:
        raise SettingsError(
            f"max_connections: {asked:,} connections may need {_files_for(asked):,} open files, "
            f"and the limit of this process is {hard:,} (ulimit -Hn): raise it, or ask for at most "
            f"{fitting:,} connections"
        )
    chosen = min(_DEFAULT_MOST, fitting) if asked is None else asked
    if soft != resource.RLIM_INFINITY and soft < _files_for(chosen):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, _files_for(chosen)), hard))
    return chosen


def _files_for(n_connections: int) -> int:
    return _FILES_OF_ONE * n_connections + _OTHER_FILES
