from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rewards.serve.client import Client, Reply, Serving, until

from trl_grpo_ext.rewards.serve.backends import FunctionBackend, ModelBackend
from trl_grpo_ext.rewards.serve.model import Classifier, load_classifier
from trl_grpo_ext.rewards.serve.settings import Limits, ServeSettings

ROOT = Path(__file__).parents[3]


def lengths(*, completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def model_backend(folder: Path, **settings: Any) -> tuple[Classifier, ModelBackend]:
    asked = ServeSettings(model=str(folder), device="cpu", **settings)
    classifier = load_classifier(asked)
    return classifier, ModelBackend(classifier, settings=asked)


class Blocked:
    """A reward that waits until it may go on."""

    def __init__(self) -> None:
        self.called, self.go_on = threading.Event(), threading.Event()
        self.__name__ = "blocked"

    def __call__(self, *, completions: Sequence[str], **columns: Any) -> list[float]:
        self.called.set()
        assert self.go_on.wait(20)
        return [1.0] * len(completions)


def in_background(call: Callable[[], Reply]) -> tuple[threading.Thread, list[Reply]]:
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(call()))
    thread.start()
    return thread, replies


def test_get_reward_answers_with_the_logits_of_a_model(serving: Serving, reward_dir: Path) -> None:
    classifier, backend = model_backend(reward_dir)
    with serving(backend) as client:
        asked = {"query": ["1+1=2", "a longer text"], "prompts": ["1+1=", "a"], "labels": [2, 0]}
        reply = client.post("/get_reward", asked)
    alone = [classifier.logits(classifier.encode([text]))[0][0] for text in asked["query"]]  # type: ignore[attr-defined]
    assert reply.status == 200
    assert reply.json["rewards"] == pytest.approx(alone, abs=1e-5)
    assert reply.json == {
        "rewards": reply.json["rewards"],
        "scores": reply.json["rewards"],
        "extra_logs": {},
    }


def test_classify_answers_with_probabilities_or_logits(
    serving: Serving, three_labels_dir: Path
) -> None:
    classifier, backend = model_backend(three_labels_dir)
    with serving(backend) as client:
        raw = client.post("/classify", {"input": ["ab", "1"], "use_activation": False}).json
        probs = client.post("/classify", {"model": "tiny", "input": "ab"}).json
        wrong = client.post("/classify", {"model": "other", "input": "ab"})
    [first] = classifier.logits(classifier.encode(["ab"]))
    assert [row["index"] for row in raw["data"]] == [0, 1]
    assert raw["data"][0]["probs"] == pytest.approx(first, abs=1e-5)
    assert probs["data"][0]["probs"] == pytest.approx(classifier.activated([first])[0], abs=1e-5)
    assert probs["data"][0]["label"] == ("bad", "fair", "good")[first.index(max(first))]
    assert probs["model"] == "tiny"
    assert raw["usage"]["prompt_tokens"] == 3
    assert (wrong.status, wrong.json["error"]["type"]) == (404, "Not Found")


def test_requests_of_many_clients_share_passes_and_get_their_own_scores(
    serving: Serving, reward_dir: Path
) -> None:
    classifier, backend = model_backend(reward_dir, max_wait_ms=300, max_padding=0.9)
    texts = [chr(97 + index) * (1 + 7 * index) for index in range(12)]
    num_passes = 0
    forward = classifier.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_passes
        num_passes += 1
        return forward(*args, **kwargs)

    classifier.model.forward = counted
    with serving(backend) as client, ThreadPoolExecutor(12) as clients:
        replies = list(clients.map(lambda t: client.post("/get_reward", {"query": [t]}), texts))
    assert num_passes < 4
    alone = [classifier.logits(classifier.encode([text]))[0][0] for text in texts]
    got = [reply.json["rewards"][0] for reply in replies]
    assert got == pytest.approx(alone, abs=1e-5)


def test_models_and_health_are_shown(serving: Serving, reward_dir: Path) -> None:
    with serving(model_backend(reward_dir)[1]) as client:
        [model] = client.get("/v1/models").json["data"]
        health = client.get("/health")
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 256)
    assert (health.status, health.json) == (200, {"status": "ok"})


def test_token_is_asked_for_everywhere_but_in_health(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVE_TOKEN", "secret-7")
    asked = {"query": ["ab"], "prompts": ["a"]}
    with serving(FunctionBackend(lengths), token_env="SERVE_TOKEN") as client:
        assert client.get("/health").status == 200
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "secret-7"}):
            refused = client.post("/get_reward", asked, **headers)
            assert refused.status == 401
            assert "secret-7" not in refused.text
        assert client.get("/v1/models").status == 401
        assert client.get("/anything").status == 401
        allowed = {"Authorization": "Bearer secret-7"}
        assert client.post("/get_reward", asked, **allowed).json["rewards"] == [1.0]
        assert client.get("/v1/models", **allowed).status == 200


def test_what_is_no_request_gets_a_json_error(serving: Serving) -> None:
    limits = Limits(body_bytes=100, texts=2, characters=20)
    with serving(FunctionBackend(lengths), limits=limits) as client:
        for status, reply in [
            (400, client.post("/get_reward", b"{")),
            (400, client.post("/get_reward", {"query": ["ab"]})),  # a function needs prompts
            (400, client.post("/classify", {"input": ["\ud800"]})),
            (404, client.get("/get_rewards")),
            (405, client.get("/get_reward")),
            (413, client.post("/classify", {"input": "a" * 21})),
            (413, client.post("/classify", {"input": ["a"] * 3})),
            (413, client.post("/classify", b'{"input": "a"}' + b" " * 100)),
            (415, client.send("POST", "/classify", b'{"input": "a"}')),
            (415, client.post("/classify", {"input": "a"}, **{"Content-Encoding": "gzip"})),
        ]:
            assert reply.status == reply.json["error"]["code"] == status
            assert reply.error
        assert client.post("/classify", {"input": "a"}).status == 200


def test_body_that_does_not_come_is_not_waited_for(serving: Serving) -> None:
    with serving(FunctionBackend(lengths), limits=Limits(read_timeout_s=0.1)) as client:
        head = b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
            connection.sendall(head + b"Content-Length: 10\r\n\r\n{")
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_error_in_the_reward_is_told_without_its_traceback(
    serving: Serving, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*, completions: Sequence[str], **columns: Any) -> list[float]:
        if "bad" in completions:
            raise RuntimeError("private detail")
        return lengths(completions=completions)

    with serving(FunctionBackend(fails)) as client:
        failed = client.post("/classify", {"input": "bad"})
        assert client.post("/classify", {"input": "good"}).json["data"][0]["probs"] == [4.0]
    assert (failed.status, failed.headers["content-type"]) == (500, "application/json")
    assert failed.error == "Scoring failed. The log of the server says why."
    assert "RuntimeError: private detail" in capfd.readouterr().err


@pytest.mark.parametrize("limits", [Limits(requests=1), Limits(texts=2, texts_in_flight=2)])
def test_too_much_at_once_is_told_to_come_back(serving: Serving, limits: Limits) -> None:
    reward = Blocked()
    with serving(FunctionBackend(reward), limits=limits) as client:
        thread, replies = in_background(lambda: client.post("/classify", {"input": ["a", "b"]}))
        assert reward.called.wait(20)
        refused = client.post("/classify", {"input": ["c"]})
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert client.get("/health").status == 200
        reward.go_on.set()
        thread.join()
        assert client.post("/classify", {"input": ["c"]}).status == 200
    assert [reply.status for reply in replies] == [200]


def test_client_that_hangs_up_makes_room(serving: Serving) -> None:
    reward = Blocked()
    with serving(FunctionBackend(reward), limits=Limits(requests=1)) as client:
        body = b'{"input": "a"}'
        head = b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert reward.called.wait(20)
            assert client.post("/classify", {"input": "b"}).status == 429
        until(lambda: client.post("/classify", b"{").status == 400, timeout_s=10)
        reward.go_on.set()
        assert client.post("/classify", {"input": "b"}).status == 200


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from trl_grpo_ext.rewards.serve.start import serve_reward
from trl_grpo_ext.rewards.serve.settings import ServeSettings
serve_reward(ServeSettings(reward="slow_reward:slow", port=int(sys.argv[1]), grace_s=1))
"""
SLOW = """
import pathlib, time
def slow(*, completions, **columns):
    pathlib.Path("called").touch()
    time.sleep(float(completions[0]))
    return [7.0]
"""


@pytest.mark.parametrize(
    ("sent", "seconds", "status"),
    [(signal.SIGTERM, "0.6", 200), (signal.SIGINT, "0.6", 200), (signal.SIGTERM, "99", 500)],
)
def test_signal_ends_the_server_after_the_requests_in_flight(
    sent: signal.Signals, seconds: str, status: int, tmp_path: Path
) -> None:
    (tmp_path / "slow_reward.py").write_text(SLOW)
    port = _free_port()
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", PROGRAM, str(port)]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE) as server:
        try:
            client = Client(port)
            until(lambda: _is_up(client), timeout_s=30)
            thread, replies = in_background(lambda: client.post("/classify", {"input": seconds}))
            until((tmp_path / "called").exists)
            server.send_signal(sent)
            started = time.monotonic()
            thread.join()
            assert [reply.status for reply in replies] == [status]
            assert server.wait(60) == 0
            assert time.monotonic() - started < 10  # the call that hangs is not waited for
            assert not _is_up(client)
        finally:
            server.kill()


def test_server_in_the_background_of_a_script_outlives_ctrl_c() -> None:
    port = _free_port()
    # `sh` starts such jobs with Ctrl-C ignored; a terminal sends it to them all the same.
    command = [sys.executable, "-m", "trl_grpo_ext.cli", "serve-reward", "--reward", "last_number"]
    script = f"{shlex.join([*command, '--port', str(port)])} & echo $!; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as shell:
        server = int(shell.stdout.readline())
        try:
            client = Client(port)
            until(lambda: _is_up(client), timeout_s=30)
            os.kill(server, signal.SIGINT)
            time.sleep(0.3)
            asked = {"query": ["4"], "prompts": [""], "labels": ["4"]}
            assert client.post("/get_reward", asked).json["rewards"] == [1.0]
            os.kill(server, signal.SIGTERM)
            until(lambda: not _is_up(client))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _is_up(client: Client) -> bool:
    try:
        return client.get("/health").status == 200
    except OSError:
        return False


def test_get_reward_answers_with_the_scores_of_a_function(serving: Serving) -> None:
    with serving(FunctionBackend(lengths)) as client:
        reply = client.post("/get_reward", {"query": ["1+1=2"], "prompts": ["1+1="], "labels": [2]})
    assert reply.json == {"rewards": [1.0], "scores": [1.0], "extra_logs": {}}
