"""The errors that a user of the trainer can meet; every message names what was wrong."""


class TrainingError(ValueError):
    """Something given to the trainer cannot be used."""


class LogError(TrainingError):
    """A behavior log that cannot be read, or holds rows that are no behaviors."""


class ConfigError(TrainingError):
    """A run file with an unknown key or a value that is not allowed."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be read or does not belong to this run."""
