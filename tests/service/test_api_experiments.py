"""Arms over HTTP: who is answered by what, what shadows do, and what a changed file changes."""

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
from service.experiment import read_experiment
from tests.service.conftest import patient_settings
from tests.service.dummy_model import HISTORY_LENGTH, QUICK, DummyModel, score_of
from tests.service.histories import NOW, records, steps
from tests.service.live_service import LiveService, in_background, live_service, wait_until
from tests.service.problem_answers import assert_problem

POLL_S = 0.02
USERS = [f"user {n}" for n in range(60)]
HALVES = {"din": "share = 0.5", "imn": "share = 0.5"}


class Shop:
    """A running service, its experiments file, and the models that its bundles hold."""

    def __init__(self, path: Path, models: dict[str, DummyModel]) -> None:
        self.path = path
        self.models = models
        self.opened: list[str] = []
        self.service: LiveService

    def open(self, bundle: Path) -> DummyModel:
        self.opened.append(bundle.name)
        if bundle.name not in self.models:
            raise BundleError(f"bundle {bundle}: no such folder")
        return self.models[bundle.name]

    def write(self, arms: dict[str, str], *, salt: str = "s") -> None:
        """Replace the file; an arm's bundle is named as it is unless it says another."""
        text = f'salt = "{salt}"\n'
        for name, says in arms.items():
            bundle = "" if "bundle" in says else f'bundle = "{name}"\n'
            text += f"[arms.{name}]\n{bundle}{says}\n"
        self.write_text(text)

    def write_text(self, text: str) -> None:
        staging = self.path.with_suffix(".new")
        staging.write_text(text)
        staging.rename(self.path)

    def apply(self, arms: dict[str, str], *, salt: str = "s") -> None:
        """Replace the file and return when it is applied."""
        before = self.reloads("applied")
        self.write(arms, salt=salt)
        wait_until(lambda: self.reloads("applied") > before, "the file is applied")

    def reloads(self, outcome: str) -> float:
        return self.service.metric("mneme_experiment_reloads_total", outcome=outcome)

    def refusal(self) -> str:
        """Return why the file is refused, as soon as it is."""
        wait_until(lambda: self.experiment()["refused"] is not None, "the file is refused")
        return str(self.experiment()["refused"])

    def experiment(self) -> dict[str, object]:
        found: dict[str, object] = self.service.client.get("/experiments").json()
        return found

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
def open_shop(tmp_path, redis_url) -> Iterator[Callable[..., Shop]]:
    running = []

    def start(
        arms: dict[str, str], *, next_takes: Sequence[tuple[int, float]] = QUICK, **settings: Any
    ) -> Shop:
        models = {name: model(f"{name}-v") for name in ("din", "imn", "din-2")}
        models["next"] = model("next-v", next_takes)
        shop = Shop(tmp_path / "experiments.toml", models)
        shop.write(arms)
        chosen = patient_settings(
            redis_url, bundle=None, experiments=shop.path, experiments_poll_s=POLL_S, **settings
        )
        live = live_service(create_app(chosen, shop.open), None)
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


class TestChangedFile:
    def test_it_is_applied_without_a_restart(self, open_shop):
        shop = open_shop({"din": "share = 1"})
        assert {shop.arm_of(user) for user in USERS} == {"din"}
        shop.apply({"imn": "share = 1"})
        assert {shop.arm_of(user) for user in USERS} == {"imn"}
        info = shop.service.metric
        assert info("mneme_model_info", model="dummy", arm="din", version="din-v") == 0
        assert info("mneme_model_info", model="dummy", arm="imn", version="imn-v") == 1

    def test_another_salt_alone_opens_nothing_anew(self, open_shop):
        shop = open_shop(HALVES)
        shop.apply(HALVES, salt="another")
        assert shop.experiment()["salt"] == "another"
        assert shop.opened == ["din", "imn"]

    def test_another_bundle_of_an_arm_is_another_version(self, open_shop):
        shop = open_shop(HALVES)
        shop.apply({**HALVES, "din": 'share = 0.5\nbundle = "din-2"'})
        assert shop.service.score("ann", arm="din").json()["version"] == "din-2-v"
        assert shop.opened == ["din", "imn", "din-2"]

    @pytest.mark.parametrize(
        ("arms", "reason"),
        [
            ({"din": "share = 0.4", "imn": "share = 0.5"}, "must add up to 1"),
            ({"din": "share = 0.5", "nowhere": "share = 0.5"}, "no such folder"),
            ({"din": "share = 0.5", "imn": "share = 0.5\nhistory_length = 9"}, "at most 8 beh"),
            ({"din": "share = 0.5", "imn": "share = 0.5\ncolor = 1"}, "arms.imn.color: Extra"),
        ],
        ids=["shares", "a bundle", "a length", "an unknown key"],
    )
    def test_what_does_not_hold_is_refused_whole_with_the_reason(self, open_shop, arms, reason):
        shop = open_shop(HALVES)
        before = {user: shop.arm_of(user) for user in USERS}
        shop.write(arms, salt="never applied")
        assert reason in shop.refusal()
        assert shop.experiment()["salt"] == "s"
        assert shop.experiment()["shares"] == {"din": 0.5, "imn": 0.5}
        assert {user: shop.arm_of(user) for user in USERS} == before
        assert shop.reloads("refused") == 1

    def test_a_model_that_cannot_be_warmed_up_is_refused_and_leaves_nothing_behind(self, open_shop):
        shop = open_shop({"din": "share = 1"})
        shop.models["imn"].fails_with = RuntimeError("broken")
        shop.write({"imn": "share = 1"})
        assert shop.refusal() == "the model failed: broken"
        assert shop.arm_of("ann") == "din"
        shop.models["imn"].fails_with = None
        shop.apply({"imn": "share = 1"}, salt="another")
        assert shop.arm_of("ann") == "imn"

    def test_a_file_that_goes_away_changes_nothing_and_may_come_back(self, open_shop):
        shop = open_shop(HALVES)
        shop.path.unlink()
        assert "cannot be read" in shop.refusal()
        assert shop.service.metric("mneme_experiment_refused") == 1
        assert shop.arm_of("ann") in HALVES
        shop.apply(HALVES)
        assert shop.experiment()["refused"] is None
        assert shop.service.metric("mneme_experiment_refused") == 0

    def test_half_a_file_is_refused_and_the_whole_is_applied(self, open_shop):
        shop = open_shop(HALVES)
        shop.write_text('salt = "t"\n[arms.din]\nbundle = "din"\nshare = 0.5\n[arms.imn]\nbun')
        assert "not TOML" in shop.refusal()
        shop.apply(HALVES, salt="t")
        assert shop.experiment() == {
            "salt": "t",
            "shares": {"din": 0.5, "imn": 0.5},
            "shadows": {},
            "refused": None,
        }

    def test_who_is_inside_an_arm_that_goes_is_answered(self, open_shop):
        shop = open_shop({"din": "share = 1"}, max_batch_work=1)
        shop.models["din"].takes_s = 0.1
        with in_background() as begin:
            inside = [begin(shop.service.score, user) for user in USERS[:20]]
            wait_until(lambda: len(shop.models["din"].runs) >= 1, "the first is being scored")
            shop.apply({"imn": "share = 1"})
            assert not all(one.done() for one in inside)
            assert shop.arm_of("ann") == "imn"
            assert {one.result().json()["arm"] for one in inside} == {"din"}

    def test_requests_meanwhile_are_answered_by_one_state_or_the_other(self, open_shop):
        """No moment has an arm of one file and the version of the other, and nobody fails."""
        shop = open_shop({"din": "share = 1"})
        both = ({"imn": 'share = 1\nbundle = "imn"'}, {"din": "share = 1"})
        seen: Counter[tuple[int, str, str]] = Counter()

        def ask() -> None:
            for n in range(150):
                answer = shop.service.score(f"u{n}")
                seen[answer.status_code, answer.json()["arm"], answer.json()["version"]] += 1

        with in_background() as begin:
            asking = [begin(ask) for _ in range(2)]
            for k in range(6):
                shop.apply(both[k % 2], salt=f"s{k}")
            for one in asking:
                one.result()
        assert set(seen) == {(200, "din", "din-v"), (200, "imn", "imn-v")}


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
    shop.apply({"din": "share = 1\nhistory_length = 8"})
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
