"""How the deployment can be broken: for each check, edits of a file that it must notice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.deploy import checks, compose_checks
from tests.deploy.checks import Check

DOCKERFILE = "Dockerfile"
COMPOSE = "docker-compose.yml"
README = "README.md"
MAKEFILE = "Makefile"
ENV = ".env.example"
IGNORE = ".dockerignore"
UNIT = "deploy/systemd/switchyard.service"
PROBE = "deploy/healthcheck.py"

Edit = tuple[str, str, str, str]
"""File, old text, new text, and what the check then says (a part of it)."""

BREAKAGES: Mapping[Check, Sequence[Edit]] = {
    checks.stages_exist: [
        (DOCKERFILE, "AS base-cuda", "AS base-gpu", "no stage base-${VARIANT} for the variant cuda"),
        (DOCKERFILE, "FROM python:", "FROM images.example.org/python:", "names the host"),
        (DOCKERFILE, "--from=build", "--from=builder", "--from=builder: no such stage"),
    ],
    checks.copied_files_exist: [
        (DOCKERFILE, "COPY store store/", "COPY stores store/", "COPY stores: there is no"),
        (IGNORE, "!LICENSE\n", "", "COPY LICENSE: .dockerignore leaves it out"),
    ],
    checks.image_starts_the_server: [
        ("pyproject.toml", "switchyard = ", "switchboard = ", "switchyard is no script"),
        (DOCKERFILE, 'CMD ["serve"]', 'CMD ["run"]', "there is no verb run"),
        (DOCKERFILE, '["serve"]', '["serve", "--slots", "4"]', "no option --slots"),
    ],
    checks.image_settings_are_settings: [
        (DOCKERFILE, "_DATA_DIR=", "_DATA=", "no setting SWITCHYARD_DATA"),
        (DOCKERFILE, "PORT=8000", "PORT=http", "port"),
    ],
    checks.ports_agree: [
        (DOCKERFILE, "EXPOSE 8000", "EXPOSE 8080", "EXPOSE 8080, but the server listens on 8000"),
        (DOCKERFILE, "_PORT=8000", "_PORT=8080", "but SWITCHYARD_PORT is 8080"),
        (COMPOSE, '8000}:8000"', '8000}:80"', "publishes port 80"),
        (COMPOSE, "PUBLISH:-127.0.0.1:8000}", "PUBLISH:-8000}", "published on every address by default"),
        (COMPOSE, "    user: redis\n", "    ports: ['127.0.0.1:6379:8000']\n", "redis is pub"),
        (README, "http://127.0.0.1:8000", "http://127.0.0.1:9000", "README.md speaks of port 9000"),
    ],
    checks.image_runs_unprivileged: [
        (DOCKERFILE, "USER 10001:10001", "USER root", "not a fixed uid"),
        (DOCKERFILE, "USER 10001:10001", "USER 10002", "no user with the uid 10002"),
        (DOCKERFILE, "/data /cache /cache/tmp", "/cache", "/data does not belong"),
        (DOCKERFILE, "DATA_DIR=/data", "DATA_DIR=/srv", "DATA_DIR is on no volume"),
    ],
    checks.image_holds_no_secrets: [
        (DOCKERFILE, "EXPOSE", "ENV SWITCHYARD_API_KEYS=abc\nEXPOSE", "stay in a layer"),
        (DOCKERFILE, "INDEX_URL=\n", "INDEX_URL=https://x\n", "names an address"),
        (IGNORE, "*\n!pyproject.toml", "!pyproject.toml", "lets .env or .git into"),
    ],
    checks.health_checks_ask_routes: [
        (PROBE, '"/ready"', '"/healthz"', "there is no such route"),
        (PROBE, '"/ready"', '"/version"', "which needs a key"),
        (DOCKERFILE, "py /opt/switchyard/healthcheck.py", "py /opt/hc.py", "HEALTHCHECK runs"),
        (COMPOSE, "[CMD, python,", "[CMD, curl,", "server's health check"),
    ],
    compose_checks.compose_builds: [
        (COMPOSE, "context: .", "context: docs", "where there is no Dockerfile"),
        (COMPOSE, "VARIANT: cpu", "FLAVOUR: cpu", "no argument FLAVOUR"),
        (COMPOSE, "VARIANT: cuda", "VARIANT: rocm", "there is no variant rocm"),
        (COMPOSE, "redis:7.4-alpine", "redis:alpine", "is whatever is newest"),
    ],
    compose_checks.compose_profiles_choose: [
        (ENV, "COMPOSE_PROFILES=cpu", "COMPOSE_PROFILES=", "does not start the CPU server"),
        (COMPOSE, "profiles: [cpu, gpu]", "profiles: [cpu]", "the profiles gpu start server-gpu"),
        (COMPOSE, "    profiles: [gpu]\n", "    profiles: [gpu]\n    user: root\n", "differ in more"),
    ],
    compose_checks.compose_secrets_are_files: [
        (COMPOSE, "  secrets: [admin_key]\n", "", "the server has no key"),
        (COMPOSE, "secrets: [grafana_password]", "secrets: [password]", "secret password is not declared"),
        (COMPOSE, "_PASSWORD__FILE: /run", "_PASSWORD: /run", "Grafana has its default password"),
        (COMPOSE, "_PASSWORD__FILE: /run/secrets/grafana_password", "_PASSWORD: admin", "PASSWORD is no secret of it"),
        (COMPOSE, "target: switchyard_monitor_key", "target: key", "Prometheus has no key"),
        (COMPOSE, "file: ${SECRETS_DIR:-./secrets}/admin_key", "environment: KEY", "admin_key is no file"),
        (".gitignore", "/secrets/", "/other/", "git would take the secrets"),
    ],
    compose_checks.streams_may_end: [
        (COMPOSE, "stop_grace_period: 130s", "stop_grace_period: 40s", "compose kills after 40s"),
        (UNIT, "TimeoutStopSec=130", "TimeoutStopSec=90", "systemd kills before"),
    ],
    compose_checks.compose_variables_are_known: [
        (COMPOSE, "_THREADS:", "_CORES:", "no setting SWITCHYARD_CORES"),
        (COMPOSE, "_BASE:?", "_BASE:-", "SWITCHYARD_BASE is not required"),
        (ENV, "\nPUBLISH=", "\nBIND=", "BIND is in .env.example or"),
        (ENV, "HF_TOKEN=", "HF_TOKEN=abc", "everyone would have the same"),
    ],
    compose_checks.compose_volumes_are_the_images: [
        (COMPOSE, "- cache:/", "- other:/", "other is not declared"),
        (COMPOSE, "- data:/data", "- data:/srv", "keeps /data on no"),
    ],
    compose_checks.compose_services_are_guarded: [
        (COMPOSE, "cap_drop: [ALL]", "cap_drop: []", "server: cap_drop"),
        (
            COMPOSE,
            "redis:\n      condition: service_healthy",
            "store:\n      condition: service_healthy",
            "waits for store",
        ),
        (COMPOSE, "networks: [store]", "networks: [back]", "no network back"),
        (COMPOSE, "          memory: 512m\n", "", "grafana: what it may use"),
        (COMPOSE, "    stop_grace_period: 60s\n", "", "prometheus is killed"),
    ],
    compose_checks.redis_keeps_what_it_has: [
        (COMPOSE, '- "yes"', '- "no"', "--appendonly is no"),
        (COMPOSE, "- always\n", "- everysec\n", "--appendfsync is everysec"),
        (COMPOSE, "redis://redis:6379", "redis://cache:6379", "keeps its experts elsewhere"),
        (COMPOSE, "      - --maxmemory\n      - ${REDIS_MAXMEMORY:-512mb}\n", "", "memory is not bounded"),
        (COMPOSE, "redis-cli ping", "redis-cli info", "does not ping"),
    ],
    compose_checks.compose_starts_the_server: [
        (COMPOSE, "[serve]", "[serve, --bse, x]", "no option --bse"),
    ],
    checks.make_runs_what_exists: [
        (".ci/run", "make test", "make lint", "does not run `make test`"),
        (MAKEFILE, "--base-name", "--name", "no option --name"),
        (MAKEFILE, "SWITCHYARD_DATA_DIR", "SWITCHYARD_DATA", "no setting SWITCHYARD_DATA"),
        (MAKEFILE, "examples/experts", "experts", "takes its experts from experts"),
    ],
    checks.documents_name_what_exists: [
        (MAKEFILE, "\ndemo:", "\nshow:", "README.md: there is no target demo"),
        (README, "switchyard push", "switchyard upload", "there is no verb upload"),
        (README, "--tuned", "--fine-tuned", "no option --fine-tuned"),
        ("docs/architecture.md", "::test_tied_weights", "::test_tied_tensors", "::test_tied_tensors_count_once"),
        (README, "(docs/api.md)", "(docs/http.md)", "links to docs/http.md"),
        ("docs/operations.md", "SWITCHYARD_KV_BYTES", "SWITCHYARD_KV", "SWITCHYARD_KV"),
    ],
}
