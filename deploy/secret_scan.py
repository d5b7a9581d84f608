"""Look for secrets in files that are to be committed: `python -m deploy.secret_scan [FILE...]`, default: all of them.

detect-secrets does it, with its detectors of known kinds of keys, one for ours, and one for whatever is assigned to a
name such as `password`; that one not in tests, which are full of made-up ones. Hexadecimal digits are not suspect by
themselves: they are what digests of experts and downloads are made of. A line that is no secret, for all that it looks
like one, says so: `pragma: allowlist secret`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from detect_secrets.core.secrets_collection import SecretsCollection
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.plugins.keyword import DENYLIST
from detect_secrets.settings import get_plugins, transient_settings

ROOT = Path(__file__).resolve().parents[1]
_KINDS = (
    "ArtifactoryDetector", "AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector", "CloudantDetector",
    "DiscordBotTokenDetector", "GitHubTokenDetector", "GitLabTokenDetector", "IbmCloudIamDetector",
    "IbmCosHmacDetector", "JwtTokenDetector", "KeywordDetector", "MailchimpDetector", "NpmDetector", "OpenAIDetector",
    "PrivateKeyDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector", "SoftlayerDetector",
    "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector",
)  # fmt: skip
_OURS = {"name": "SwitchyardDetector", "path": Path(__file__).with_name("secret_of_ours.py").as_uri()}
_FILTERS = (
    {"path": "detect_secrets.filters.allowlist.is_line_allowlisted"},
    {"path": "detect_secrets.filters.heuristic.is_indirect_reference"},
    {"path": "detect_secrets.filters.heuristic.is_not_alphanumeric_string"},
    {"path": "detect_secrets.filters.heuristic.is_prefixed_with_dollar_sign"},
    {"path": "detect_secrets.filters.heuristic.is_templated_secret"},
    {"path": "detect_secrets.filters.regex.should_exclude_secret", "pattern": [r"^none$", r"^os\.environ/"]},
)
_BINARY = {".png", ".safetensors"}


def secrets_in(files: Iterable[Path]) -> Iterator[str]:
    """What looks like a secret, as `FILE:LINE: KIND`."""
    settings = {"plugins_used": [*({"name": kind} for kind in _KINDS), _OURS], "filters_used": list(_FILTERS)}
    found = SecretsCollection()
    with transient_settings(settings):
        forms = [form for kind in get_plugins() if isinstance(kind, RegexBasedDetector) for form in kind.denylist]
        # Line by line, as detect-secrets looks, takes long: files that hold nothing of any form are passed over.
        anywhere = [re.compile(form.pattern, form.flags | re.MULTILINE) for form in forms]
        assigned = re.compile("|".join(DENYLIST), re.IGNORECASE)
        for file in files:
            text = "" if file.suffix in _BINARY else file.read_text(encoding="utf-8", errors="replace")
            if any(form.search(text) for form in anywhere) or (not _is_of_tests(file) and assigned.search(text)):
                found.scan_file(str(file))
    for name, secret in found:
        if secret.type != "Secret Keyword" or not _is_of_tests(Path(name)):
            yield f"{name}:{secret.line_number}: {secret.type}"


def _is_of_tests(file: Path) -> bool:
    return "tests" in file.parts


def committed() -> list[Path]:
    """All files that git knows, from here."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def main(names: list[str]) -> int:
    """Command line."""
    found = list(secrets_in(map(Path, names) if names else committed()))
    print("\n".join(found) or "no secrets", file=sys.stderr if found else sys.stdout)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
