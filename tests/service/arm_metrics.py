"""Metrics of the one arm that most tests have."""

from service.metrics import ArmMetrics, Metrics

ARM = {"arm": "main", "version": "dummy-1"}


def of_arm(metrics: Metrics) -> ArmMetrics:
    return metrics.of_arm(**ARM)


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Return the value of one sample of the arm; None where there is none."""
    metrics.flush()
    return metrics.registry.get_sample_value(name, {**ARM, **labels})
