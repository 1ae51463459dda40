"""The API key that a load sends, for a service that asks for one."""

import os

VARIABLE = "LOADTEST_API_KEY"


def api_key_headers() -> dict[str, str]:
    """Return the header with the key of the environment; none where there is no key.

    A variable and no flag: everybody on the machine can read the flags of a process.
    """
    key = os.environ.get(VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}
