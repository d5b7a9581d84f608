"""What must hold between docker-compose.yml and the project. Each check says what is wrong, in a list."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.deploy.faults import SECRET, last, services, unknown_settings, verb_faults
from tests.deploy.project import Project


def compose_builds(project: Project) -> Iterator[str]:
    """Contexts, build arguments and variants exist in the Dockerfile; what is not built is an image of one version."""
    declared = {i.value.split("=")[0] for i in project.instructions("ARG")}
    for name, service in services(project):
        build = service.get("build", {})
        if "context" in build and not (project.root / build["context"] / "Dockerfile").is_file():
            yield f"{name} builds {build['context']}, where there is no Dockerfile"
        for argument in set(build.get("args", ())) - declared:
            yield f"{name}: the Dockerfile has no argument {argument}"
        variant = build.get("args", {}).get("VARIANT", "cpu")
        if not project.instructions("FROM", f"base-{variant}"):
            yield f"{name}: there is no variant {variant}"
        if not build and not re.search(r":v?\d+\.\d+", service["image"]):
            yield f"{name}: {service['image']} is whatever is newest"


def compose_profiles_choose(project: Project) -> Iterator[str]:
    """`docker compose up` is the CPU server and its Redis; each profile brings what it needs, one server at most."""
    if project.env_example.get("COMPOSE_PROFILES") != "cpu":
        yield "docker compose up does not start the CPU server"
    wanted = {
        ("cpu",): {"server", "redis"},
        ("gpu",): {"server-gpu", "redis"},
        ("cpu", "monitoring"): {"server", "redis", "prometheus", "grafana"},
        ("gpu", "monitoring"): {"server-gpu", "redis", "prometheus", "grafana"},
    }
    for profiles, expected in wanted.items():
        started = {name for name, service in services(project) if set(service.get("profiles", profiles)) & {*profiles}}
        if started != expected:
            yield f"the profiles {', '.join(profiles)} start {', '.join(sorted(started))}"
    cpu, gpu = (dict(project.compose["services"][name]) for name in ("server", "server-gpu"))
    for service in (cpu, gpu):
        for key in ("profiles", "build", "image", "deploy"):
            service.pop(key)
    if cpu != gpu:
        yield "the two servers differ in more than where they run"


def compose_variables_are_known(project: Project) -> Iterator[str]:
    """Settings exist, the base is required, and .env.example lists exactly what the file asks for."""
    for name, service in services(project):
        yield from unknown_settings(service.get("environment", {}), name)
    asked, shown = project.compose_variables, dict(project.env_example)
    shown.pop("COMPOSE_PROFILES", None)  # compose's own
    yield from unknown_settings({**asked, **shown}, ".env.example")
    if asked.get("SWITCHYARD_BASE") != "?":
        yield "SWITCHYARD_BASE is not required"
    for name in asked.keys() ^ shown.keys():
        yield f"{name} is in .env.example or in docker-compose.yml, but not in both"
    for name, value in shown.items():
        if value and SECRET.search(name) and not name.endswith("_DIR"):
            yield f".env.example sets {name}: everyone would have the same"


def compose_secrets_are_files(project: Project) -> Iterator[str]:
    """Secrets are files that the operator makes: declared, given to whom they are for, and nobody's default."""
    declared = project.compose.get("secrets", {})
    given: dict[str, set[str]] = {}
    for name, service in services(project):
        for secret in service.get("secrets", ()):
            source, target = (secret, secret) if isinstance(secret, str) else (secret["source"], secret["target"])
            given.setdefault(name, set()).add(f"/run/secrets/{target}")
            if source not in declared:
                yield f"{name}: the secret {source} is not declared"
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable) and value and value not in given.get(name, ()):
                yield f"{name}: {variable} is no secret of it"
    for name, secret in declared.items():
        if set(secret) != {"file"}:
            yield f"the secret {name} is no file"
    if "/run/secrets/admin_key" not in given.get("server", ()):
        yield "the server has no key"
    scrape = project.text("deploy/monitoring/prometheus.yml")
    if not any(path in scrape for path in given.get("prometheus", ())):
        yield "Prometheus has no key for the server"
    if "GF_SECURITY_ADMIN_PASSWORD__FILE" not in project.compose["services"]["grafana"].get("environment", {}):
        yield "Grafana has its default password"
    if "/secrets/" not in project.text(".gitignore").splitlines():
        yield "git would take the secrets"


def compose_volumes_are_the_images(project: Project) -> Iterator[str]:
    """Named volumes are declared and used; they lie where the image keeps its data."""
    declared, used = set(project.compose["volumes"]), set()
    targets: dict[str, set[str]] = {}
    for name, service in services(project):
        targets[name] = set()
        for volume in service.get("volumes", ()):
            source, target = (volume["source"], volume["target"]) if isinstance(volume, dict) else volume.split(":")[:2]
            targets[name].add(target)
            if not source.startswith((".", "/")):
                used.add(source)
                if source not in declared:
                    yield f"{name}: the volume {source} is not declared"
    for volume in declared - used:
        yield f"the volume {volume} is not used"
    for target in set(last(project, "VOLUME").argv) - targets["server"]:
        yield f"the server keeps {target} on no volume"
    if "/data" not in targets["redis"]:
        yield "redis keeps /data on no volume"


def compose_services_are_guarded(project: Project) -> Iterator[str]:
    """Services restart, drop what they do not need, and wait for what they need."""
    declared = {"default", *project.compose.get("networks", {})}
    for name, service in services(project):
        wanted = {
            "restart": "unless-stopped",
            "read_only": True,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges:true"],
        }
        for key, value in wanted.items():
            if service.get(key) != value:
                yield f"{name}: {key} is {service.get(key)}"
        limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
        if not {"memory", "cpus"} <= limits.keys() or "pids_limit" not in service:
            yield f"{name}: what it may use is not limited"
        if "stop_grace_period" not in service:
            yield f"{name} is killed after ten seconds"
        if "healthcheck" not in service:
            yield f"{name} has no health check"
        for other, how in service.get("depends_on", {}).items():
            if "healthcheck" not in project.compose["services"].get(other, {}) or how["condition"] != "service_healthy":
                yield f"{name} waits for {other}, which never becomes healthy"
        for network in set(service.get("networks", ())) - declared:
            yield f"{name}: there is no network {network}"


def streams_may_end(project: Project) -> Iterator[str]:
    """Nobody kills a server before it has drained."""
    service = project.compose["services"]["server"]
    drain, grace = service["environment"]["SWITCHYARD_DRAIN_SECONDS"], service["stop_grace_period"]
    if int(grace.removesuffix("s")) <= int(drain):
        yield f"compose kills after {grace}, the server drains for {drain} s"
    unit = project.text("deploy/systemd/switchyard.service")
    stop, drains = (re.search(rf"{name}=(\d+)", unit) for name in ("TimeoutStopSec", "SWITCHYARD_DRAIN_SECONDS"))
    if stop is None or drains is None or int(stop[1]) <= int(drains[1]):
        yield "systemd kills before the server has drained"


def redis_keeps_what_it_has(project: Project) -> Iterator[str]:
    """Redis appends to a file, is bounded, evicts nothing, and is asked for its health."""
    redis = project.compose["services"]["redis"]
    options = dict(zip(redis["command"][1::2], redis["command"][2::2], strict=True))
    for option, value in {"--appendonly": "yes", "--appendfsync": "always", "--maxmemory-policy": "noeviction"}.items():
        if options.get(option) != value:
            yield f"redis: {option} is {options.get(option)}"
    if "--maxmemory" not in options or "memory" not in redis["deploy"]["resources"]["limits"]:
        yield "redis: its memory is not bounded"
    if "redis-cli ping" not in redis["healthcheck"]["test"][-1]:
        yield "redis: the health check does not ping"
    if "redis" not in project.compose["services"]["server"].get("depends_on", {}):
        yield "the server does not wait for redis"
    if (
        not project.compose["services"]["server"]["environment"]
        .get("SWITCHYARD_STORE", "")
        .startswith("redis://redis:")
    ):
        yield "the server keeps its experts elsewhere"


def compose_starts_the_server(project: Project) -> Iterator[str]:
    """What compose passes to the entry point is a verb and its options."""
    yield from verb_faults(project.compose["services"]["server"].get("command", ["serve"]), "docker-compose.yml")
