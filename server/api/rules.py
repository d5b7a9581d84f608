"""What every route asks of its caller: the one table. What is not in it is reached by administrators only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.routing import compile_path

from store.access import Role


@dataclass(frozen=True)
class Rule:
    """What one route asks for.

    Attributes:
        role: None for everybody, with or without a key.
        action: of a route that changes something: what the audit log calls it.
        is_metered: whether it counts against rates of requests and tokens.
    """

    role: Role | None
    action: str | None = None
    is_metered: bool = False


_PUBLIC = Rule(None)
_READ = Rule(Role.INFER)
_ASK = Rule(Role.INFER, is_metered=True)
_ADMIN = Rule(Role.ADMIN)


def _upload(action: str) -> Rule:
    return Rule(Role.UPLOAD, action)


def _admin(action: str) -> Rule:
    return Rule(Role.ADMIN, action)


RULES: dict[tuple[str, str], Rule] = {
    ("GET", "/health"): _PUBLIC,
    ("GET", "/ready"): _PUBLIC,
    # The console: files that anybody can have from the package itself; what they show is asked for with a key.
    ("GET", "/"): _PUBLIC,
    ("GET", "/console/{name}"): _PUBLIC,
    ("GET", "/version"): _READ,
    ("GET", "/openapi.json"): _READ,
    ("GET", "/metrics"): Rule(Role.MONITOR),
    ("POST", "/v1/chat/completions"): _ASK,
    ("POST", "/v1/completions"): _ASK,
    ("POST", "/v1/embeddings"): _ASK,
    ("POST", "/v1/route"): _ASK,
    ("GET", "/v1/route/report"): _ASK,
    ("GET", "/v1/route/map"): _READ,
    ("POST", "/tokenize"): _ASK,
    ("POST", "/detokenize"): _ASK,
    ("GET", "/tokenizer_info"): _READ,
    ("GET", "/v1/models"): _READ,
    ("GET", "/v1/models/{model:path}"): _READ,
    ("GET", "/v1/experts"): _READ,
    ("POST", "/v1/experts"): _upload("expert.publish"),
    ("GET", "/v1/experts/{name}"): _READ,
    ("PUT", "/v1/experts/{name}"): _upload("expert.replace"),
    ("PATCH", "/v1/experts/{name}"): _upload("expert.describe"),
    ("DELETE", "/v1/experts/{name}"): _upload("expert.delete"),
    ("GET", "/v1/experts/{name}/versions"): _READ,
    ("POST", "/v1/experts/{name}/rollback"): _upload("expert.rollback"),
    ("GET", "/v1/experts/{name}/exemplars"): Rule(Role.UPLOAD),
    ("PUT", "/v1/experts/{name}/exemplars"): _upload("expert.exemplars"),
    ("DELETE", "/v1/experts/{name}/exemplars"): _upload("expert.exemplars_reset"),
    ("GET", "/v1/aliases"): _READ,
    ("GET", "/v1/aliases/{alias}"): _READ,
    ("PUT", "/v1/aliases/{alias}"): _upload("alias.put"),
    ("DELETE", "/v1/aliases/{alias}"): _upload("alias.delete"),
    ("PUT", "/v1/experts/{name}/access"): _upload("expert.share"),
    ("POST", "/v1/uploads"): _upload("upload.begin"),
    ("GET", "/v1/uploads"): Rule(Role.UPLOAD),
    ("OPTIONS", "/v1/uploads"): Rule(Role.UPLOAD),
    ("GET", "/v1/uploads/{upload_id}"): Rule(Role.UPLOAD),
    ("HEAD", "/v1/uploads/{upload_id}"): Rule(Role.UPLOAD),
    ("PATCH", "/v1/uploads/{upload_id}"): _upload("upload.receive"),
    ("DELETE", "/v1/uploads/{upload_id}"): _upload("upload.delete"),
    # Names files of the server, which may be anybody's.
    ("POST", "/v1/load_lora_adapter"): _admin("expert.load"),
    ("POST", "/v1/unload_lora_adapter"): _admin("expert.unload"),
    ("GET", "/debug/engine"): _ADMIN,
    ("GET", "/v1/usage"): _READ,
    ("GET", "/v1/admin/usage"): _ADMIN,
    ("GET", "/v1/admin/audit"): _ADMIN,
    ("GET", "/v1/admin/tenants"): _ADMIN,
    ("PUT", "/v1/admin/tenants/{tenant}"): _admin("tenant.limit"),
    ("DELETE", "/v1/admin/tenants/{tenant}"): _admin("tenant.reset"),
    ("POST", "/v1/jobs"): _upload("job.begin"),
    ("GET", "/v1/jobs"): Rule(Role.UPLOAD),
    ("GET", "/v1/jobs/{job_id}"): Rule(Role.UPLOAD),
    ("GET", "/v1/jobs/{job_id}/events"): Rule(Role.UPLOAD),
    ("DELETE", "/v1/jobs/{job_id}"): _upload("job.cancel"),
    ("GET", "/v1/admin/keys"): _ADMIN,
    ("POST", "/v1/admin/keys"): _admin("key.create"),
    ("DELETE", "/v1/admin/keys/{id}"): _admin("key.revoke"),
}
"""Method and path, as the app declares them."""

PUBLIC_PATHS = frozenset(path for (_, path), rule in RULES.items() if rule.role is None)
"""What load balancers and orchestrators ask, who have no key, and the console's files."""

_PATTERNS: list[tuple[re.Pattern[str], str]] = [
    # Those with the fewest parameters first: /v1/experts/jobs is no expert, should there be such a route.
    (compile_path(path)[0], path)
    for path in sorted({path for _, path in RULES}, key=lambda path: (path.count("{"), -len(path)))
]


def path_of(path: str) -> str | None:
    """The declared path that a request's path belongs to, or None."""
    return next((declared for pattern, declared in _PATTERNS if pattern.match(path)), None)


def rule_of(method: str, declared: str) -> Rule | None:
    """The rule of a method on a declared path; where a path may be read, so may its headers."""
    rule = RULES.get((method, declared))
    return RULES.get(("GET", declared)) if rule is None and method == "HEAD" else rule


def methods_of(declared: str) -> list[str]:
    """What may be done with a declared path."""
    return sorted(method for method, path in RULES if path == declared)
