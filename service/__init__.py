"""A bundle and Redis to `POST /score`."""
