"""What must hold between the deployment's files and the project. Each check says what is wrong, in a list."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence

from deploy.tables import routes
from server.api.rules import PUBLIC_PATHS
from server.settings import Settings
from tests.deploy import compose_checks
from tests.deploy.faults import PREFIX, SECRET, last, services, unknown_settings, verb_faults
from tests.deploy.project import Instruction, Project

Check = Callable[[Project], Iterator[str]]

_FENCE = re.compile(r"^```(?:sh|shell|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def stages_exist(project: Project) -> Iterator[str]:
    """Every FROM and COPY --from names a stage or an image, for every variant."""
    known: set[str] = set()
    for instruction in project.instructions("FROM"):
        image, _, name = instruction.value.partition(" AS ")
        if "${VARIANT}" in image:
            for variant in ("cpu", "cuda"):
                if image.replace("${VARIANT}", variant) not in known:
                    yield f"no stage {image} for the variant {variant}"
        elif re.match(r"[^/]*[.:][^/]*/", image):
            yield f"{image} names the host of a registry"
        known.add(name)
    for instruction in project.instructions("COPY"):
        source = instruction.option("from")
        if source is not None and source not in known:
            yield f"COPY --from={source}: no such stage"


def copied_files_exist(project: Project) -> Iterator[str]:
    """Every COPY from the checkout finds its source there, and .dockerignore lets it through."""
    for instruction in project.instructions("COPY"):
        if instruction.option("from") is None:
            for source in instruction.words[:-1]:
                if not (project.root / source).exists():
                    yield f"COPY {source}: there is no such path"
                elif not project.is_sent_to_build(source):
                    yield f"COPY {source}: .dockerignore leaves it out"


def image_starts_the_server(project: Project) -> Iterator[str]:
    """The entry point is a command of the project, and CMD one of its verbs."""
    entry, command = (last(project, name).argv for name in ("ENTRYPOINT", "CMD"))
    if entry[0] not in project.scripts:
        yield f"ENTRYPOINT {entry[0]} is no script of pyproject.toml"
    yield from verb_faults([*entry[1:], *command], "CMD")


def image_settings_are_settings(project: Project) -> Iterator[str]:
    """Every SWITCHYARD_* of the image is a setting, with a value that the server takes."""
    given = {name: value for name, value in project.image_env.items() if name.startswith(PREFIX)}
    yield from unknown_settings(given, "Dockerfile")
    values = {name.removeprefix(PREFIX).lower(): value for name, value in given.items()}
    try:
        Settings.model_validate({"base": "base", "api_keys": "key", **values})
    except ValueError as error:
        yield f"Dockerfile: {error}"


def ports_agree(project: Project) -> Iterator[str]:
    """EXPOSE, the image's setting, the setting's default, and what compose publishes are one port."""
    default = str(Settings.model_fields["port"].default)
    exposed = last(project, "EXPOSE").value
    if exposed != default:
        yield f"EXPOSE {exposed}, but the server listens on {default}"
    if project.image_env.get("SWITCHYARD_PORT", default) != exposed:
        yield f"EXPOSE {exposed}, but SWITCHYARD_PORT is {project.image_env['SWITCHYARD_PORT']}"
    for name, service in services(project):
        for port in service.get("ports", ()):
            *host, _, target = str(port).split(":")
            if name not in ("server", "server-gpu", "grafana"):
                yield f"{name} is published to the host"
            if target != exposed and name != "grafana":
                yield f"{name} publishes port {target}, but the image exposes {exposed}"
            if host != ["127.0.0.1"]:
                yield f"{name} is published on {':'.join(host) or 'every address'} by default"
    for page, text in (*project.documents.items(), ("Makefile", project.text("Makefile"))):
        for port in re.findall(r"(?:127\.0\.0\.1|localhost):(\d+)", text):
            if port != default:
                yield f"{page} speaks of port {port}"


def image_runs_unprivileged(project: Project) -> Iterator[str]:
    """The last user is not root, exists, and owns the volumes."""
    user = last(project, "USER").value.split(":")[0]
    if not user.isdecimal() or user == "0":
        yield f"USER {user}: not a fixed uid other than root's"
    made = " ".join(i.value for i in project.instructions("RUN", project.final_stage))
    if f"useradd --uid {user} " not in made:
        yield f"no user with the uid {user} is made"
    volumes = last(project, "VOLUME").argv
    owned = re.findall(rf"install -d -o {user} -g \d+ ([^&]+)", made)
    for volume in volumes:
        if volume not in " ".join(owned).split():
            yield f"the volume {volume} does not belong to the user {user}"
    for name in ("SWITCHYARD_DATA_DIR", "SWITCHYARD_CACHE_DIR"):
        if project.image_env.get(name) not in volumes:
            yield f"{name} is on no volume"


def image_holds_no_secrets(project: Project) -> Iterator[str]:
    """Nothing secret is baked in, and no host of a package registry."""
    for instruction in (*project.instructions("ENV"), *project.instructions("ARG")):
        for word in instruction.words:
            if SECRET.search(word.split("=")[0]):
                yield f"{instruction.name} {word}: would stay in a layer"
    if "://" in project.text("Dockerfile"):
        yield "Dockerfile names an address"
    if project.is_sent_to_build(".env") or project.is_sent_to_build(".git"):
        yield ".dockerignore lets .env or .git into the build"


def health_checks_ask_routes(project: Project) -> Iterator[str]:
    """The script that both files call is in the image, and asks a route that exists and needs no key."""
    asked = re.findall(r'^ROUTE = "(.+)"$', project.text("deploy/healthcheck.py"), flags=re.MULTILINE)
    known = {path for method, path, _ in routes() if method == "GET"}
    for route in asked or ["nothing"]:
        if route not in known:
            yield f"deploy/healthcheck.py asks {route}: there is no such route"
        elif route not in PUBLIC_PATHS:
            yield f"deploy/healthcheck.py asks {route}, which needs a key"
    copies = [i for i in project.instructions("COPY", project.final_stage) if "deploy/healthcheck.py" in i.words]
    script = copies[-1].words[-1] if copies else "nowhere"
    image = last(project, "HEALTHCHECK").value.partition("CMD ")[2]
    if Instruction("", "CMD", image).argv != ["python", script]:
        yield f"HEALTHCHECK runs {image}, the script is {script}"
    if project.compose["services"]["server"]["healthcheck"]["test"] != ["CMD", "python", script]:
        yield f"the server's health check does not run {script}"


def make_runs_what_exists(project: Project) -> Iterator[str]:
    """CI runs `make test`; what `make demo` starts is a verb with its options, and its variables are settings."""
    if not re.search(r"^exec make test </dev/null$", project.text(".ci/run"), flags=re.MULTILINE):
        yield ".ci/run does not run `make test`"
    if not os.access(project.root / ".ci/run", os.X_OK) or not os.access(project.root / "deploy/bootstrap.sh", os.X_OK):
        yield "a script is not executable"
    environment = {"PATH": os.environ["PATH"]}  # nothing of a make that runs these tests
    demo = subprocess.run(
        ["make", "-n", "demo"], cwd=project.root, env=environment, capture_output=True, text=True, check=True
    ).stdout
    words = shlex.split(demo)
    yield from unknown_settings([word.split("=")[0] for word in words], "make demo")
    start = next((i for i, word in enumerate(words) if word.endswith("/switchyard")), None)
    if start is None or words[start].rsplit("/", 1)[-1] not in project.scripts:
        yield "make demo does not start the server"
    else:
        yield from verb_faults(words[start + 1 :], "make demo")
    folder = words[words.index("--experts") + 1] if "--experts" in words else ""
    if folder != "examples/experts":
        yield f"make demo takes its experts from {folder or 'nowhere'}"


def documents_name_what_exists(project: Project) -> Iterator[str]:
    """Targets of make, verbs and options, settings, linked files and tests that the pages speak of."""
    for page, text in project.documents.items():
        targets = set(re.findall(r"`make ([a-z]+)", text)) | set(
            re.findall(r"^make ([a-z]+)", _shell(text), re.MULTILINE)
        )
        for target in targets - project.make_targets:
            yield f"{page}: there is no target {target}"
        for line in _shell(text).splitlines():
            for argv in _switchyard_calls(line, project):
                yield from verb_faults(argv, page)
        yield from unknown_settings(set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", text)), page)
        for link in re.findall(r"]\((?!\w+:|#)([^)#]+)", text):
            if not (project.root / page).parent.joinpath(link).exists():
                yield f"{page}: links to {link}, which is not there"
        for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
            if not (project.root / path).is_file() or f"def {test}" not in project.text(path):
                yield f"{page}: there is no test {path}::{test}"


CHECKS: Sequence[Check] = (
    stages_exist,
    copied_files_exist,
    image_starts_the_server,
    image_settings_are_settings,
    ports_agree,
    image_runs_unprivileged,
    image_holds_no_secrets,
    health_checks_ask_routes,
    compose_checks.compose_builds,
    compose_checks.compose_profiles_choose,
    compose_checks.compose_secrets_are_files,
    compose_checks.streams_may_end,
    compose_checks.compose_variables_are_known,
    compose_checks.compose_volumes_are_the_images,
    compose_checks.compose_services_are_guarded,
    compose_checks.redis_keeps_what_it_has,
    compose_checks.compose_starts_the_server,
    make_runs_what_exists,
    documents_name_what_exists,
)


def _shell(text: str) -> str:
    """The shell blocks of a page, each command on a line."""
    return "\n".join(_FENCE.findall(text)).replace("\\\n", " ")


def _switchyard_calls(line: str, project: Project) -> Iterator[list[str]]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quotation that goes on in the next line: no call of ours
        return
    if words and words[0].rsplit("/", 1)[-1] in project.scripts:
        yield words[1:]
