"""The arms that serve: each a bundle with a queue of its own, all of them on one device."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from service.batcher import Batcher
from service.cost import BatchCost
from service.errors import OverloadedError, UnknownArmError
from service.experiment import ArmSettings, Experiment, ExperimentError
from service.explainer import Explainer
from service.history import HistoryStore
from service.metrics import ArmMetrics, Metrics
from service.model import Model
from service.recommender import Recommender
from service.scorer import BatchScorer, DeviceThread, Prepared, Scored, ScoreRequest
from service.settings import Settings
from service.turns import Seat, SharedDevice

# A batch is short when it takes no more of the usual deadline than this.
_SHORT_SHARE = 0.1
# So much of it is kept free at most, because predictions err.
_MARGIN_SHARE = 0.3
# A Redis that has not answered in so much of it is given up: then it can be told, or scored cold.
_FETCH_SHARE = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """One arm, started. `history_length`: behaviors that its model is given at most.

    `warm_up_took`: (work, seconds) of its model's first batches.
    """

    name: str
    bundle: Path
    model: Model
    warm_up_took: list[tuple[int, float]]
    history_length: int
    seat: Seat
    scorer: BatchScorer
    batcher: Batcher[ScoreRequest, Prepared, Scored]
    recommender: Recommender
    explainer: Explainer
    metrics: ArmMetrics

    def observe(self, scored: Scored, *, waited_s: float, respond_s: float, total_s: float) -> None:
        """Count a request that has been answered."""
        self.metrics.observe_stage("respond", respond_s)
        self.metrics.observe_stage("total", total_s)
        self._observe_scored(scored, waited_s)

    def observe_shadowed(self, scored: Scored, *, waited_s: float) -> None:
        """Count a request that this arm, a shadow, has scored for nobody."""
        taken_s = waited_s + scored.fetch_s + scored.encode_s + scored.infer_s
        self.metrics.observe_stage("shadow", taken_s)
        self.metrics.count_shadowed("scored")
        self._observe_scored(scored, waited_s)

    def _observe_scored(self, scored: Scored, waited_s: float) -> None:
        metrics = self.metrics
        metrics.observe_stage("queue", waited_s)
        metrics.history_behaviors.observe(scored.history_length)
        if scored.unknown_candidates:
            metrics.unknown_candidates.inc(scored.unknown_candidates)
        if scored.degraded:
            metrics.degraded.inc()


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A model on the device, and what its warm-up took."""

    model: Model
    warm_up_took: list[tuple[int, float]]


class Arms:
    """All arms of an experiment. `thread`: the one of their device.

    `open_model`: loads a bundle; raises BundleError. Called in a thread of its own.
    """

    def __init__(
        self,
        settings: Settings,
        experiment: Experiment,
        open_model: Callable[[Path], Model],
        store: HistoryStore,
        metrics: Metrics,
    ) -> None:
        self.experiment = experiment
        self._settings = settings
        self._open_model = open_model
        self._store = store
        self._metrics = metrics
        self._device = SharedDevice()
        self.thread = DeviceThread()
        self._arms: dict[str, Arm] = {}

    def __iter__(self) -> Iterator[Arm]:
        return iter(self._arms.values())

    def arm_for(self, user_id: str, asked: str | None) -> Arm:
        """Return the arm that answers: the one that was asked for, or the user's.

        Raises UnknownArmError.
        """
        if asked is None:
            return self._arms[self.experiment.arm_of(user_id)]
        if asked not in self._arms:
            raise UnknownArmError(
                f"arm: there is no {asked!r}, there are {', '.join(sorted(self._arms))}"
            )
        return self._arms[asked]

    def shadow(self, request: ScoreRequest, *, deadline: float) -> None:
        """Let the user's shadow arms score a request too; nobody waits for their answers."""
        for name in self.experiment.shadows_of(request.user_id):
            arm = self._arms[name]
            try:
                answer = arm.batcher.submit(request, deadline=deadline)
            except OverloadedError:
                arm.metrics.count_shadowed("refused")
            else:
                answer.add_done_callback(partial(_count_shadow, arm))

    async def start(self) -> None:
        """Open and warm up what the experiment names, and begin to take requests.

        Raises ContractError, ExperimentError or, from a model that cannot be warmed up,
        ServiceError; `close` is due then, too.
        """
        opened: dict[Path, _Opened] = {}
        for name, chosen in self.experiment.arms.items():
            self._arms[name] = await self._start(name, chosen, opened)
        self._store.keep_at_least(max(arm.history_length for arm in self))

    def show(self, *, is_served: bool) -> None:
        """Let the metrics say that this is served, or that it is not any more."""
        self._metrics.queue_work_limit.set(is_served * self._settings.max_queue_work)
        for name, chosen in self.experiment.arms.items():
            manifest = self._arms[name].model.manifest
            labels = (manifest.model_name, name, manifest.model_version)
            self._metrics.model_info.labels(*labels).set(is_served)
            share = self._metrics.arm_share.labels(name, str(chosen.shadow).lower())
            share.set(is_served * chosen.share)

    async def close(self) -> None:
        """End all arms; requests that wait are cancelled."""
        for arm in self:
            await arm.batcher.stop()
        self.thread.shutdown()

    async def _start(self, name: str, chosen: ArmSettings, opened: dict[Path, _Opened]) -> Arm:
        found = opened.get(chosen.bundle)
        if found is None:
            found = await self._open(chosen.bundle)
            opened[chosen.bundle] = found
        model, settings = found.model, self._settings
        longest = model.manifest.features.history_length
        history_length = longest if chosen.history_length is None else chosen.history_length
        if history_length > longest:
            raise ExperimentError(
                f"arms.{name}.history_length: the bundle reads at most {longest:,} behaviors, "
                f"{history_length:,} are asked for"
            )
        metrics = self._metrics.of_arm(name, model.manifest.model_version)
        scorer = BatchScorer(
            model,
            self._store,
            metrics,
            device=self.thread,
            on_redis_failure=settings.on_redis_failure,
            history_length=history_length,
            fetch_timeout_s=_FETCH_SHARE * settings.deadline_s,
            fetch_alone_timeout_s=_FETCH_SHARE * settings.recommend_deadline_s,
        )
        cost = BatchCost()
        cost.learn_from_warm_up(found.warm_up_took)
        seat = self._device.seat(chosen.device_weight)
        batcher = Batcher[ScoreRequest, Prepared, Scored](
            seat=seat,
            prepare=scorer.prepare,
            run=scorer.run,
            size=scorer.size,
            prepared_size=scorer.prepared_size,
            shapes=model.shapes,
            cost=cost,
            short_s=_SHORT_SHARE * settings.deadline_s,
            margin_s=_MARGIN_SHARE * settings.deadline_s,
            max_batch_work=settings.max_batch_work,
            max_queue_work=settings.max_queue_work,
            metrics=metrics,
        )
        recommender = Recommender(
            scorer,
            lend=batcher.lend,
            block_items=settings.recommend_block_items,
            metrics=metrics,
        )
        await recommender.warm_up()
        batcher.start()
        return Arm(
            name=name,
            bundle=chosen.bundle,
            model=model,
            warm_up_took=found.warm_up_took,
            history_length=history_length,
            seat=seat,
            scorer=scorer,
            batcher=batcher,
            recommender=recommender,
            explainer=Explainer(scorer, lend=batcher.lend, metrics=metrics),
            metrics=metrics,
        )

    async def _open(self, bundle: Path) -> _Opened:
        model = await asyncio.to_thread(self._open_model, bundle)
        took = await asyncio.get_running_loop().run_in_executor(
            self.thread, model.warm_up, self._settings.max_batch_work
        )
        return _Opened(model=model, warm_up_took=took)


def _count_shadow(arm: Arm, answer: "asyncio.Future[tuple[Scored, float]]") -> None:
    if answer.cancelled() or answer.exception() is not None:
        arm.metrics.count_shadowed("failed")
        return
    scored, waited_s = answer.result()
    arm.observe_shadowed(scored, waited_s=waited_s)
