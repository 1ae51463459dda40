"""The arms that serve: each a bundle with a queue of its own, all of them on one device."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
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
_DRAIN_POLL_S = 0.02


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

    async def drain(self) -> None:
        """Answer what is inside, then end."""
        try:
            # An event would have to be set by every request; this is asked for a moment, rarely.
            while not (  # noqa: ASYNC110
                self.batcher.is_idle and self.recommender.is_idle and self.explainer.is_idle
            ):
                await asyncio.sleep(_DRAIN_POLL_S)
        finally:
            await self.batcher.stop()


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A model on the device, and what its warm-up took."""

    model: Model
    warm_up_took: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class _Served:
    """What is served at one moment; replaced as a whole."""

    experiment: Experiment
    arms: Mapping[str, Arm]


class Arms:
    """All arms of a service. `thread`: the one of their device.

    `open_model`: loads a bundle; raises BundleError. Called in a thread of its own, so that what is
    served goes on meanwhile.
    """

    def __init__(
        self,
        settings: Settings,
        open_model: Callable[[Path], Model],
        store: HistoryStore,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._open_model = open_model
        self._store = store
        self._metrics = metrics
        metrics.queue_work_limit.set(settings.max_queue_work)
        self._device = SharedDevice()
        self.thread = DeviceThread()
        self._applying = asyncio.Lock()
        self._draining: set[asyncio.Task[None]] = set()
        self._served: _Served | None = None

    def __iter__(self) -> Iterator[Arm]:
        return iter(self._now.arms.values())

    @property
    def experiment(self) -> Experiment:
        """Return what is applied at present."""
        return self._now.experiment

    @property
    def _now(self) -> _Served:
        assert self._served is not None, "nothing has been applied yet"
        return self._served

    def arm_for(self, user_id: str, asked: str | None) -> Arm:
        """Return the arm that answers: the one that was asked for, or the user's.

        Raises UnknownArmError.
        """
        served = self._now
        if asked is None:
            return served.arms[served.experiment.arm_of(user_id)]
        if asked not in served.arms:
            raise UnknownArmError(
                f"arm: there is no {asked!r}, there are {', '.join(sorted(served.arms))}"
            )
        return served.arms[asked]

    def shadow(self, request: ScoreRequest, *, deadline: float) -> None:
        """Let the user's shadow arms score a request too; nobody waits for their answers."""
        served = self._now
        for name in served.experiment.shadows_of(request.user_id):
            arm = served.arms[name]
            try:
                answer = arm.batcher.submit(request, deadline=deadline)
            except OverloadedError:
                arm.metrics.count_shadowed("refused")
            else:
                answer.add_done_callback(partial(_count_shadow, arm))

    async def apply(self, experiment: Experiment) -> None:
        """Serve by another experiment from one moment to the next, or raise and change nothing.

        An arm goes on as it is where its bundle and its history length are the same; what is not
        served any more answers what it has taken. Raises ContractError, ExperimentError or, from a
        model that cannot be warmed up, ServiceError.
        """
        async with self._applying:
            old = {} if self._served is None else dict(self._served.arms)
            opened = {
                arm.bundle: _Opened(model=arm.model, warm_up_took=arm.warm_up_took)
                for arm in old.values()
            }
            arms: dict[str, Arm] = {}
            try:
                for name, chosen in experiment.arms.items():
                    kept = old.get(name)
                    arms[name] = (
                        kept
                        if kept is not None and _is_as(kept, chosen)
                        else await self._start(name, chosen, opened)
                    )
            except BaseException:
                for arm in arms.values():
                    if arm is not old.get(arm.name):
                        await arm.drain()
                raise
            # From here to the last line nothing waits: every request sees all of it or nothing.
            for name, arm in arms.items():
                arm.seat.weight = experiment.arms[name].device_weight
            self._store.keep_at_least(max(arm.history_length for arm in arms.values()))
            self._tell(old, arms, experiment)
            self._served = _Served(experiment=experiment, arms=arms)
            for arm in old.values():
                if arms.get(arm.name) is not arm:
                    task = asyncio.create_task(arm.drain())
                    self._draining.add(task)
                    task.add_done_callback(self._draining.discard)

    async def close(self) -> None:
        """End all arms; requests that wait are cancelled."""
        for task in self._draining:
            task.cancel()
        await asyncio.gather(*self._draining, return_exceptions=True)
        if self._served is not None:
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
        try:
            await recommender.warm_up()
        except BaseException:
            await batcher.stop()  # which gives its seat up
            raise
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

    def _tell(self, old: Mapping[str, Arm], new: Mapping[str, Arm], experiment: Experiment) -> None:
        for arms, is_served in ((old, 0), (new, 1)):
            for arm in arms.values():
                manifest = arm.model.manifest
                labels = (manifest.model_name, arm.name, manifest.model_version)
                self._metrics.model_info.labels(*labels).set(is_served)
        shares = self._metrics.arm_share
        if self._served is not None:
            for name, chosen in self._served.experiment.arms.items():
                shares.labels(name, str(chosen.shadow).lower()).set(0)
        for name, chosen in experiment.arms.items():
            shares.labels(name, str(chosen.shadow).lower()).set(chosen.share)


def _is_as(arm: Arm, chosen: ArmSettings) -> bool:
    longest = arm.model.manifest.features.history_length
    return arm.bundle == chosen.bundle and arm.history_length == (chosen.history_length or longest)


def _count_shadow(arm: Arm, answer: "asyncio.Future[tuple[Scored, float]]") -> None:
    if answer.cancelled() or answer.exception() is not None:
        arm.metrics.count_shadowed("failed")
        return
    scored, waited_s = answer.result()
    arm.observe_shadowed(scored, waited_s=waited_s)
