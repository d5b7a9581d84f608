"""Two real replicas behind Ray Serve on this machine: expert affinity, streams, and what changes for all of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import httpx
import pytest
from openai import OpenAI

from deploy.affinity import Holdings, ranked
from tests.e2e.conftest import ROOT, clean_environment
from tests.e2e.fleet import answer, ask, eventually, upload
from tests.engine.conftest import Library
from tests.store.redis_server import RedisServer, executable
from tests.tiny import save_base

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`"),
]
EXPERTS = 8
_JSON = {"content-type": "application/json"}


@dataclass
class Cluster:
    """The gateway's address, the experts behind it, and the ids of the two replicas."""

    url: str
    library: Library
    redis: RedisServer
    replicas: tuple[str, ...]
    screen: list[str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if executable() is None:
        pytest.skip("there is no redis-server here")
    folder = tmp_path_factory.mktemp("ray")
    library = Library(save_base(folder / "base"), folder)
    redis = RedisServer(folder / "redis")
    redis.start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "deploy.ray_serve", "--base", library.base, "--base-name", "tiny", "--store", redis.url,
        "--data-dir", folder / "data", "--cache-dir", folder / "cache", "--feature-layer", "2", "--kv-bytes", "8MiB",
        "--port", str(port), "--ray-replicas", "2", "--ray-cpus", "0.1", "--ray-report-seconds", "0.3",
        "--ray-max-replicas", "3", "--ray-target-requests", "3", "--ray-upscale-delay", "1",
    ]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    screen: list[str] = []
    up = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            screen.append(line)
            if line.startswith("ready at"):
                up.set()
        up.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert up.wait(240)
        assert process.poll() is None, "".join(screen)
        url = f"http://127.0.0.1:{port}"
        for seed in range(EXPERTS):
            created = upload(url, library, library.add(seed), f"expert-{seed}")
            assert created.status_code == 201, created.text + "".join(screen)
        seen: set[str] = set()
        eventually(lambda: seen.add(who(ask(url, "tiny"))) or len(seen) == 2, 60)  # type: ignore[func-returns-value]
        yield Cluster(url, library, redis, tuple(sorted(seen)), screen)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
        redis.close()


def who(response: httpx.Response) -> str:
    """Which replica has answered."""
    assert response.status_code == 200, response.text
    return response.headers["x-switchyard-replica"]


def experts(cluster: Cluster) -> list[dict[str, object]]:
    """What `/v1/experts` lists."""
    listed: list[dict[str, object]] = httpx.get(f"{cluster.url}/v1/experts", timeout=60).json()["data"]
    return listed


def figure(cluster: Cluster, replica: str, name: str) -> float:
    """A figure of one replica's metrics; any of them may answer."""
    while True:
        response = httpx.get(f"{cluster.url}/metrics", timeout=60)
        if who(response) == replica:
            [line] = [line for line in response.text.splitlines() if line.startswith(f"{name} ")]
            return float(line.split()[-1])


def favourite(cluster: Cluster, name: str) -> str:
    """Where a cold expert goes."""
    return ranked(name, {replica: Holdings() for replica in cluster.replicas})[0][0]


def test_a_replica_keeps_its_experts_and_every_replica_has_some(cluster: Cluster) -> None:
    names = [f"expert-{i}" for i in range(EXPERTS - 2)]
    homes = {name: {who(ask(cluster.url, name)) for _ in range(5)} for name in names}
    assert all(len(home) == 1 for home in homes.values()), homes
    for name, [home] in homes.items():
        assert home == favourite(cluster, name)
    digests = {name: answer(cluster.url, name)[1] for name in names}
    assert len(set(digests.values())) == len(names)


def test_who_holds_an_expert_is_preferred_to_its_favourite(cluster: Cluster) -> None:
    """The heaviest part of a mix says where it goes; afterwards the other parts are there too.

    Each of them is asked for once: had it come to its favourite first, both replicas would hold it.
    """
    heaviest = "expert-6"
    home = favourite(cluster, heaviest)
    others = [name for i in range(99) if favourite(cluster, name := f"light-{i}") != home][:6]
    for seed, name in enumerate(others, start=EXPERTS):
        assert upload(cluster.url, cluster.library, cluster.library.add(seed), name).status_code == 201
    eventually(lambda: {expert["id"] for expert in experts(cluster)} >= set(others))
    parts = [{"id": heaviest, "weight": 0.5}, *({"id": name, "weight": 0.1} for name in others)]
    body = {"model": "auto", "prompt": "the river", "max_tokens": 2, "experts": parts}
    assert who(httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)) == home
    for name in others:
        time.sleep(0.5)  # the replicas' reports are on their way
        if who(ask(cluster.url, name)) == home:
            assert {who(ask(cluster.url, name)) for _ in range(5)} == {home}
            return
    raise AssertionError("every part of the mix went to its favourite")


def test_routed_requests_go_to_the_expert_that_routing_chooses(cluster: Cluster) -> None:
    themes = {
        "rivers": ["the river {} is long", "how deep is the water of {}", "boats sail along the {}"],
        "numbers": ["add 4{} and 17", "what is 3{} times 12", "subtract 9 from 8{}"],
    }
    for seed, (name, forms) in enumerate(themes.items(), start=30):
        lines = "\n".join(json.dumps({"prompt": form.format(i)}) for i in range(8) for form in forms)
        files = {"file": cluster.library.files[cluster.library.add(seed)].read_bytes()}
        form = {"name": name, "exemplars": lines}
        assert httpx.post(f"{cluster.url}/v1/experts", files=files, data=form, timeout=60).status_code == 201

    def learned(question: str, name: str) -> bool:
        """Whether both replicas route the question to the expert; asking that loads none."""
        found: dict[str, list[str]] = {}
        while len(found) < 2:
            answer = httpx.post(f"{cluster.url}/v1/route", json={"prompt": question}, timeout=60)
            found[who(answer)] = [part["id"] for part in answer.json()["mix"]]
        return all(mix == [name] for mix in found.values())

    for name, question in (("rivers", "boats sail along the 9"), ("numbers", "what is 35 times 12")):
        eventually(partial(learned, question, name))
        body = {"model": "auto", "messages": [{"role": "user", "content": question}], "max_tokens": 2}
        answers = [httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=60) for _ in range(6)]
        assert {answer.headers["x-switchyard-mix"] for answer in answers} == {f"{name}=1"}
        assert {who(answer) for answer in answers} == {favourite(cluster, name)}


def test_a_stream_comes_in_pieces_and_a_client_that_leaves_costs_nothing_more(cluster: Cluster) -> None:
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120)
    whole = client.completions.create(model="expert-1", prompt="the river", max_tokens=24, temperature=0)
    stream = client.completions.create(model="expert-1", prompt="the river", max_tokens=24, temperature=0, stream=True)
    chunks = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(chunks) > 10
    assert "".join(chunks) == whole.choices[0].text

    home = who(ask(cluster.url, "expert-1"))
    before = figure(cluster, home, "switchyard_generated_tokens_total")
    body = {"model": "expert-1", "prompt": "the river", "max_tokens": 480, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        first = next(line for line in response.iter_lines() if line.startswith("data: "))
        assert "choices" in json.loads(first.removeprefix("data: "))
    eventually(lambda: figure(cluster, home, "switchyard_requests_running") == 0)
    spent = figure(cluster, home, "switchyard_generated_tokens_total") - before
    assert 0 < spent < 480, "the first piece came before the last token was made, and the rest never was"


def test_what_one_replica_takes_all_serve_and_what_is_removed_is_gone(cluster: Cluster) -> None:
    url, digest = cluster.url, cluster.library.add(50)
    assert upload(url, cluster.library, digest, "new").status_code == 201
    assert answer(url, "new")[1] == digest
    other = cluster.library.add(51)
    assert upload(url, cluster.library, other, "new", replace=True).status_code == 200
    eventually(lambda: answer(url, "new")[1] == other)
    assert "new" in {expert["id"] for expert in experts(cluster)}
    assert httpx.delete(f"{url}/v1/experts/new", timeout=60).status_code == 200
    eventually(lambda: all(ask(url, "new").status_code == 404 for _ in range(6)))


def test_errors_keep_their_shape(cluster: Cluster) -> None:
    unknown = ask(cluster.url, "nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    wrong = httpx.post(f"{cluster.url}/v1/completions", content=b"{", headers=_JSON, timeout=60)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_json")
    large = httpx.post(f"{cluster.url}/v1/experts", content=bytes(65 << 20), timeout=60)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "payload_too_large")
    assert httpx.get(f"{cluster.url}/ready", timeout=60).status_code == 200


def test_a_replica_that_dies_is_replaced_and_the_other_serves_on(cluster: Cluster) -> None:
    """Its experts' requests go to the other one; the base's reach the new one too.

    The last test that needs the replicas as they were.
    """
    [pid, *_] = re.findall(r"ServeReplica:switchyard:replica pid=(\d+)", "".join(cluster.screen))
    os.kill(int(pid), signal.SIGKILL)
    statuses, answering = Counter[int](), set[str]()

    def both_answer() -> bool:
        for model in ("tiny", "tiny", *(f"expert-{i}" for i in range(EXPERTS))):
            response = ask(cluster.url, model)
            statuses[response.status_code] += 1
            if response.status_code == 200:
                answering.add(who(response))
        return len(answering - set(cluster.replicas)) == 1 and len(answering) >= 2

    eventually(both_answer, 120)
    assert set(statuses) <= {200, 503}
    assert statuses[503] <= 2, "what was under way when it died"


def test_more_requests_bring_more_replicas(cluster: Cluster) -> None:
    """Three in progress per replica are enough; twelve at once make a third replica."""
    seen: set[str] = set()
    with ThreadPoolExecutor(12) as pool:

        def three_answer() -> bool:
            answers = pool.map(lambda _: ask(cluster.url, "tiny", tokens=64), range(24))
            seen.update(who(response) for response in answers)
            return len(seen - before) >= 1

        before = {who(ask(cluster.url, "tiny")) for _ in range(12)}
        eventually(three_answer, 300)
    assert len(before) == 2


def test_without_keys_it_does_not_listen_to_everybody(cluster: Cluster) -> None:
    done = ray_serve("--base", "x", "--store", cluster.redis.url, "--host", "0.0.0.0")
    assert done.returncode == 1
    assert "API key" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", "x"], "redis://"),
        (["--base", "x", "--store", "redis://127.0.0.1:1/0", "--ray-replicas", "0"], "replicas"),
        (["--base", "x", "--store", "redis://127.0.0.1:1/0", "--ray-bogus", "1"], "bogus"),
        (["--base", "x", "--store", "redis://127.0.0.1:1/0"], "cannot be reached"),
        (["--base"], "--ray-replicas"),
    ],
)
def test_a_bad_setting_is_one_clear_line(arguments: list[str], said: str) -> None:
    done = ray_serve(*arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def ray_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.ray_serve", *arguments],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
