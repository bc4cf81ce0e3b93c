"""``shoal serve`` of a run, from its checkpoint to its clients: right answers, alone and among hundreds."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import httpx
import psutil
import pytest
from ports import free_ports
from serve_process import patiently
from shell import environment
from small import small_corpus, small_recipe

from shoal.jobs.data.prepare import corpus_tokenizer
from shoal.jobs.run_folder import RunFolder, write_identity
from shoal.jobs.serve.proto.shoal.v1 import inference_pb2, inference_pb2_grpc
from shoal.workers.config import Recipe

STREAMS, SECONDS = 256, float(os.environ.get("SHOAL_SOAK_SECONDS", "60"))
WORDS = ["shoal", "fish", "net", "sea", "of", "the", "a", "swims", "deep", "blue", "tide", "and", "rows"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint of its third step."""
    import torch

    from shoal.workers.mesh import make_mesh
    from shoal.workers.placement import Placement
    from shoal.workers.trainer import Trainer

    here = tmp_path_factory.mktemp("here")
    corpus, folder = small_corpus(here), RunFolder(here / "runs" / "first")
    tables = small_recipe(train__dtype="float32", data__corpus=str(corpus), parallel__threads=1, model__context=128)
    recipe = Recipe.model_validate(tables)
    folder.path.mkdir(parents=True)
    write_identity(folder, recipe, corpus, "")
    trainer = Trainer(recipe, corpus, folder.path / "checkpoints", make_mesh(Placement.of(recipe)), torch.device("cpu"))
    for _ in range(3):
        trainer.advance()
    trainer.save()
    trainer.settle()
    return folder.path


class Service:
    """A running ``shoal serve``."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, grpc_port: int) -> None:
        self.process, self.url, self.grpc = process, f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}"

    def load(self) -> Any:
        with grpc.insecure_channel(self.grpc) as channel:
            return inference_pb2_grpc.InferenceStub(channel).GetLoad(inference_pb2.GetLoadRequest(), timeout=30)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def memory(self) -> int:
        """Bytes of the ranks and of the replica, those shared between processes counted in part."""
        total = 0
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if any(name in " ".join(process.cmdline()) for name in ("EngineActor", "ServeReplica")):
                    total += process.memory_full_info().pss
            except psutil.Error:
                pass
        return total


@contextmanager
def serving(run: Path, log: Path, *options: str) -> Iterator[Service]:
    port, grpc_port = free_ports()
    command = [sys.executable, "-m", "shoal.jobs.cli.main", "serve", str(run), "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--grpc-port", str(grpc_port), *options], cwd=run.parent, env=environment(), stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    service = Service(process, port, grpc_port)
    try:
        patiently(lambda: service.ready() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield service
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _prompts(count: int) -> list[str]:
    rng = random.Random(11)
    start = " ".join(rng.choice(WORDS) for _ in range(20))
    return [
        start[: rng.randint(0, 60)] + " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 8)))
        for _ in range(count)
    ]


def _expected(run: Path, prompts: list[str], most: int) -> dict[str, str]:
    """What the plain loop answers, greedily."""
    from shoal.jobs.load import load_trained
    from shoal.workers.sample import sample

    trained = load_trained(RunFolder(run), 3)
    tokenizer = corpus_tokenizer(trained.corpus)
    ids = {p: tokenizer.prompt(p) for p in prompts}
    return {
        p: tokenizer.decode(sample(trained.model, ids[p], most, temperature=0.0, stop=tokenizer.eos)) for p in prompts
    }


def test_a_served_run_answers_as_the_plain_loop_does(trained: Path, tmp_path: Path) -> None:
    """Over HTTP and gRPC, one after the other and all at once; then SIGTERM ends it with 0."""
    want = _expected(trained, _prompts(6), 24)
    with serving(trained, tmp_path / "log") as service:
        body = {"model": "first", "prompt": list(want), "max_tokens": 24, "temperature": 0}
        together = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).json()
        assert [choice["text"] for choice in together["choices"]] == list(want.values())
        with grpc.insecure_channel(service.grpc) as channel:
            for prompt, text in want.items():
                request = inference_pb2.GenerateRequest(
                    text=prompt, sampling=inference_pb2.Sampling(max_tokens=24, temperature=0.0)
                )
                assert "".join(r.text for r in inference_pb2_grpc.InferenceStub(channel).Generate(request)) == text
        assert service.load().pages_used == 0
        assert _in_the_dashboard((tmp_path / "log").read_text()) == "RUNNING"
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0, (tmp_path / "log").read_text()


def _in_the_dashboard(said: str) -> str:
    """What the dashboard's Serve tab says of the application, at the address that was printed."""
    (address,) = re.findall(r"^ray +(http\S+)/#/serve$", said, re.MULTILINE)
    token = Path.home() / ".ray" / "auth_token"  # Ray makes one for its local clusters
    headers = {"Authorization": f"Bearer {token.read_text().strip()}"} if token.is_file() else {}
    found = httpx.get(f"{address}/api/serve/applications/", headers=headers, timeout=30).json()
    return str(found["applications"]["shoal"]["status"])


class Crowd:
    """Clients that ask, read whole answers or run away in the middle of them, and send nonsense in between."""

    def __init__(self, url: str, want: dict[str, str], until: float) -> None:
        self.url, self.want, self.until = url, want, until
        self.happened: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def client(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        while time.monotonic() < self.until and not self.wrong:
            await rng.choice([self.whole, self.whole, self.whole, self.runaway, self.nonsense])(session, rng)

    async def whole(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        await self._stream(session, rng, 1_000_000)

    async def runaway(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        await self._stream(session, rng, rng.randint(0, 20))

    async def _stream(self, session: aiohttp.ClientSession, rng: random.Random, most: int) -> None:
        prompt = rng.choice(list(self.want))
        body = {"model": "first", "prompt": prompt, "max_tokens": 48, "temperature": 0, "stream": True}
        text, done = "", False
        async with session.post(f"{self.url}/v1/completions", json=body) as answer:
            if answer.status == 429:
                self.happened["429"] += 1
                assert int(answer.headers["Retry-After"]) >= 1
                return
            if answer.status != 200:
                self.wrong.append(f"{answer.status}: {await answer.text()}")
                return
            pieces = 0
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.wrong.append(str(event))
                    text += "".join(choice["text"] for choice in event.get("choices", ()))
                    pieces += 1
                done = done or line.startswith(b"data: [DONE]")
                if pieces > most:
                    break
        want = self.want[prompt]
        if (done and text != want) or (not done and (most > 1000 or not want.startswith(text))):
            self.wrong.append(f"{prompt!r}: got {text!r}, not {want!r}")
        self.happened["whole" if done else "run away"] += 1

    async def nonsense(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        bad: list[tuple[bytes, int]] = [
            (b"{", 400),
            (b"\xff\xfe", 400),
            (json.dumps({"model": "first", "prompt": ""}).encode(), 400),
            (json.dumps({"model": "first", "prompt": "sea " * 500}).encode(), 400),
            (json.dumps({"model": "nobody", "prompt": "sea"}).encode(), 404),
            (json.dumps({"model": "first", "prompt": "sea", "max_tokens": -1}).encode(), 400),
            (json.dumps({"model": "first", "prompt": "sea", "temperature": 1e9}).encode(), 400),
        ]
        data, status = rng.choice(bad)
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{self.url}/v1/completions", data=data, headers=headers) as answer:
            if answer.status not in (status, 429):
                self.wrong.append(f"{answer.status} for {data[:60]!r}: {await answer.text()}")
            self.happened["nonsense"] += 1

    async def run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            await asyncio.gather(*(self.client(session, random.Random(i)) for i in range(STREAMS)))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [(), ("--placement", "1A:1F")], ids=["1 rank", "1A:1F"])
def test_hundreds_of_streams_at_once(options: tuple[str, ...], trained: Path, tmp_path: Path) -> None:
    """No token is lost or mixed up, no page leaks, memory stays: 256 clients, a fifth of which run away."""
    want = _expected(trained, _prompts(40), 48)
    with serving(trained, tmp_path / "log", *options) as service:
        warm = Crowd(service.url, want, time.monotonic() + SECONDS / 4)
        asyncio.run(warm.run())
        before = service.memory()
        crowd = Crowd(service.url, want, time.monotonic() + SECONDS)
        asyncio.run(crowd.run())
        assert not warm.wrong + crowd.wrong, (warm.wrong + crowd.wrong)[:3]
        print(crowd.happened, before, service.memory(), service.load())
        assert crowd.happened["whole"] > STREAMS
        assert crowd.happened["run away"] and crowd.happened["nonsense"]
        patiently(lambda: service.load().running + service.load().waiting == 0)
        load = service.load()
        assert load.pages_used == 0
        assert load.pages_cached <= load.pages
        assert before > 100 << 20
        assert service.memory() < before * 1.05
        assert httpx.get(f"{service.url}/readyz").status_code == 200
