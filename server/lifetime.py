"""What a server does from its start to its end, beside answering."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI

from server.api.services import Services
from server.chores import do_all
from store.errors import SwitchyardError

log = logging.getLogger(__name__)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Run the engine, and teach the router the experts of the registry; the application is ready when that is done."""
    services: Services = app.state.services
    await services.engine.start()
    working = [asyncio.create_task(work) for work in (_follow(services), services.inbox.tidy(), services.jobs.run())]
    try:
        yield
    finally:
        services.ready = False
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        await services.engine.stop()
        await asyncio.to_thread(services.tracing.close)
        with suppress(SwitchyardError):
            await services.meter.settle()


async def _follow(services: Services) -> None:
    try:
        await services.library.align()
    except Exception:
        log.exception("the router could not be restored; the server stays not ready")
        return
    # Without experts nothing is routed yet, and nobody has to wait for what the first one will need.
    services.ready = not services.router.experts
    try:
        await services.router.prepare()
    except SwitchyardError as error:
        log.warning("the router is not prepared, the first routed prompt will wait: %s", error.message)
    except Exception:  # a bug of ours, which must not keep those from an answer who name their expert
        log.exception("the router is not prepared")
    services.ready = True
    await do_all(services.chores)
