"""Arms over HTTP: who is answered by what, and what shadows do."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from redis import Redis

from contract.errors import BundleError
from service.app import create_app
from service.errors import ModelFailedError
from service.experiment import ExperimentError, read_experiment
from service.settings import Settings
from tests.service.conftest import patient_settings
from tests.service.dummy_model import HISTORY_LENGTH, QUICK, DummyModel, score_of
from tests.service.histories import NOW, records, steps
from tests.service.live_service import LiveService, in_background, live_service, wait_until
from tests.service.problem_answers import assert_problem

USERS = [f"user {n}" for n in range(60)]
HALVES = {"din": "share = 0.5", "imn": "share = 0.5"}


class Shop:
    """A running service, its experiments file, and the models that its bundles hold."""

    def __init__(self, path: Path, models: dict[str, DummyModel], redis_url: str) -> None:
        self.path = path
        self.models = models
        self._redis_url = redis_url
        self.opened: list[str] = []
        self.service: LiveService

    def open(self, bundle: Path) -> DummyModel:
        self.opened.append(bundle.name)
        if bundle.name not in self.models:
            raise BundleError(f"bundle {bundle}: no such folder")
        return self.models[bundle.name]

    def write(self, arms: dict[str, str]) -> None:
        """Write the file; an arm's bundle is named as it is unless it says another."""
        text = 'salt = "s"\n'
        for name, says in arms.items():
            bundle = "" if "bundle" in says else f'bundle = "{name}"\n'
            text += f"[arms.{name}]\n{bundle}{says}\n"
        self.path.write_text(text)

    def settings(self, **changes: Any) -> Settings:
        return patient_settings(self._redis_url, bundle=None, experiments=self.path, **changes)

    def arm_of(self, user_id: str) -> str:
        answer = self.service.score(user_id)
        assert answer.status_code == 200, answer.text
        arm: str = answer.json()["arm"]
        return arm


def model(version: str, warm_up_took: Sequence[tuple[int, float]] = QUICK) -> DummyModel:
    made = DummyModel(warm_up_took=warm_up_took)
    made.manifest = made.manifest.model_copy(update={"model_version": version})
    return made


@pytest.fixture
def make_shop(tmp_path, redis_url) -> Callable[..., Shop]:
    """Write a shop's file."""

    def make(arms: dict[str, str], next_takes: Sequence[tuple[int, float]] = QUICK) -> Shop:
        models = {name: model(f"{name}-v") for name in ("din", "imn")}
        models["next"] = model("next-v", next_takes)
        shop = Shop(tmp_path / "experiments.toml", models, redis_url)
        shop.write(arms)
        return shop

    return make


@pytest.fixture
def open_shop(make_shop) -> Iterator[Callable[..., Shop]]:
    running = []

    def start(
        arms: dict[str, str], *, next_takes: Sequence[tuple[int, float]] = QUICK, **settings: Any
    ) -> Shop:
        shop: Shop = make_shop(arms, next_takes)
        live = live_service(create_app(shop.settings(**settings), shop.open), None)
        shop.service = live.__enter__()
        running.append(live)
        for one in shop.models.values():
            one.reset()
        return shop

    yield start
    for live in running:
        live.__exit__(None, None, None)


class TestArms:
    def test_each_user_is_answered_by_the_arm_of_the_hash(self, open_shop):
        shop = open_shop(HALVES)
        expected = read_experiment(shop.path)
        found = {user: shop.arm_of(user) for user in USERS}
        assert found == {user: expected.arm_of(user) for user in USERS}
        assert set(found.values()) == {"din", "imn"}

    def test_the_answer_and_the_metrics_name_arm_and_version(self, open_shop):
        shop = open_shop(HALVES)
        answers = [shop.service.score(user).json() for user in USERS]
        counted = Counter((one["arm"], one["version"]) for one in answers)
        assert set(counted) == {("din", "din-v"), ("imn", "imn-v")}
        for (arm, version), n in counted.items():
            labels = {"arm": arm, "version": version}
            for name, more in (
                ("mneme_requests_total", {"route": "/score", "status": "200"}),
                ("mneme_stage_seconds_count", {"stage": "total"}),
                ("mneme_history_behaviors_count", {}),
                ("mneme_batch_requests_sum", {}),
            ):
                assert shop.service.metric(name, **more, **labels) == n

    def test_a_refused_request_counts_to_its_arm(self, open_shop, redis):
        shop = open_shop(HALVES)
        redis.set("history:ann", b"no history")
        arm = read_experiment(shop.path).arm_of("ann")
        assert_problem(shop.service.score("ann"), 500, "corrupt-history")
        labels = {"arm": arm, "version": f"{arm}-v"}
        assert shop.service.metric("mneme_corrupt_histories_total", **labels) == 1
        assert (
            shop.service.metric("mneme_requests_total", route="/score", status="500", **labels) == 1
        )

    def test_a_tester_names_the_arm(self, open_shop):
        shop = open_shop(HALVES)
        for arm in HALVES:
            answer = shop.service.score("ann", arm=arm).json()
            assert (answer["arm"], answer["version"]) == (arm, f"{arm}-v")

    def test_an_arm_that_is_not_there_is_refused_with_those_that_are(self, open_shop):
        answer = open_shop(HALVES).service.score("ann", arm="sasrec")
        problem = assert_problem(answer, 422, "unknown-arm")
        assert problem["detail"] == "arm: there is no 'sasrec', there are din, imn"

    def test_recommendations_have_arms_too(self, open_shop):
        shop = open_shop(HALVES)
        asked = read_experiment(shop.path).arm_of("ann")
        assert shop.service.recommend("ann").json()["arm"] == asked
        assert shop.service.recommend("ann", arm="din").json()["version"] == "din-v"

    def test_an_arm_reads_as_much_of_the_history_as_it_says(self, open_shop, redis):
        shop = open_shop({"din": "share = 0.5\nhistory_length = 3", "imn": "share = 0.5"})
        redis.set("history:ann", records(*steps(*range(1, HISTORY_LENGTH + 1))))
        at = {"ranking_time": NOW}
        short = shop.service.score("ann", arm="din", **at).json()
        assert short["history_length"] == 3
        assert short["scores"][0] % 100_000 == score_of(1, behaviors=3, oldest=6)
        assert shop.service.score("ann", arm="imn", **at).json()["history_length"] == 8

    def test_models_describes_every_arm(self, open_shop):
        shop = open_shop(
            {
                "din": "share = 1\nhistory_length = 3",
                "next": "share = 0.25\nshadow = true",
            }
        )
        found = shop.service.client.get("/models").json()["models"]
        fields = ("arm", "share", "shadow", "version", "history_length")
        assert [[one[field] for field in fields] for one in found] == [
            ["din", 1.0, False, "din-v", 3],
            ["next", 0.25, True, "next-v", HISTORY_LENGTH],
        ]
        share = shop.service.metric
        assert share("mneme_arm_share", arm="din", shadow="false") == 1
        assert share("mneme_arm_share", arm="next", shadow="true") == 0.25

    def test_two_arms_of_one_bundle_load_it_once(self, open_shop):
        shop = open_shop({"a": 'share = 0.5\nbundle = "din"', "b": 'share = 0.5\nbundle = "din"'})
        assert shop.opened == ["din"]
        assert {shop.arm_of(user) for user in USERS} == {"a", "b"}

    def test_a_busy_arm_does_not_keep_the_other_from_the_device(self, open_shop):
        """Twelve requests of a slow arm wait, each a run of its own; one of the other does not."""
        shop = open_shop(HALVES, max_batch_work=1)
        shop.models["imn"].takes_s = 0.1
        with in_background() as begin:
            slow = [begin(shop.service.score, user, arm="imn") for user in USERS[:12]]
            wait_until(lambda: len(shop.models["imn"].runs) >= 1, "the device is busy")
            assert shop.service.score("ann", arm="din").status_code == 200
            assert not all(one.done() for one in slow)
            assert {one.result().status_code for one in slow} == {200}
        assert len(shop.models["imn"].runs) == 12


class TestShadow:
    ARMS: ClassVar = {"din": "share = 1", "next": "share = 1\nshadow = true"}

    def scored(self, shop: Shop, outcome: str = "scored") -> float:
        return shop.service.metric(
            "mneme_shadowed_total", outcome=outcome, arm="next", version="next-v"
        )

    def test_it_scores_what_others_answer_and_is_measured(self, open_shop):
        shop = open_shop(self.ARMS)
        assert {shop.arm_of(user) for user in USERS} == {"din"}
        wait_until(lambda: self.scored(shop) == len(USERS), "the shadow has scored all")
        labels = {"arm": "next", "version": "next-v"}
        counted = partial(shop.service.metric, "mneme_stage_seconds_count")
        assert counted(stage="shadow", **labels) == len(USERS)
        assert shop.service.metric("mneme_requests_total", route="/score", status="200") == len(
            USERS
        )

    def test_what_it_scores_for_nobody_is_no_part_of_what_is_answered_in_time(self, open_shop):
        shop = open_shop(self.ARMS)
        assert shop.arm_of("ann") == "din"
        wait_until(lambda: self.scored(shop) == 1, "the shadow has scored it")
        counted = partial(shop.service.metric, "mneme_stage_seconds_count")
        assert counted(stage="total", arm="next", version="next-v") == 0
        assert counted(stage="total") == 1
        assert counted(stage="shadow", arm="din", version="din-v") == 0

    def test_it_listens_to_its_share(self, open_shop):
        shop = open_shop({**self.ARMS, "next": "share = 0.5\nshadow = true"})
        expected = sum(bool(read_experiment(shop.path).shadows_of(user)) for user in USERS)
        for user in USERS:
            shop.arm_of(user)
        wait_until(lambda: self.scored(shop) == expected, "the shadow has scored its part")
        assert 0 < expected < len(USERS)

    def test_its_failures_reach_nobody(self, open_shop):
        shop = open_shop(self.ARMS)
        shop.models["next"].fails_with = RuntimeError("broken")
        assert shop.arm_of("ann") == "din"
        wait_until(lambda: self.scored(shop, "failed") == 1, "the failure is counted")

    def test_what_it_has_no_room_for_is_left_out(self, open_shop):
        """Its batches are predicted to take a minute, so that a second one is hopeless."""
        shop = open_shop(self.ARMS, next_takes=((1, 60.0), (1001, 60.1)))
        with in_background() as begin, shop.models["next"].held():
            asked = begin(shop.service.score, "ann", arm="next")
            shop.models["next"].wait_until_busy()
            answered = begin(shop.service.score, "bob")
            wait_until(lambda: self.scored(shop, "refused") == 1, "the shadow is full")
            shop.models["next"].release()
            assert answered.result().json()["arm"] == "din"
            assert asked.result().json()["arm"] == "next"

    def test_testers_are_no_part_of_what_it_hears(self, open_shop):
        shop = open_shop(self.ARMS)
        assert shop.service.score("ann", arm="din").status_code == 200
        assert shop.arm_of("bob") == "din"
        wait_until(lambda: self.scored(shop) == 1, "the shadow has scored one")
        time.sleep(0.05)
        assert self.scored(shop) == 1

    def test_a_tester_may_ask_it(self, open_shop):
        assert open_shop(self.ARMS).service.score("ann", arm="next").json()["version"] == "next-v"


class TestRefused:
    """What cannot be served is not started; the supervisor tells why, and what was served stays."""

    @pytest.mark.parametrize(
        ("arms", "reason"),
        [
            ({"din": "share = 0.5", "nowhere": "share = 0.5"}, "no such folder"),
            ({"din": "share = 0.5", "imn": "share = 0.5\nhistory_length = 9"}, "at most 8 beh"),
        ],
        ids=["a bundle", "a length"],
    )
    async def test_an_arm_that_cannot_be_served(self, make_shop, arms, reason):
        shop = make_shop(arms)
        app = create_app(shop.settings(), shop.open)
        with pytest.raises((BundleError, ExperimentError), match=reason):
            async with app.router.lifespan_context(app):
                pass

    async def test_a_model_that_cannot_be_warmed_up(self, make_shop):
        shop = make_shop({"din": "share = 0.5", "imn": "share = 0.5"})
        shop.models["imn"].fails_with = RuntimeError("broken")
        app = create_app(shop.settings(), shop.open)
        with pytest.raises(ModelFailedError, match="the model failed: broken"):
            async with app.router.lifespan_context(app):
                pass


def test_events_reach_the_history_of_every_arm(open_shop, redis: Redis):
    shop = open_shop(HALVES)
    assert shop.service.events(("ann", 5, NOW)).status_code == 200
    for arm in HALVES:
        assert shop.service.score("ann", arm=arm).json()["history_length"] == 1
    assert redis.strlen("history:ann") == 12


def test_the_longest_arm_says_how_much_is_kept(open_shop, redis: Redis):
    shop = open_shop({"din": "share = 1\nhistory_length = 2"})
    for second in range(5):
        shop.service.events(("ann", 1 + second, NOW + second))
    assert redis.strlen("history:ann") == 12 * 2  # cut back when it held more than twice as many
    shop = open_shop({"din": "share = 1\nhistory_length = 8"})
    for second in range(5, 12):
        shop.service.events(("ann", 1 + second, NOW + second))
    assert redis.strlen("history:ann") == 12 * 9


def test_one_bundle_is_one_arm_named_main(service):
    assert service.score().json()["arm"] == "main"
    assert service.client.get("/experiments").json() == {
        "salt": "main",
        "shares": {"main": 1.0},
        "shadows": {},
        "refused": None,
    }
