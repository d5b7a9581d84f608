"""No accidental exposure: a server listens beyond its machine only if somebody may be told apart from everybody."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.panel import Panel

from server.settings import Settings
from store.errors import InvalidRequestError
from store.keys import Keys

log = logging.getLogger(__name__)


def check_exposure(settings: Settings, keys: Keys, out: Console) -> None:
    """Refuse to listen where nobody could ask or everybody could; warn loudly where everybody on the machine can.

    Raises:
        InvalidRequestError: there is no API key, and the address is not this machine's own.
        StoreError: the keys cannot be read.
    """
    if settings.api_keys or keys:
        return
    if not settings.may_run_open:
        raise InvalidRequestError(
            f"refusing to listen on {settings.host} without API keys: make one (switchyard keys create --store), set "
            "api_keys (SWITCHYARD_API_KEYS), listen on 127.0.0.1, or set allow_anonymous if everyone who can reach "
            "this address is trusted"
        )
    who = "on this machine" if settings.on_loopback else f"who can reach {settings.host}"
    if out.quiet:
        log.warning("this server runs open: there is no API key, and everyone %s may do anything", who)
    out.print(
        Panel(
            f"There is no API key: everyone {who} may ask, upload, delete and make keys.\n"
            "[bold]switchyard keys create --role admin[/] makes one; from then on, every request needs a key.",
            title="this server runs open",
            border_style="bold red",
        )
    )
