"""What an API key of this server looks like, for detect-secrets, which loads this file by its path."""

from __future__ import annotations

import re

from detect_secrets.plugins.base import RegexBasedDetector


class SwitchyardDetector(RegexBasedDetector):  # type: ignore[misc]  # detect-secrets has no types
    """Finds API keys as `store.keys` makes them."""

    secret_type = "Switchyard API Key"  # pragma: allowlist secret
    denylist = (re.compile(r"\bsy_[0-9a-f]{12}_[A-Za-z0-9_-]{43}"),)
