"""The k-core of a log: every user and every item that is left has at least k rows."""

import polars as pl


def k_core(log: pl.LazyFrame, k: int) -> pl.LazyFrame:
    """Return the largest part of `log` in which each user and each item has at least k rows.

    Dropping a user can push an item below k and the other way round, so both are repeated until
    nothing changes. Only counts are held in memory, one row a user and one an item.
    """
    if k <= 1:
        return log
    kept = log
    n_rows: int | None = None
    while True:
        users = _frequent(kept, "user", k)
        items = _frequent(kept.join(users, on="user", how="semi"), "item", k)
        kept = log.join(users, on="user", how="semi").join(items, on="item", how="semi")
        n_kept = kept.select(pl.len()).collect(engine="streaming").item()
        if n_kept == n_rows:
            return kept
        n_rows = n_kept


def _frequent(log: pl.LazyFrame, column: str, k: int) -> pl.LazyFrame:
    counts = log.group_by(column).len().filter(pl.col("len") >= k).select(column)
    return counts.collect(engine="streaming").lazy()
