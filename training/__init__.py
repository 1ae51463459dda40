"""Behavior logs to samples, models, checkpoints, metrics and reports."""
