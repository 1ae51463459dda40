"""Measurements of the service, one command each; their results are in docs/results."""
