"""Ask the server of this container whether it is ready; the exit status says. The image has no curl."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

ROUTE = "/ready"


def main() -> int:
    url = f"http://127.0.0.1:{os.environ.get('SWITCHYARD_PORT') or 8000}{ROUTE}"
    # No proxy of the environment stands between a container and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=4):
            return 0
    except urllib.error.HTTPError as answer:
        sys.stderr.write(f"{url}: {answer.status} {answer.read(2000).decode(errors='replace')}\n")
    except OSError as error:
        sys.stderr.write(f"{url}: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
