"""What can keep a fault from being shown."""


class ChaosError(RuntimeError):
    """A fault cannot be had on this machine or of this service, or would prove nothing."""
