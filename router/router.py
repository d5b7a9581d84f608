"""The face of the router: experts come and go, prompts get a mix."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from router.conversation import in_conversation, last_turns
from router.decision import EMPTY_PROMPT, NO_EXPERTS, NONE_ALLOWED, Decision, Rules, decide
from router.discriminant import Discriminant
from router.entries import Entries
from router.features import FeatureCache, Features, Featurizer, OvertakenError, RecentFeatures
from router.fitting import Fitting, library_key
from router.held_out import HeldOut, hold_out
from router.index import Entry, Snapshot
from router.metric import LowRank, Metric, MetricKind
from router.options import ANY, RouteOptions
from router.report import Report, Seen, make_report
from router.settings import RouterSettings
from router.state import Learned, StateFile
from router.versions import Versions
from store.errors import SwitchyardError

log = logging.getLogger(__name__)


class Router:
    """Routes prompts by the nearest exemplar centres. For the tasks of one event loop.

    What `add_expert` and `remove_expert` have changed is seen by every call of `route` that decides later; until then
    the previous state decides. A decision comes from one immutable snapshot, which the first call of `route` after a
    change builds: so that a thousand experts added at start cost one build, not a thousand.

    That build takes distances under the metric at hand, but for small libraries whose metric is fitted anew in an
    instant. Else it is fitted in the background, and the snapshot under it takes the place of the other: `settled`
    waits for that.

    Args:
        featurize: the engine's features of the pristine base.
        cache: where features of exemplars are kept between runs; it must belong to the same base and layer.
        state: where the learned metric is kept between runs.
        device: the engine's; a GPU of it compares prompts with centres too.
    """

    def __init__(
        self, featurize: Featurizer, cache: FeatureCache, settings: RouterSettings, state: StateFile | None = None,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self._entries = Entries(featurize, cache, settings)
        self._recent = RecentFeatures(featurize)
        self._cache = cache
        self._settings = settings
        self._state = state
        self._snapshot_of = partial(Snapshot, quantile=settings.quantile, margin=settings.margin, device=device)
        self._rules = Rules(settings.mode, settings.votes, settings.min_share, settings.steps)
        self._experts: dict[str, Entry] = {}
        self._versions = Versions()
        self._fitting = Fitting(settings)
        self._changes: dict[str, object] = {}
        """Names whose addition is under way, each with the token of the latest call."""
        self._edition = 0
        """Counts the changes of `_experts`."""
        self._background: Entry | None = None
        self._metric: Metric | None = None
        self._library = ""
        """Key of the experts that `_metric` was fitted to."""
        self._snapshot, self._snapshot_edition = Snapshot((), None, None, quantile=1.0, margin=1.0), 0
        self._building = asyncio.Lock()
        self._refitting: asyncio.Task[None] | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """Names that prompts can be routed to, in alphabetical order."""
        return tuple(sorted(self._experts))

    def knows(self, name: str) -> bool:
        """Whether prompts can be routed to that name."""
        return name in self._experts

    async def add_expert(self, name: str, digest: str, exemplars: Sequence[str], exemplars_key: str) -> None:
        """Let prompts find an expert by its exemplars; an expert of that name is replaced when this one is ready.

        Without exemplars that are not blank it can be reached by its name only. A call that a later `add_expert` or
        `remove_expert` of the same name overtakes changes nothing.

        Args:
            digest: of the expert file; several names may share it.
            exemplars: example prompts.
            exemplars_key: identifies them, e.g. their digest; features cached under it are used again.

        Raises:
            SwitchyardError: the featurizer failed; whatever was known of the name stays.
        """
        change = self._changes[name] = object()
        try:
            wanted = partial(self._is_latest, name, change)
            entry = await self._entries.of_expert(name, digest, exemplars, exemplars_key, wanted)
            if not wanted():
                return
            if entry is None:
                self._forget(name)
                return
            self._check_width(entry)
            self._replace(name, entry)
        except OvertakenError:
            return
        finally:
            if self._changes.get(name) is change:
                del self._changes[name]

    def _is_latest(self, name: str, change: object) -> bool:
        return self._changes.get(name) is change

    def remove_expert(self, name: str) -> None:
        """Route nothing to that name any more; an addition of it under way is called off."""
        self._changes.pop(name, None)
        self._forget(name)

    async def route(self, prompt: str, options: RouteOptions = ANY, *, earlier: Sequence[str] = ()) -> Decision:
        """Which experts should answer a prompt, and why.

        Args:
            earlier: what the same user asked before, the latest last; see `router.conversation`.

        Raises:
            SwitchyardError: the featurizer failed.
        """
        if not prompt.strip():
            return EMPTY_PROMPT
        if not self._experts:  # base-only traffic pays nothing
            return NO_EXPERTS
        if not any(options.sees(name) for name in self._experts):
            return NONE_ALLOWED if options.is_constrained else NO_EXPERTS
        asked = [*last_turns(earlier), prompt] if options.sticky else [prompt]
        features = await self._recent.features(asked)
        snapshot = await self.current()
        return in_conversation(await asyncio.to_thread(self._decide, snapshot, features, options))

    async def report(self, seen: Sequence[Seen], options: RouteOptions, most: int) -> Report:
        """How well experts are told apart; see `router.report`."""
        snapshot, given = await self.current(), self._settings
        hold = partial(self._hold_out, tuple(self._experts.values()), snapshot)
        return await asyncio.to_thread(
            make_report, snapshot, seen, hold, self._rules, options, neighbours=given.neighbours, most=most
        )

    def _hold_out(self, entries: Sequence[Entry], snapshot: Snapshot, shown: Sequence[Entry]) -> HeldOut:
        return hold_out(
            shown,
            entries,
            cache=self._cache,
            # As for a library that has changed: of many experts the metric at hand tells enough.
            fit=self._fit if self._fitting.is_quick(entries) else lambda _: snapshot.metric,
            build=lambda rest, metric: self._build(rest, metric, snapshot),
            centres=self._settings.centres,
            seed=self._settings.seed,
        )

    async def prepare(self) -> None:
        """Compute what the first routed prompt would have to wait for: the background, the metric, the index.

        Raises:
            SwitchyardError: the featurizer failed.
        """
        async with self._building:
            await self._ready_background()
        await self.settled()

    async def settled(self) -> None:
        """Wait until the metric is the one fitted to the experts as they are."""
        if self._experts:
            await self.current()
        while self._refitting is not None:
            await asyncio.shield(self._refitting)

    def _decide(self, snapshot: Snapshot, features: Features, options: RouteOptions) -> list[Decision]:
        visible = None if options.sees_all else options.sees
        count = self._settings.neighbours
        decisions = (decide(snapshot.search(row, count, visible=visible), self._rules, options) for row in features)
        return [replace(decision, features=row) for decision, row in zip(decisions, features, strict=True)]

    def _forget(self, name: str) -> None:
        if name in self._experts:
            self._replace(name, None)

    def _replace(self, name: str, entry: Entry | None) -> None:
        former = self._experts.pop(name, None)
        if entry is not None:
            self._experts[name] = entry
        self._edition += 1
        if unused := self._versions.replaced(name, former, entry):  # not at a start: it asks all experts
            for key in unused - {other.features_key for other in self._experts.values()}:
                self._cache.drop(key)

    def _check_width(self, entry: Entry) -> None:
        width = entry.profile.centres.shape[1]
        for other in self._experts.values():
            if other.name != entry.name and other.profile.centres.shape[1] != width:
                raise SwitchyardError(
                    f"the routing features of {entry.name!r} have {width} dimensions, those of {other.name!r} "
                    f"{other.profile.centres.shape[1]}"
                )

    async def current(self) -> Snapshot:
        """The snapshot of the experts as they are when this returns."""
        async with self._building:
            changed = self._snapshot_edition != self._edition
            while self._snapshot_edition != self._edition:
                await self._ready_metric()
                edition, entries = self._edition, tuple(self._experts.values())
                self._snapshot = await asyncio.to_thread(self._build, entries, self._metric, self._snapshot)
                self._snapshot_edition = edition
            if changed and self._refitting is None:
                self._refitting = asyncio.create_task(self._refit())
            return self._snapshot

    async def _ready_metric(self) -> None:
        """Have a metric to build with: the last one, the one on disk, or one fitted now."""
        entries = tuple(self._experts.values())
        if not entries:
            return
        width = entries[0].profile.centres.shape[1]
        await self._ready_background()
        if self._metric is None and self._state is not None and self._settings.metric is not MetricKind.PLAIN:
            learned = await asyncio.to_thread(self._state.load)
            if learned is not None and learned.metric.origin.shape[0] == width:
                self._metric, self._library = learned.metric, learned.library
        if self._metric is None or (self._fitting.is_quick(entries) and self._library != library_key(entries)):
            try:
                self._metric, self._library = await asyncio.to_thread(self._fit, entries), library_key(entries)
            except Exception:
                if self._metric is None:
                    raise
                log.exception("the router's metric could not be fitted; the previous one stays")
            else:
                await self._keep()

    async def _ready_background(self) -> None:
        if self._settings.metric is not MetricKind.PLAIN and self._background is None:
            self._background = await self._entries.background()

    async def _refit(self) -> None:
        """Fit the metric to the library, again if that has changed meanwhile, then let it take over."""
        try:
            while self._experts and self._library != (library := library_key(entries := tuple(self._experts.values()))):
                metric = await asyncio.to_thread(self._fit, entries)
                async with self._building:
                    edition, entries = self._edition, tuple(self._experts.values())
                    snapshot = await asyncio.to_thread(self._build, entries, metric, self._snapshot)
                    self._metric, self._library = metric, library
                    self._snapshot, self._snapshot_edition = snapshot, edition
                await self._keep()
        except Exception:
            log.exception("the router's metric could not be fitted; the previous one stays until the next change")
        finally:
            self._refitting = None

    async def _keep(self) -> None:
        if self._state is not None and isinstance(self._metric, Discriminant | LowRank):
            await asyncio.to_thread(self._state.save, Learned(self._library, self._metric))

    def _fit(self, entries: Sequence[Entry]) -> Metric:
        return self._fitting.metric(entries, self._background)

    def _build(self, entries: Sequence[Entry], metric: Metric | None, previous: Snapshot) -> Snapshot:
        return self._snapshot_of(entries, metric, self._background, previous=previous)
