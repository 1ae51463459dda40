"""Logs to click samples: read, prepare, split, sample, gather."""
