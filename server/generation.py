"""Where route, mix, engine and tokens meet: a request becomes text, piece by piece. Knows no HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from router.decision import NO_EXPERTS, Decision
from router.options import ANY, RouteOptions
from router.router import Router
from server.choices import Answer, ChoiceText, Part, Route
from server.composing import compose
from server.encoding import Encoder
from server.engine.types import Engine, EngineRequest, SamplingParams, TokenStream
from server.metrics import Metrics
from server.prompts import Prompt
from server.text import IncrementalDecoder, StopMatcher
from server.tracing import Tracing
from store.access import Caller
from store.errors import ContextLengthError, ExpertRemovedError, InvalidRequestError, NotFoundError
from store.mix import BASE_MIX, WEIGHT_DECIMALS
from store.record import ExpertRecord
from store.registry import Registry

AUTO = "auto"
"""The model name that asks for routing."""

EXPERT_REQUESTED = "expert_requested"
"""The reason of a route that the request said itself, by an expert's name."""

_LOOKS = 3
"""How often the experts of one request may be removed while it looks for them."""


@dataclass(frozen=True)
class GenerationRequest:
    """What a client wants: `n` answers to each prompt, by a model's name or by an explicit mix."""

    model: str
    prompts: tuple[Prompt, ...]
    experts: tuple[tuple[str, float], ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    usual_tokens: int | None = None
    """Most tokens of an answer where `sampling` does not say; fewer if the context leaves fewer."""
    stop: tuple[str, ...] = ()
    n: int = 1
    echo: bool = False
    """Begin each answer with its prompt."""
    show_special: bool = False
    """Leave special tokens in the text of answers: some models mark calls of tools with them."""
    routing: RouteOptions = ANY
    """Constraints on the route, where the model is `auto`."""


class Charge(Protocol):
    """Notes what a caller has spent."""

    def __call__(self, caller: Caller, *, prompt_tokens: int = 0, completion_tokens: int = 0) -> None: ...


Watcher = Callable[[Sequence[Prompt], Part, Caller], None]
"""Is told the prompts of a request, the expert that it named, and who asked; it must neither wait nor raise."""

RoutedWatcher = Callable[[Decision, Caller], None]
"""Is told what was decided for a prompt, and who asked; it must neither wait nor raise."""


class Generation:
    """Turns requests into answers."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        router: Router,
        metrics: Metrics,
        *,
        encoder: Encoder,
        max_n: int,
        max_sequences: int,
        charge: Charge,
        tracing: Tracing,
        used: Callable[[str], None],
    ) -> None:
        """Args:
        used: told the digest of each expert that takes part in an answer.
        """
        self._engine = engine
        self._registry = registry
        self._router = router
        self._metrics = metrics
        self._encoder = encoder
        self._max_n = max_n
        self._max_sequences = max_sequences
        self._charge = charge
        self._tracing = tracing
        self._used = used
        self._watchers: list[Watcher] = []
        self._routed_watchers: list[RoutedWatcher] = []

    async def start(self, request: GenerationRequest, by: Caller) -> Answer:
        """Route the request and queue it in the engine; the answer must be closed.

        Args:
            by: who asks: only experts that exist for them answer.

        Raises:
            InvalidRequestError: a limit is exceeded, a prompt is empty or too long, or fields contradict each other.
            NotFoundError: no such model or expert.
            QueueFullError: the engine has no room; nothing of the request is queued.
        """
        began = time.monotonic()
        self._check_limits(request)
        routes = await self._routes(request, by)
        self._tracing.record("route", began, time.monotonic(), reason=routes[0].reason, prompts=len(routes))
        prompts = [await self._encode(prompt) for prompt in request.prompts]
        if request.sampling.grammar is not None:
            await self._engine.check_grammar(request.sampling.grammar)
        streams: list[TokenStream] = []
        try:
            for prompt, tokens, route in zip(request.prompts, prompts, routes, strict=True):
                sampling = self._limited(request, len(tokens))
                for i in range(request.n):
                    streams.append(self._submit(prompt, EngineRequest(tokens, _nth(sampling, i), route.mix, by.tenant)))
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        self._count(routes)
        tokenizer = self._engine.tokenizer
        texts = [
            ChoiceText(
                IncrementalDecoder(partial(tokenizer.decode, special=request.show_special), tokens),
                StopMatcher(request.stop),
                prompt.echo(tokenizer) if request.echo else "",
            )
            for prompt, tokens in zip(request.prompts, prompts, strict=True)
            for _ in range(request.n)
        ]
        tokens_in = sum(map(len, prompts))
        self._charge(by, prompt_tokens=tokens_in)
        return Answer(
            routes,
            tokens_in,
            list(zip(streams, texts, strict=True)),
            self._metrics,
            began,
            partial(self._close, request, routes[0], by),
            self._tracing,
        )

    def watch(self, watcher: Watcher) -> None:
        """Tell somebody of every request that named an expert, once it is answered."""
        self._watchers.append(watcher)

    def watch_routed(self, watcher: RoutedWatcher) -> None:
        """Tell somebody of every routed prompt."""
        self._routed_watchers.append(watcher)

    async def check_model(self, model: str, by: Caller) -> None:
        """Whether a request may name the model.

        Raises:
            NotFoundError: there is no such model.
        """
        if model not in (AUTO, self._engine.base.name):
            await self._expert(model, "model", by)

    async def decide(self, prompt: Prompt, options: RouteOptions, by: Caller, *, as_listed: bool = False) -> Decision:
        """Which experts that exist for the caller should answer a prompt, and why.

        Args:
            as_listed: only those that the registry has now; the router may learn a little later what is gone. Others
                than administrators get no others anyway.

        Raises:
            NotFoundError: an expert that the options allow or deny does not exist.
            InvalidRequestError: the prompt asks nothing.
        """
        deny = await self._named(options.deny, "routing.deny", by)
        allow = None if options.allow is None else await self._named(options.allow, "routing.allow", by)
        options = dataclasses.replace(options, allow=allow, deny=deny)
        *earlier, question = prompt.questions(self._engine.tokenizer)
        visible = await asyncio.to_thread(self._registry.names, by)
        if not visible:  # not "none allowed": the others do not exist
            return NO_EXPERTS
        if as_listed or not by.is_admin:
            options = options.within(visible)
        return await self._router.route(question, options, earlier=earlier)

    def _check_limits(self, request: GenerationRequest) -> None:
        if request.n > self._max_n:
            raise InvalidRequestError(f"n is {request.n}, the limit is {self._max_n}", param="n")
        if len(request.prompts) * request.n > self._max_sequences:
            raise InvalidRequestError(
                f"{len(request.prompts)} prompts × n={request.n} exceed the limit of {self._max_sequences} answers",
                param=request.prompts[0].param,
            )

    async def _routes(self, request: GenerationRequest, by: Caller) -> tuple[Route, ...]:
        """The route of each prompt; looked for again if an expert of it is removed meanwhile."""
        for look in range(_LOOKS - 1):
            with suppress(ExpertRemovedError):
                return await self._routes_now(request, by, as_listed=look > 0)
        return await self._routes_now(request, by, as_listed=True)

    async def _routes_now(self, request: GenerationRequest, by: Caller, *, as_listed: bool) -> tuple[Route, ...]:
        if request.model == AUTO and not request.experts:
            routed = (self._routed(prompt, request.routing, by, as_listed=as_listed) for prompt in request.prompts)
            return tuple(await asyncio.gather(*routed))
        return (await self._called(request, by),) * len(request.prompts)

    async def _routed(self, prompt: Prompt, options: RouteOptions, by: Caller, *, as_listed: bool) -> Route:
        decision = await self.decide(prompt, options, by, as_listed=as_listed)
        self._metrics.routing.decided(decision)
        for watch in self._routed_watchers:
            watch(decision, by)
        return compose(
            self._registry.lineage, self._engine.base.dtype, decision.parts, decision.code, decision.distance
        )

    async def _called(self, request: GenerationRequest, by: Caller) -> Route:
        """The route of a request that says itself who answers."""
        if request.experts:
            if request.model not in (AUTO, self._engine.base.name):
                await self._expert(request.model, "model", by)
                raise InvalidRequestError(
                    f"experts is an explicit mix: set model to {AUTO!r} or the base, not to an expert", param="experts"
                )
            return await self._explicit(request.experts, by)
        if request.model == self._engine.base.name:
            return Route(BASE_MIX, (), "base_requested")
        expert = await self._expert(request.model, "model", by)
        return self._composed([(expert.name, expert.digest, 1.0)], EXPERT_REQUESTED)

    async def _explicit(self, experts: Sequence[tuple[str, float]], by: Caller) -> Route:
        chosen: list[tuple[str, str, float]] = []
        for i, (name, weight) in enumerate(experts):
            expert = await self._expert(name, f"experts[{i}].id", by)
            chosen.append((expert.name, expert.digest, round(weight, WEIGHT_DECIMALS)))
        return self._composed(chosen, "mix_requested")

    def _composed(self, chosen: Iterable[tuple[str, str, float]], reason: str, distance: float | None = None) -> Route:
        return compose(self._registry.lineage, self._engine.base.dtype, chosen, reason, distance)

    async def _expert(self, name: str, param: str, by: Caller) -> ExpertRecord:
        try:
            return await asyncio.to_thread(self._registry.get, name, by)
        except NotFoundError as error:
            raise NotFoundError(error.message, param=param) from error

    async def _named(self, names: Iterable[str], param: str, by: Caller) -> frozenset[str]:
        """What these are called without aliases."""
        return frozenset([(await self._expert(name, param, by)).name for name in sorted(names)])

    async def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        tokens = await self._encoder.encode(prompt)
        if not tokens:
            raise InvalidRequestError("the prompt has no tokens", param=prompt.param)
        return tuple(tokens)

    def _limited(self, request: GenerationRequest, prompt_tokens: int) -> SamplingParams:
        """The sampling of one prompt's answers: a length that the client did not ask for must not be refused."""
        sampling = request.sampling
        if sampling.max_tokens is not None or request.usual_tokens is None:
            return sampling
        room = max(1, self._engine.base.context_length - prompt_tokens)
        return dataclasses.replace(sampling, max_tokens=min(request.usual_tokens, room))

    def _submit(self, prompt: Prompt, request: EngineRequest) -> TokenStream:
        try:
            return self._engine.submit(request)
        except ContextLengthError as error:  # the engine does not know which field the tokens came from
            raise ContextLengthError(error.message, param=prompt.param) from error

    def _close(self, request: GenerationRequest, route: Route, by: Caller, spent: int) -> None:
        self._charge(by, completion_tokens=spent)
        if route.reason == EXPERT_REQUESTED:
            for watch in self._watchers:
                watch(request.prompts, route.parts[0], by)

    def _count(self, routes: Sequence[Route]) -> None:
        for route in routes:
            self._metrics.mix_size.observe(len(route.mix.parts))
            for part in route.parts:
                self._metrics.count_expert(part.name)
                self._used(part.digest)


def _nth(sampling: SamplingParams, i: int) -> SamplingParams:
    """The sampling of the i-th of `n` choices: with a seed, each has its own, the same in every run."""
    return sampling if sampling.seed is None else dataclasses.replace(sampling, seed=sampling.seed + i)
