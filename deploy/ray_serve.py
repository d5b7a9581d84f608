"""Many replicas behind Ray Serve: `python -m deploy.ray_serve --base BASE --store redis://... --replicas 4`.

A gateway reads each request, sees which expert it is for, and hands it to a replica that holds that expert; answers
come back piece by piece. A replica is a whole server, but for the listening. On a cluster that runs already,
`serve deploy deploy/ray_serve.yaml` does the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from deploy.affinity import needs
from deploy.asgi_call import Head, Start, call
from deploy.ray_settings import RaySettings
from server.api.errors import error_response
from server.exposure import check_exposure
from server.settings import Settings
from store.backends.opening import open_ledger
from store.errors import EngineDeadError, InvalidRequestError, QueueFullError, SwitchyardError, TooLargeError
from store.keys import Keys
from store.tiers import Tier

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers unless told not to
try:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import BackPressureError, RayServeException
except ImportError as error:
    raise SwitchyardError("replicas behind Ray Serve need the extra `ray`: pip install 'switchyard[ray]'") from error

_log = logging.getLogger(__name__)

REPLICA_HEADER = b"x-switchyard-replica"
_MOST_NAMES = 4096
"""Experts that a replica reports: a report goes to every gateway, once a period."""
_MOST_CALLERS = 10_000
"""Keys that a gateway remembers to have been let in."""


_GATEWAY_CPUS = 0.1
"""What Ray sets aside for a gateway, which mostly waits."""
_GATEWAY_REQUESTS = 10_000
"""Requests in progress per gateway: replicas set the limit, not gateways."""


class Replica:
    """A whole server in a process of Ray's.

    Args:
        given: settings by name, as text; the environment of this node fills in the others.
    """

    async def __init__(self, given: Mapping[str, str]) -> None:  # type: ignore[misc]  # Ray awaits it
        from server.assembly import assembled  # brings torch, which gateways do without

        settings = Settings(**given)  # type: ignore[arg-type]
        self._open = AsyncExitStack()
        self._id = serve.get_replica_context().replica_id.unique_id.encode()
        console = Console(stderr=True)
        self._house = await asyncio.to_thread(lambda: self._open.enter_context(assembled(settings, console)))
        await self._open.enter_async_context(self._house.app.router.lifespan_context(self._house.app))
        while not self._house.app.state.services.ready:
            await self.check_health()
            await asyncio.sleep(0.05)

    async def answer(self, head: Head, body: bytes) -> AsyncIterator[Start | bytes]:
        """See `deploy.asgi_call.call`."""
        pieces = call(self._house.app, head, body)
        try:
            async for piece in pieces:
                yield (
                    Start(piece.status, [*piece.headers, (REPLICA_HEADER, self._id)])
                    if isinstance(piece, Start)
                    else piece
                )
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    async def nearest(self, text: str) -> str:
        """The heaviest expert that routing would choose for a prompt; "" for the base."""
        decision = await self._house.app.state.services.router.route(text)
        return decision.parts[0][0] if decision.parts else ""

    async def record_routing_stats(self) -> dict[str, list[str]]:
        """Names and aliases of the experts that are decoded here, for `ExpertRouter`."""
        held, registry = self._house.engine.holdings(), self._house.registry
        records = await asyncio.to_thread(registry.list)
        names: dict[Tier, list[str]] = {}
        for tier in (Tier.DEVICE, Tier.HOST):
            here = [record.name for record in records if record.digest in held[tier]]
            names[tier] = [name for one in here for name in (one, *registry.aliases_of(one))][:_MOST_NAMES]
        return {tier.value: found for tier, found in names.items()}

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if not self._house.engine.alive:
            raise EngineDeadError("the engine is not running")

    async def __del__(self) -> None:
        await self._open.aclose()


class Gateway:
    """Hands requests on. Holds bodies whole and answers in pieces."""

    def __init__(self, replicas: Any, base: str, body_bytes: int) -> None:
        self._replicas = replicas.options(stream=True)
        self._nearest = replicas.options(method_name="nearest")
        self._base = base
        self._body_bytes = body_bytes
        self._known: OrderedDict[bytes, None] = OrderedDict()

    async def __call__(self, request: Request) -> Response:
        try:
            return await self._hand_on(request, await self._body(request))
        except SwitchyardError as error:
            return error_response(error, request.scope)

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._body_bytes:
                raise TooLargeError(
                    f"a body may have {self._body_bytes} bytes here; send larger files in pieces (/v1/uploads)"
                )
        return bytes(body)

    async def _expert(self, request: Request, body: bytes) -> str:
        """The expert that a request is for. What routing would choose is asked of any replica: once more than needed,
        some milliseconds, but the answer then comes from where the expert is."""
        need = needs(request.method, request.url.path, body, base=self._base)
        caller = hashlib.sha256(request.headers.get("authorization", "").encode()).digest()
        if not need.text or caller not in self._known:  # strangers get no work done
            return need.expert
        try:
            name: str = await self._nearest.remote(need.text)
        except (RayError, RayServeException, SwitchyardError):
            return ""
        return name

    async def _hand_on(self, request: Request, body: bytes) -> Response:
        scope = request.scope
        head = Head(
            scope["method"],
            scope["path"],
            scope["query_string"],
            [(bytes(name), bytes(value)) for name, value in scope["headers"]],
            tuple(scope["client"]) if scope.get("client") else None,
            scope.get("scheme", "http"),
            await self._expert(request, body),
        )
        pieces = self._replicas.answer.remote(head, body)
        try:
            start = await anext(pieces)
        except BackPressureError:
            raise QueueFullError("all replicas are busy, and enough requests wait for them") from None
        except (RayError, RayServeException) as error:
            _log.error("a replica failed", exc_info=error)
            raise EngineDeadError("the replica that worked on this request has failed; try again") from None
        if start.status not in (401, 403):
            self._remember(request)
        response = StreamingResponse(_rest(pieces), start.status)
        response.raw_headers = start.headers
        return response

    def _remember(self, request: Request) -> None:
        """Whoever was let in is known from now on, by a hash of the key."""
        caller = hashlib.sha256(request.headers.get("authorization", "").encode()).digest()
        self._known[caller] = None
        self._known.move_to_end(caller)
        if len(self._known) > _MOST_CALLERS:
            self._known.popitem(last=False)


async def _rest(pieces: Any) -> AsyncIterator[bytes]:
    """What is left of an answer. Whoever stops listening, stops the replica's work on it."""
    try:
        async for piece in pieces:
            yield piece
    finally:
        pieces.cancel()


def application(arguments: Mapping[str, str]) -> serve.Application:
    """The application, for `serve run` and `serve deploy` (`deploy/ray_serve.yaml`).

    Args:
        arguments: settings of the server by name, and those of `RaySettings` with `ray_` before their names, all as
            text. API keys belong into the environment of the nodes: arguments are kept by Ray in plain sight.

    Raises:
        InvalidRequestError: an argument is wrong, or there is no store that all replicas can reach.
    """
    ours = {key.removeprefix("ray_"): value for key, value in arguments.items() if key.startswith("ray_")}
    given = {key: value for key, value in arguments.items() if not key.startswith("ray_")}
    try:
        settings, cluster = Settings(**given), RaySettings(**ours)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequestError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not settings.store:
        raise InvalidRequestError("replicas need a store that all of them reach: store=redis://HOST:PORT/DB")
    ledger = open_ledger(settings.store)
    try:
        check_exposure(settings, Keys(ledger), Console(stderr=True))
    finally:
        ledger.close()
    most = max(cluster.replicas, cluster.max_replicas or 0)
    replicas = serve.deployment(
        name="replica",
        max_ongoing_requests=settings.max_batch,
        max_queued_requests=settings.max_queue,
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        autoscaling_config={
            "min_replicas": cluster.replicas,
            "max_replicas": most,
            "target_ongoing_requests": cluster.target_requests,
            "upscale_delay_s": cluster.upscale_delay,
            "downscale_delay_s": cluster.downscale_delay,
        },
        request_router_config=RequestRouterConfig(
            request_router_class="deploy.ray_router:ExpertRouter",
            request_routing_stats_period_s=cluster.report_seconds,
        ),
        graceful_shutdown_timeout_s=30.0,
    )(Replica)
    gateways = serve.deployment(
        name="gateway",
        num_replicas=cluster.gateways,
        max_ongoing_requests=_GATEWAY_REQUESTS,
        ray_actor_options={"num_cpus": _GATEWAY_CPUS},
    )(Gateway)
    return gateways.bind(replicas.bind(given), settings.served_base_name, int(cluster.body_bytes))


def main() -> None:
    """Command line: options are settings, `--base X --store redis://... --ray-replicas 4`; Ctrl-C stops everything."""
    words = sys.argv[1:]
    flags, values = words[::2], words[1::2]
    if len(flags) != len(values) or not all(flag.startswith("--") for flag in flags):
        sys.exit(f"{__doc__}\nEvery setting of `switchyard serve` is an option, and so are:\n{_options()}")
    arguments = {flag[2:].replace("-", "_"): value for flag, value in zip(flags, values, strict=True)}
    if keys := arguments.pop("api_keys", None):
        os.environ["SWITCHYARD_API_KEYS"] = keys  # inherited by the replicas; arguments would be shown by Ray
    try:
        app = application(arguments)
        settings = Settings(**{key: value for key, value in arguments.items() if not key.startswith("ray_")})  # type: ignore[arg-type]
    except SwitchyardError as error:
        sys.exit(f"error: {error.message}")
    ray.init(include_dashboard=False, ignore_reinit_error=True)
    serve.start(http_options={"host": settings.host, "port": settings.port})
    serve.run(app, name="switchyard", route_prefix="/")
    Console().print(f"ready at http://{settings.host}:{settings.port}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()


def _options() -> str:
    fields = RaySettings.model_fields.items()
    return "\n".join(f"  --ray-{name.replace('_', '-')}: {field.description}" for name, field in fields)


if __name__ == "__main__":
    main()
