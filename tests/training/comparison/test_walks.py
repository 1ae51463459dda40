"""The weights of each pass are those that the model computes with, told as they are."""

import math

import numpy as np
import pytest
import torch

from contract.features import FeatureSpec
from tests.training.data.conftest import make_log as make_log
from tests.training.models.inputs import N_ROWS, SPEC, inputs
from tests.training.models.inputs import imn as imn_of_large_weights
from tests.training.models.literal_imn import literal_gru, literal_weights
from tests.training.runs import run_config
from training.comparison.walks import attention, entropies, entropy, pick, walk
from training.config import RunConfig
from training.data.click_data import ClickData, open_click_data
from training.data.log import PreparedLog
from training.data.splits import Part
from training.errors import ConfigError, TrainingError
from training.models.build import build_model
from training.models.imn import IterativeMemoryNetwork, MultiWayAttention

CPU = torch.device("cpu")


def imn(
    n_rows: int = N_ROWS, spec: FeatureSpec = SPEC, **settings: object
) -> IterativeMemoryNetwork:
    model = {"name": "imn", "embedding_dim": 4, "iterations": 3, "head_units": [8], **settings}
    built = build_model(
        run_config(model=model).model,
        spec,
        item_counts=torch.ones(n_rows, dtype=torch.int64),
        features_of_row=None,
        seed=3,
    )
    assert isinstance(built, IterativeMemoryNetwork)
    built.eval()
    return built


def imn_for(config: RunConfig, data: ClickData, **settings: object) -> IterativeMemoryNetwork:
    return imn(data.catalogue.n_rows, config.features, **settings)


class TestAttention:
    def test_is_what_the_equations_give(self):
        """Pass by pass, with no weight for padding."""
        model = imn_of_large_weights(iterations=3)
        items, buckets, candidates = inputs([12, 5, 1, 0])
        weights_PBCL = attention(model, items, buckets, candidates)
        with torch.no_grad():
            e = model.history(model.items, items, buckets)
            m = v = model.items(candidates)
            for t, one in enumerate(model.attentions):
                assert isinstance(one, MultiWayAttention)
                w = literal_weights(one, e, m, v) * (items != 0).unsqueeze(1)
                torch.testing.assert_close(weights_PBCL[t], w)
                m = literal_gru(model.memory, w @ e, m)
        assert len(weights_PBCL) == 3
        assert (weights_PBCL[:, 1, :, :-5] == 0).all()
        assert (weights_PBCL[:, 1, :, -5:] > 0).all()

    @pytest.mark.parametrize("settings", [{"cross": "delayed"}, {"attention": "none"}], ids=str)
    def test_without_the_target_all_candidates_have_the_same(self, settings):
        items, buckets, candidates = inputs([12, 3])
        weights_PBCL = attention(imn(**settings), items, buckets, candidates)
        assert weights_PBCL.shape == (3, *candidates.shape, items.shape[1])
        assert (weights_PBCL == weights_PBCL[:, :, :1]).all()

    def test_leaves_the_model_as_it_was(self):
        model = imn()
        expected = model(*inputs([12]))
        weights = attention(model, *inputs([12]))
        assert not weights.requires_grad
        torch.testing.assert_close(model(*inputs([12])), expected)

    def test_of_segments_is_refused(self):
        with pytest.raises(ConfigError, match=r"model\.segment = 4: passes over segments"):
            attention(imn(segment=4), *inputs([12]))


class TestEntropy:
    def test_of_weights_is_that_of_their_shares(self):
        """Of a half and a half ln 2, of one alone 0, of 3/4 and 1/4 in between, of nothing 0."""
        weights = torch.tensor([[0.2, 0.2, 0.0], [0.7, 0.0, 0.0], [0.0, 0.9, 0.3], [0.0] * 3])
        uneven = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
        torch.testing.assert_close(
            entropies(weights), torch.tensor([math.log(2), 0.0, uneven, 0.0])
        )

    def test_of_even_weights_is_the_logarithm_of_the_behaviors(self, log):
        """The mean is over samples, wherever a batch is wide or a moment has many of them."""
        config = run_config(batch_size=7)
        loader = open_click_data(log, config).loaders[Part.TEST]
        expected = np.concatenate(
            [
                np.repeat(
                    np.log((batch.inputs.history_items != 0).sum(axis=1)), batch.mask.sum(axis=1)
                )
                for batch in loader.epoch(0, shuffle=False)
            ]
        )
        model = imn_for(config, open_click_data(log, config), attention="none", iterations=2)
        found = entropy(model, loader, CPU, max_batches=loader.n_batches)
        assert found == pytest.approx([expected.mean()] * 2, rel=1e-5)

    def test_of_a_few_batches_is_always_the_same(self, log):
        config = run_config(batch_size=4)
        data = open_click_data(log, config)
        model = imn_for(config, data)
        few = entropy(model, data.loaders[Part.TEST], CPU, max_batches=2)
        assert few == entropy(model, data.loaders[Part.TEST], CPU, max_batches=2)
        assert len(few) == 3
        assert few != entropy(model, data.loaders[Part.TEST], CPU, max_batches=3)

    def test_leaves_out_who_did_hardly_anything(self, make_log):
        """Test moments after 1 behavior and after 3: only the later one's weights are spread."""
        log = shown([(1, 10, 1), (2, 10, 2), (2, 11, 3), (2, 12, 4), (1, 11, 20), (2, 13, 21)])
        log = make_log(log)
        config = run_config(data={"samples": "negatives", "test_fraction": 0.3})
        data = open_click_data(log, config)
        model = imn_for(config, data, attention="none", iterations=1)
        assert entropy(model, data.loaders[Part.TEST], CPU) == pytest.approx([math.log(3)])

    def test_of_nobody_is_refused(self, make_log):
        log = make_log(shown([(1, 10, 1), (2, 10, 2), (1, 11, 20), (2, 13, 21)]))
        config = run_config(data={"samples": "negatives", "test_fraction": 0.5})
        data = open_click_data(log, config)
        with pytest.raises(TrainingError, match="no sample has 2 behaviors"):
            entropy(imn_for(config, data), data.loaders[Part.TEST], CPU)


def shown(rows: list[tuple[int, int, int]], labels: list[int] | None = None):
    """Return columns of (user, item, time), clicked unless said."""
    users, items, times = zip(*rows, strict=True)
    columns = {"user": users, "item": items, "timestamp": times}
    return columns if labels is None else {**columns, "label": labels}


def picked(log: PreparedLog, config: RunConfig):
    return pick(config, open_click_data(log, config))


# Item 4 is not in training, and 1 and 2 have two behaviors by then, which is all that is read.
PAST = [(1, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 3, 3), (2, 3, 3), (3, 1, 4)]
NOW = [(1, 1, 10), (2, 2, 11), (1, 3, 12), (1, 4, 13), (3, 2, 14)]
TWO = {"features": FeatureSpec(history_length=2)}


class TestPick:
    def config(self, samples: str, test_fraction: float) -> RunConfig:
        data = {"samples": samples, "test_fraction": test_fraction}
        return run_config(data=data).model_copy(update=TWO)

    def test_is_the_newest_of_full_histories(self, make_log):
        """Not user 3's, who is later but did one thing only, nor item 4, which is unknown."""
        found = picked(make_log(shown([*PAST, *NOW])), self.config("negatives", 5 / 12))
        assert (found.time, found.target_item, found.end - found.start) == (12, 3, 2)

    def test_is_of_what_was_chosen(self, make_log):
        """Item 3 was shown at 12, but not clicked."""
        labels = [1] * len(PAST) + [1, 1, 0, 1, 1]
        log = make_log(shown([*PAST, *NOW], labels))
        found = picked(log, self.config("impressions", 5 / 12))
        assert (found.time, found.target_item) == (11, 2)
        assert log.user_id(found.user) == "2"

    def test_is_the_fullest_where_none_is_full(self, make_log):
        config = run_config(data={"samples": "negatives", "test_fraction": 5 / 12})
        found = picked(make_log(shown([*PAST, *NOW])), config)
        assert (found.time, found.end - found.start) == (12, 4)

    def test_of_leave_one_out_is_a_last_behavior(self, make_log):
        config = run_config(data={"split": "leave-one-out"}).model_copy(update=TWO)
        found = picked(make_log(shown([*PAST, *NOW[:3]])), config)
        assert (found.time, found.target_item) == (12, 3)

    def test_of_unknown_items_alone_is_refused(self, make_log):
        log = make_log(shown([*PAST, (1, 4, 10), (2, 5, 11)]))
        with pytest.raises(TrainingError, match="test part: no known item was chosen after any"):
            picked(log, self.config("negatives", 2 / 9))


class TestWalk:
    def test_tells_the_behaviors_of_the_picked_moment(self, make_log):
        log = make_log(shown([*PAST, *NOW]))
        config = run_config(data={"samples": "negatives", "test_fraction": 5 / 12})
        data = open_click_data(log, config)
        model = imn_for(config, data)
        found = walk(model, config, log, data, CPU)
        assert (found.user_id, found.target_item) == ("1", 3)
        assert found.item_ids.tolist() == [1, 2, 3, 1]
        assert found.ages_s.tolist() == [11, 10, 9, 2]
        assert found.weights.shape == (3, 4)
        assert (found.weights > 0).all()

    def test_has_the_weights_of_the_sample_that_the_model_is_tested_on(self, log):
        config = run_config(data={"max_candidates": 1}, batch_size=10_000)
        data = open_click_data(log, config)
        model = imn_for(config, data)
        found = walk(model, config, log, data, CPU)
        (batch,) = data.loaders[Part.TEST].epoch(0, shuffle=False)
        weights_PBCL = attention(
            model, *(torch.from_numpy(array) for array in batch.inputs.as_feed().values())
        )
        rows = [
            weights_PBCL[:, b, 0].numpy()
            for b in np.flatnonzero(batch.inputs.candidate_items[:, 0] == row_of(data, found))
            if log.user_id(int(batch.users[b])) == found.user_id and batch.labels[b, 0]
        ]
        assert any(np.allclose(found.weights, one, atol=1e-6) for one in rows)
        assert found.weights.shape == (3, config.features.history_length)


def row_of(data: ClickData, found):
    return data.catalogue.rows(np.array([found.target_item]))[0]
