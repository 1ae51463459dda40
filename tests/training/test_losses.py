"""Losses against torch's own and against sums written out by hand.

Shapes: N targets, D embedding width, R catalogue rows, S shared negatives, K negatives a target.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid

from contract.catalogue import FIRST_ROW, PADDING_ROW, UNKNOWN_ROW
from training import losses
from training.config import NextItemConfig
from training.errors import ConfigError
from training.losses import (
    NextItemLoss,
    Targets,
    bce_loss,
    bpr_loss,
    sampled_softmax_loss,
    softmax_loss,
)

N_ROWS, WIDTH, N_BATCH_ROWS = 15, 4, 6


def random_targets(
    n: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Targets, Tensor]:
    """Return N random targets of a batch of six rows, and a table; both want gradients."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    table = torch.randn(N_ROWS, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    targets = Targets(
        vectors=vectors,
        rows=torch.randint(FIRST_ROW, N_ROWS, (n,), generator=generator),
        origins=torch.randint(N_BATCH_ROWS, (n,), generator=generator).sort().values,
        own=torch.randint(PADDING_ROW, N_ROWS, (N_BATCH_ROWS, 3), generator=generator),
    )
    return targets, table


def gradients(loss: Tensor, targets: Targets, table: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [targets.vectors, table]))


def plain_softmax(targets: Targets, table: Tensor) -> Tensor:
    """The logits of all at once, padding aside."""
    return cross_entropy(targets.vectors @ table[1:].T, targets.rows - 1, reduction="sum")


class TestSoftmax:
    @pytest.mark.parametrize("n", [1, 255, 256, 600], ids=lambda n: f"{n} targets")
    def test_is_torchs_cross_entropy_in_values_and_gradients(self, n):
        """Of fewer targets than a block holds, and of more."""
        targets, table = random_targets(n)
        found, expected = softmax_loss(targets, table), plain_softmax(targets, table)
        torch.testing.assert_close(found, expected)
        for one, other in zip(
            gradients(found * 0.3, targets, table),
            gradients(expected * 0.3, targets, table),
            strict=True,
        ):
            torch.testing.assert_close(one, other)

    def test_gradients_are_those_of_differences(self, monkeypatch):
        monkeypatch.setattr(losses, "_BLOCK_ROWS", 3)
        targets, table = random_targets(7)

        def loss(vectors: Tensor, table: Tensor) -> Tensor:
            found: Tensor = losses._LinearCrossEntropy.apply(vectors, table, targets.rows)
            return found

        assert torch.autograd.gradcheck(loss, (targets.vectors, table))

    def test_padding_is_no_item_the_unknown_item_is_one(self):
        targets, table = random_targets(5)
        (gradient,) = torch.autograd.grad(softmax_loss(targets, table), table)
        assert not gradient[PADDING_ROW].any()
        assert gradient[UNKNOWN_ROW].any()

    def test_large_logits_neither_overflow_nor_vanish(self):
        targets, table = random_targets(5, dtype=torch.float32)
        with torch.no_grad():
            targets.vectors.mul_(200)
        loss = softmax_loss(targets, table)
        torch.testing.assert_close(loss, plain_softmax(targets, table))
        assert all(g.isfinite().all() for g in gradients(loss, targets, table))

    def test_of_bf16_products_is_close_and_its_gradients_are_float32(self):
        targets, table = random_targets(600, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = softmax_loss(targets, table)
        expected = plain_softmax(targets, table)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)
        for one, other in zip(
            gradients(found, targets, table), gradients(expected, targets, table), strict=True
        ):
            assert one.dtype == torch.float32
            assert (one - other).norm() < 0.02 * other.norm()

    def test_takes_vectors_that_autocast_left_in_bf16(self):
        targets, table = random_targets(20, dtype=torch.float32)
        rounded = Targets(
            vectors=targets.vectors.bfloat16(),
            rows=targets.rows,
            origins=targets.origins,
            own=targets.own,
        )
        with torch.autocast("cpu", torch.bfloat16):
            found = softmax_loss(rounded, table)
        torch.testing.assert_close(found, plain_softmax(targets, table), rtol=1e-2, atol=0)
        (of_vectors, _) = gradients(found, targets, table)
        assert of_vectors.isfinite().all()
        assert of_vectors.any()


def sampled(
    targets: Targets,
    table: Tensor,
    negatives: Sequence[int],
    *,
    share: Tensor | None = None,
    exclude_own: bool = False,
) -> Tensor:
    return sampled_softmax_loss(
        targets, table, torch.tensor(negatives), share_R=share, exclude_own=exclude_own
    )


class TestSampledSoftmax:
    def test_against_all_items_is_the_full_softmax(self):
        """The target itself, which is among them, counts once."""
        targets, table = random_targets(9)
        found, expected = sampled(targets, table, range(1, N_ROWS)), plain_softmax(targets, table)
        torch.testing.assert_close(found, expected)
        for one, other in zip(
            gradients(found, targets, table), gradients(expected, targets, table), strict=True
        ):
            torch.testing.assert_close(one, other)

    def test_by_hand(self):
        """A vector of 1 meets scores 3 (the target), 1 and 2."""
        one = by_hand()
        expected = math.log(math.exp(3) + math.exp(1) + math.exp(2)) - 3
        found = sampled(one, TABLE, [3, 4])
        assert found.item() == pytest.approx(expected)

    def test_an_item_drawn_twice_counts_twice(self):
        one = by_hand()
        expected = math.log(math.exp(3) + 2 * math.exp(1)) - 3
        assert sampled(one, TABLE, [3, 3]).item() == pytest.approx(expected)

    def test_logits_are_corrected_by_how_often_an_item_is_drawn(self):
        """Yi et al.: s - log q, of the target as of its negatives."""
        share = torch.tensor([0.0, 0.0, 0.5, 0.2, 0.3], dtype=torch.float64)
        corrected = [3 - math.log(0.5), 1 - math.log(0.2), 2 - math.log(0.3)]
        expected = math.log(sum(map(math.exp, corrected))) - corrected[0]
        found = sampled(by_hand(), TABLE, [3, 4], share=share)
        assert found.item() == pytest.approx(expected)

    def test_even_shares_correct_nothing(self):
        targets, table = random_targets(9)
        share = torch.full((N_ROWS,), 0.1, dtype=torch.float64)
        torch.testing.assert_close(
            sampled(targets, table, [2, 5, 7], share=share), sampled(targets, table, [2, 5, 7])
        )

    def test_the_target_is_no_negative_of_its_own(self):
        assert sampled(by_hand(), TABLE, [2, 2]).item() == pytest.approx(0)

    def test_items_of_the_row_are_no_negatives_where_they_are_excluded(self):
        """A row's own items are another's negatives."""
        targets, table = random_targets(12)
        negatives = list(range(FIRST_ROW, N_ROWS))
        expected = [
            sampled(
                one, table, [row for row in negatives if row not in targets.own[origin].tolist()]
            )
            for origin, one in zip(targets.origins.tolist(), one_by_one(targets), strict=True)
        ]
        found = sampled(targets, table, negatives, exclude_own=True)
        torch.testing.assert_close(found, torch.stack(expected).sum())
        assert found.item() < sampled(targets, table, negatives).item()

    def test_without_a_negative_that_counts_nothing_is_lost(self):
        targets, table = random_targets(5)
        everything = Targets(
            vectors=targets.vectors,
            rows=targets.rows,
            origins=targets.origins,
            own=torch.arange(N_ROWS).expand(N_BATCH_ROWS, N_ROWS),
        )
        loss = sampled(everything, table, [2, 3, 4], exclude_own=True)
        assert loss.item() == 0
        assert not any(g.any() for g in gradients(loss, everything, table))


# Rows 2, 3 and 4 are the items; a vector of 1 gives them the scores 3, 1 and 2.
TABLE = torch.tensor([[0.0], [9.0], [3.0], [1.0], [2.0]], dtype=torch.float64)


def by_hand(*, own: Sequence[int] = (0,)) -> Targets:
    """One target, row 2."""
    return Targets(
        vectors=torch.ones(1, 1, dtype=torch.float64),
        rows=torch.tensor([2]),
        origins=torch.tensor([1]),
        own=torch.tensor([[3] * len(own), list(own)]),
    )


def one_by_one(targets: Targets) -> list[Targets]:
    return [
        Targets(
            vectors=targets.vectors[n : n + 1],
            rows=targets.rows[n : n + 1],
            origins=targets.origins[n : n + 1],
            own=targets.own,
        )
        for n in range(len(targets.rows))
    ]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


class TestPairwise:
    def test_bce_by_hand(self):
        """-log sigmoid(3), and the mean of -log(1 - sigmoid(s)) of the negatives' 1 and 2."""
        found = bce_loss(by_hand(), TABLE, torch.tensor([[3, 4]]), exclude_own=False)
        assert found.item() == pytest.approx(softplus(-3) + (softplus(1) + softplus(2)) / 2)

    def test_bpr_by_hand(self):
        """The mean of -log sigmoid of the differences 2 and 1."""
        found = bpr_loss(by_hand(), TABLE, torch.tensor([[3, 4]]), exclude_own=False)
        assert found.item() == pytest.approx((softplus(-2) + softplus(-1)) / 2)

    def test_a_negative_that_is_the_target_does_not_count_in_the_mean(self):
        negatives = torch.tensor([[2, 3, 2]])
        bce = bce_loss(by_hand(), TABLE, negatives, exclude_own=False)
        assert bce.item() == pytest.approx(softplus(-3) + softplus(1))
        bpr = bpr_loss(by_hand(), TABLE, negatives, exclude_own=False)
        assert bpr.item() == pytest.approx(softplus(-2))

    def test_nor_does_one_of_the_rows_own_items_where_they_are_excluded(self):
        """Item 3 is the other row's own, 4 is this row's."""
        one, negatives = by_hand(own=[4, 0]), torch.tensor([[3, 4]])
        assert bce_loss(one, TABLE, negatives, exclude_own=True).item() == pytest.approx(
            softplus(-3) + softplus(1)
        )
        assert bpr_loss(one, TABLE, negatives, exclude_own=True).item() == pytest.approx(
            softplus(-2)
        )

    def test_without_a_negative_that_counts(self):
        """BCE still raises the target; BPR has nothing to compare it with."""
        negatives = torch.tensor([[2, 2]])
        assert bce_loss(by_hand(), TABLE, negatives, exclude_own=False).item() == pytest.approx(
            softplus(-3)
        )
        assert bpr_loss(by_hand(), TABLE, negatives, exclude_own=False).item() == 0

    def test_a_batch_is_the_sum_of_its_targets_with_their_own_negatives(self):
        targets, table = random_targets(8)
        # Row 1 is neither a target nor excluded.
        negatives = torch.full((8, 1), UNKNOWN_ROW)
        positive = (targets.vectors * table[targets.rows]).sum(dim=1)
        negative = targets.vectors @ table[UNKNOWN_ROW]
        bce = binary_cross_entropy_with_logits(
            torch.cat([positive, negative]),
            torch.cat([torch.ones(8), torch.zeros(8)]).double(),
            reduction="sum",
        )
        torch.testing.assert_close(bce_loss(targets, table, negatives, exclude_own=False), bce)
        torch.testing.assert_close(
            bpr_loss(targets, table, negatives, exclude_own=False),
            -logsigmoid(positive - negative).sum(),
        )


def loss_of(**settings: object) -> NextItemLoss:
    counts = torch.arange(N_ROWS) + 1
    return NextItemLoss(NextItemConfig.model_validate({"n_negatives": 7, **settings}), counts)


EVERY_LOSS = [
    pytest.param({"loss": "softmax"}, id="softmax"),
    pytest.param({"loss": "sampled_softmax"}, id="sampled"),
    pytest.param({"loss": "sampled_softmax", "negatives": "popularity", "logq": True}, id="logq"),
    pytest.param({"loss": "sampled_softmax", "negatives": "in-batch"}, id="in-batch"),
    pytest.param({"loss": "bce"}, id="bce"),
    pytest.param({"loss": "bpr", "negatives": "popularity"}, id="bpr"),
]


class TestEveryLoss:
    @pytest.mark.parametrize("settings", EVERY_LOSS)
    def test_of_no_target_is_0_with_gradients_of_0(self, settings):
        """Such as that of a process for which a batch has no row left."""
        targets, table = random_targets(0, dtype=torch.float32)
        loss = loss_of(**settings)(targets, table)
        assert loss.item() == 0
        of_vectors, of_table = gradients(loss, targets, table)
        assert of_vectors.shape == (0, WIDTH)
        assert not of_table.any()

    @pytest.mark.parametrize("settings", EVERY_LOSS)
    @pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
    def test_moves_vectors_towards_their_targets(self, settings, bf16):
        targets, table = random_targets(40, dtype=torch.float32)
        compute = loss_of(exclude_own=False, **settings)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = compute(targets, table)
        assert loss.dtype == torch.float32
        assert loss.item() > 0
        of_vectors, of_table = gradients(loss, targets, table)
        assert of_table.isfinite().all()
        towards = (of_vectors * table[targets.rows]).sum()
        away = (of_vectors * table.mean(dim=0)).sum()
        assert towards < away

    @pytest.mark.parametrize("settings", EVERY_LOSS)
    def test_depends_on_torchs_seed_alone(self, settings):
        targets, table = random_targets(20)
        one, other = loss_of(**settings), loss_of(**settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            first = one(targets, table)
            torch.manual_seed(4)
            assert torch.equal(other(targets, table), first)
            if settings["loss"] != "softmax" and settings.get("negatives") != "in-batch":
                assert not torch.equal(other(targets, table), first)


class TestNegatives:
    def test_in_batch_are_the_targets_of_the_batch(self):
        targets, table = random_targets(7)
        found = loss_of(loss="sampled_softmax", negatives="in-batch", exclude_own=False)(
            targets, table
        )
        expected = sampled(targets, table, targets.rows.tolist())
        torch.testing.assert_close(found, expected)

    def test_in_batch_are_no_more_than_asked_for(self):
        """Nor more than there are."""
        rows = random_targets(30)[0].rows
        loss = loss_of(loss="sampled_softmax", negatives="in-batch")
        assert len(loss._shared_negatives(rows)) == 7
        assert len(loss._shared_negatives(rows[:5])) == 5

    @pytest.mark.parametrize(
        ("negatives", "weights"),
        [
            pytest.param("uniform", [0, 0, 1, 1, 1, 1], id="uniform"),
            pytest.param("popularity", [0, 0, 9, 1, 6, 1], id="popularity"),
        ],
    )
    def test_are_drawn_as_the_run_says(self, negatives, weights):
        """An item that was shown but never chosen counts as chosen once."""
        config = NextItemConfig(loss="bce", negatives=negatives)
        loss = NextItemLoss(config, torch.tensor([0, 5, 9, 0, 6, 1]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            drawn = loss._draw((30_000,), torch.device("cpu"))
        share = torch.bincount(drawn, minlength=6) / 30_000
        expected = torch.tensor(weights) / sum(weights)
        torch.testing.assert_close(share, expected, rtol=0, atol=0.01)

    def test_are_corrected_by_the_share_they_are_drawn_with(self):
        """Whatever is drawn, every negative's logit is corrected by the popularity's logarithm."""
        targets, table = random_targets(1, dtype=torch.float32)
        counts = torch.zeros(N_ROWS, dtype=torch.int64)
        counts[FIRST_ROW:] = 10
        counts[2], counts[3] = 10**12, 10**12  # no other row is ever drawn
        own = torch.zeros(N_BATCH_ROWS, 1, dtype=torch.int64)
        target = Targets(
            vectors=targets.vectors, rows=torch.tensor([2]), origins=targets.origins, own=own
        )
        config = NextItemConfig(
            loss="sampled_softmax", negatives="popularity", n_negatives=1, logq=True
        )
        compute = NextItemLoss(config, counts)
        share = counts / counts.sum()
        expected = sampled(target, table, [3], share=share).item()
        found = {round(compute(target, table).item(), 4) for _ in range(20)}
        assert found == {0.0, round(expected, 4)}


class TestRefused:
    def test_a_catalogue_without_items(self):
        with pytest.raises(ConfigError, match="no item to learn"):
            NextItemLoss(NextItemConfig(), torch.zeros(FIRST_ROW, dtype=torch.int64))
