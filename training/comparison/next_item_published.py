"""What others measured on the same data, each figure with the name of its source."""

from dataclasses import dataclass

from training.errors import ConfigError
from training.ranking import Protocol


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published row: `metrics` named as in `training.ranking`, without a protocol."""

    label: str
    protocol: Protocol
    source: str
    metrics: dict[str, float]


def published(data: str, n_users: int) -> tuple[Published, ...]:
    """Return what is known of a log by its name, nothing of an unknown one.

    Raises ConfigError where the log cannot be the one of that name: it has other `n_users`.
    """
    if n_users != _N_USERS.get(data, n_users):
        raise ConfigError(
            f"--data {data}: has {_N_USERS[data]:,} users, this log {n_users:,}; "
            "give the log a name of its own"
        )
    return _PUBLISHED.get(data, ())


_N_USERS = {"ml1m": 6_040}
PKM_ACT_PAPER = "PKM-ACT paper, table 2"

_PUBLISHED: dict[str, tuple[Published, ...]] = {
    "ml1m": (
        Published(
            label="GRU4Rec",
            protocol="full",
            source="as copied by meta-recsys/generative-recommenders",
            metrics={"hr10": 0.2811, "ndcg10": 0.1648},
        ),
        Published(
            label="SASRec+, cross-entropy",
            protocol="full",
            source="antklen/sasrec-bert4rec-recsys23",
            metrics={"hr10": 0.3152, "ndcg10": 0.1821},
        ),
        Published(
            label="SASRec of RecTools, softmax",
            protocol="full",
            source="blondered/bert4rec_repro",
            metrics={"hr10": 0.3058, "ndcg10": 0.1779},
        ),
        Published(
            label="BERT4Rec",
            protocol="full",
            source="antklen/sasrec-bert4rec-recsys23",
            metrics={"hr10": 0.2843, "ndcg10": 0.1537},
        ),
        Published(
            label="HSTU",
            protocol="full",
            source="RecTools, HSTU tutorial",
            metrics={"hr10": 0.3226, "ndcg10": 0.1880},
        ),
        Published(label="FPMC", protocol="pop100", source=PKM_ACT_PAPER, metrics={"hr10": 0.5233}),
        Published(
            label="SASRec",
            protocol="pop100",
            source=PKM_ACT_PAPER,
            metrics={
                "ndcg10": 0.4190,
                "hr10": 0.6606,
                "mrr10": 0.3435,
                "ndcg20": 0.4471,
                "hr20": 0.7712,
                "mrr20": 0.3512,
            },
        ),
        Published(
            label="PKM-ACT",
            protocol="pop100",
            source=PKM_ACT_PAPER,
            metrics={
                "ndcg10": 0.4249,
                "hr10": 0.6613,
                "mrr10": 0.3517,
                "ndcg20": 0.4540,
                "hr20": 0.7757,
                "mrr20": 0.3597,
            },
        ),
    )
}
