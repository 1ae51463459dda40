"""Product keys find exactly the best of all experts, and learn from what they found."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from training.models.product_keys import ProductKeys


def product_keys(n: int, k: int, width: int = 6, value_width: int = 5, seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        keys = ProductKeys(width, keys_per_side=n, n_experts=k, value_width=value_width)
        for parameter in keys.parameters():
            torch.nn.init.normal_(parameter)
    return keys


def queries(n_queries: int, width: int = 6, seed: int = 0):
    return torch.randn(n_queries, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (7, 3), (7, 7), (40, 8)])
def test_the_chosen_are_the_best_of_all_experts(n, k, seed):
    keys = product_keys(n, k, seed=seed)
    query_QD = queries(20, seed=seed)
    scores_QK, experts_QK = keys.choose(query_QD)
    first_QE, second_QE = keys.query(query_QD).chunk(2, dim=1)
    all_QX = torch.stack(
        [
            first_QE @ keys.sub_keys[0, :, i] + second_QE @ keys.sub_keys[1, :, j]
            for i in range(n)
            for j in range(n)
        ],
        dim=1,
    )
    best = all_QX.topk(k, dim=1)
    torch.testing.assert_close(scores_QK, best.values)
    assert torch.equal(experts_QK, best.indices)


def test_an_expert_is_weighted_by_its_share_by_hand():
    """Halves (1) and (2), keys (3, 5, 4) and (1, 0, 2): the best pairs are (5, 2) with a score of
    1 * 5 + 2 * 2 = 9 and (4, 2) with 8, so the experts 1 * 3 + 2 and 2 * 3 + 2.
    """
    keys = product_keys(3, 2, width=2, value_width=1)
    keys.query = torch.nn.Sequential()
    with torch.no_grad():
        keys.sub_keys.copy_(torch.tensor([[[3.0, 5.0, 4.0]], [[1.0, 0.0, 2.0]]]))
        keys.values.weight.copy_(torch.arange(9.0).unsqueeze(1))
    query_QD = torch.tensor([[1.0, 2.0]])
    scores_QK, experts_QK = keys.choose(query_QD)
    assert scores_QK.tolist() == [[9.0, 8.0]]
    assert experts_QK.tolist() == [[5, 8]]
    share = 1 / (1 + math.exp(-1))
    expected = [2 * share * 5, 2 * (1 - share) * 8]
    assert keys(query_QD)[0, :, 0].tolist() == pytest.approx(expected)


def test_tokens_keep_the_scale_of_the_experts():
    keys = product_keys(9, 4)
    with torch.no_grad():
        keys.values.weight.fill_(1.0)
    torch.testing.assert_close(keys(queries(10)).mean(dim=1), torch.ones(10, 5))


def test_query_and_sub_keys_learn_from_the_tokens():
    keys = product_keys(9, 4)
    keys(queries(10)).square().sum().backward()
    for name, parameter in keys.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 1e-3 * parameter.norm(), name


def test_only_chosen_experts_learn():
    keys = product_keys(9, 4)
    query_QD = queries(3)
    keys(query_QD).sum().backward()
    assert keys.values.weight.grad is not None
    learned = keys.values.weight.grad.any(dim=1).nonzero().flatten()
    assert learned.tolist() == sorted(set(keys.choose(query_QD)[1].flatten().tolist()))


def test_a_query_retrieves_the_same_in_any_company():
    keys = product_keys(9, 4)
    query_QD = queries(5)
    torch.testing.assert_close(keys(query_QD[2:3]), keys(query_QD)[2:3])


@pytest.mark.parametrize("n", [8, 64])
def test_products_grow_with_the_keys_of_a_side_only(n):
    """One query meets its D x D map and N keys of either side, not N * N of them."""
    width = 6
    with FlopCounterMode(display=False) as counter:
        product_keys(n, 4, width).choose(queries(1))
    assert counter.get_total_flops() == 2 * (width * width + 2 * n * width // 2)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="split in two halves: its width must be even, got 7"):
        ProductKeys(7, keys_per_side=4, n_experts=2, value_width=8)


@pytest.mark.parametrize("n_experts", [0, 5, 17])
def test_experts_must_fit_each_side(n_experts):
    with pytest.raises(
        ValueError, match=f"each side of 4 keys must hold the experts to retrieve, got {n_experts}"
    ):
        ProductKeys(8, keys_per_side=4, n_experts=n_experts, value_width=8)
