"""The vLLM server engine against a server of our own that misbehaves: nothing lost, nothing twice.

The server answers vLLM's calls; its weights are real (it reads the folder it is told to, and its
log-probabilities of a prompt are the model's), its completions are a function of the request.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from entrograd.errors import InputError
from entrograd.models.forward import score
from entrograd.models.load import load_model, policy_version
from entrograd.params import check
from entrograd.rollout import vllm_http
from entrograd.rollout.engine import EngineError, Request
from entrograd.rollout.engines import check_processes
from entrograd.rollout.params import RolloutParams, Sampling
from entrograd.rollout.vllm_base import request_seed
from entrograd.rollout.vllm_server import VllmServer
from entrograd.rollout.vllm_settings import flags_of
from entrograd.storage.hashing import sha256
from entrograd.storage.tables import read_table
from helpers.paths import ROOT, SHIPPED
from helpers.tables import write_prompts

SAMPLING = Sampling(max_new_tokens=4)


class Server:
    """A process that can be lost: `stop` forgets its weights and their name, `start` returns with
    those it was first given, at the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.drawn: list[int] = []  # seeds of completions that were sent
        self.loads = 0
        self.raw = False  # vLLM's default: log-probabilities before the temperature
        self.before: Callable[[Handler], bool] = answer_all
        self.http: ThreadingHTTPServer | None = None
        self.engines: list[VllmServer] = []  # that talk to it
        self.start()

    def start(self) -> None:
        self.model = load_model(self.folder, "float32", "cpu")
        self.version = "default"
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.daemon_threads = True
        self.http.owner = self  # type: ignore[attr-defined]
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        if self.http:
            self.http.shutdown()
            self.http.server_close()
        self.http = None

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "m", "max_model_len": 256}]}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            self.model = load_model(body["kwargs"]["weights_path"], "float32", "cpu")
            self.loads += 1
        if path == "/inference/v1/generate":
            return self.complete(body["token_ids"], body["sampling_params"])
        return {}

    def complete(self, ids: list[int], asked: dict[str, Any]) -> Any:
        if "prompt_logprobs" in asked:
            values = score(self.model, [ids[:1]], [ids[1:]], 1.0, 4096)[0][0].tolist()
            rows = [{str(t): {"logprob": v}} for t, v in zip(ids[1:], values, strict=True)]
            return {"prompt_logprobs": [None, *rows], "choices": []}
        self.drawn.append(asked["seed"])
        tokens = [4 + (asked["seed"] >> (8 * place)) % 70 for place in range(asked["max_tokens"])]
        temperature = 1.0 if self.raw else asked["temperature"]
        values = score(self.model, [ids], [tokens], temperature, 4096)[0][0].tolist()
        choice = {
            "token_ids": tokens,
            "logprobs": {"content": [{"logprob": value} for value in values]},
            "finish_reason": "length",
            "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
        }
        return {"choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.respond({})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.respond(json.loads(self.rfile.read(length) or b"{}"))

    def respond(self, body: dict[str, Any]) -> None:
        owner: Server = self.server.owner  # type: ignore[attr-defined]
        if owner.http is None:  # it is gone, and so are its open connections
            self.drop()
        elif owner.before(self):
            self.send(200, json.dumps(owner.answer(self.path, body)).encode())

    def send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def drop(self) -> None:
        self.close_connection = True
        self.connection.close()


def answer_all(_: Handler) -> bool:
    return True


class Count:
    """A progress bar that counts."""

    done = 0

    def advance(self, count: int = 1, _: str = "") -> None:
        self.done += count


@pytest.fixture
def server(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(vllm_http, "FIRST_WAIT", 0.02)
    running = Server(tiny_model)
    yield running
    for engine in running.engines:
        engine.close()
    running.stop()


def params(server: Server, **vllm: Any) -> RolloutParams:
    block = {"url": f"http://127.0.0.1:{server.port}", "concurrency": 8, **vllm}
    data = {"engine": "vllm_server", "dtype": "float32", "vllm": block}
    return check(RolloutParams, data, "rollout")


def requests(count: int) -> list[Request]:
    return [Request(f"p{i // 2}", i % 2, (6, 7, 4 + i // 2)) for i in range(count)]


def open_server(
    server: Server, tiny_model: Path, work: Path | None = None, **vllm: Any
) -> VllmServer:
    engine = VllmServer(params(server, **vllm), tiny_model, None, work)
    server.engines.append(engine)
    server.drawn.clear()
    return engine


def moved(folder: Path, factor: float) -> Any:
    """The model in `folder` with other weights."""
    model = load_model(folder, "float32", "cpu")
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)
    return model


def test_completions_come_back_in_order(server: Server, tiny_model: Path) -> None:
    engine, asked, count = open_server(server, tiny_model), requests(30), Count()
    drawn = engine.generate(asked, SAMPLING, 3, count)  # type: ignore[arg-type]
    for request, completion in zip(asked, drawn, strict=True):
        seed = request_seed(3, request)
        assert completion.completion_ids == tuple(4 + (seed >> (8 * p)) % 70 for p in range(4))
        assert len(completion.sampling_logprobs) == 4
        assert completion.finish_reason == "length"
    assert sorted(server.drawn) == sorted({request_seed(3, r) for r in asked})
    assert count.done == 30
    assert engine.policy_version == policy_version(load_model(tiny_model, "float32", "cpu"))


def test_seeds_depend_on_seed_prompt_and_sample_alone() -> None:
    one = request_seed(1, Request("a", 0, (5,)))
    assert one == request_seed(1, Request("a", 0, (6, 7), 3))
    others = [(2, "a", 0), (1, "b", 0), (1, "a", 1)]
    assert one not in {request_seed(s, Request(p, i, (5,))) for s, p, i in others}
    assert 0 <= one < 2**63


@pytest.mark.parametrize("how", ["dropped", "503", "not JSON", "too slow"])
def test_a_failing_answer_is_asked_for_again(server: Server, tiny_model: Path, how: str) -> None:
    engine = open_server(server, tiny_model, timeout_seconds=0.5)
    lock, seen = threading.Lock(), [0]

    def before(handler: Handler) -> bool:
        with lock:
            seen[0] += handler.path == "/inference/v1/generate"
            fails = seen[0] in (3, 9) and handler.path == "/inference/v1/generate"
        if not fails:
            return True
        if how == "dropped":
            handler.drop()
        elif how == "503":
            handler.send(503, b"busy")
        elif how == "not JSON":
            handler.send(200, b"<html>")
        else:
            time.sleep(1.0)
        return False

    server.before = before
    asked, count = requests(20), Count()
    drawn = engine.generate(asked, SAMPLING, 1, count)  # type: ignore[arg-type]
    server.before = answer_all
    assert drawn == engine.generate(asked, SAMPLING, 1)
    assert count.done == 20


def test_a_server_lost_mid_batch_returns_with_the_current_weights(
    server: Server, tiny_model: Path
) -> None:
    """It comes back with the weights it started with: they are replaced before it is asked."""
    engine = open_server(server, tiny_model)
    trained = moved(tiny_model, 1.5)
    engine.update_weights(trained)
    assert engine.policy_version == policy_version(trained) == server.version
    assert server.loads == 1
    lock = threading.Lock()
    restarts = [0]

    def before(_: Handler) -> bool:
        with lock:
            if len(server.drawn) == 10 and not restarts[0]:
                restarts[0] = 1
                threading.Thread(target=restart).start()
        return True

    def restart() -> None:
        server.stop()
        time.sleep(0.3)
        server.start()

    server.before = before
    asked, count = requests(60), Count()
    drawn = engine.generate(asked, SAMPLING, 1, count)  # type: ignore[arg-type]
    assert [c.completion_ids[0] for c in drawn] == [4 + request_seed(1, r) % 70 for r in asked]
    assert (restarts[0], server.loads, count.done) == (1, 2, 60)
    assert server.version == engine.policy_version


def test_completions_of_other_weights_are_not_taken(server: Server, tiny_model: Path) -> None:
    engine = open_server(server, tiny_model)
    server.version = "older"
    drawn = engine.generate(requests(6), SAMPLING, 1)
    assert len(drawn) == 6
    assert server.version == engine.policy_version
    assert len(server.drawn) > 6  # those of the older weights were drawn in vain


def test_a_server_that_stays_away_is_an_error(server: Server, tiny_model: Path) -> None:
    engine = open_server(server, tiny_model, retries=3)
    server.stop()
    with pytest.raises(EngineError, match=r"lost \(ConnectionError.*3 more attempts"):
        engine.generate(requests(4), SAMPLING, 1)
    with pytest.raises(EngineError, match="unreachable"):
        open_server(server, tiny_model)


def test_weights_that_do_not_arrive_are_an_error(server: Server, tiny_model: Path) -> None:
    engine = open_server(server, tiny_model)
    trained = moved(tiny_model, 1.5)

    def before(handler: Handler) -> bool:
        if handler.path != "/collective_rpc":
            return True
        handler.send(200, b"{}")  # a worker that says it has read them
        return False

    server.before = before
    with pytest.raises(EngineError, match="does not have the weights"):
        engine.update_weights(trained)


def test_raw_logprobs_are_refused(server: Server, tiny_model: Path) -> None:
    server.raw = True
    with pytest.raises(InputError, match="--logprobs-mode processed_logprobs"):
        open_server(server, tiny_model)


def test_what_the_server_refuses_is_not_tried_again(server: Server, tiny_model: Path) -> None:
    engine = open_server(server, tiny_model)

    def refuse(status: int) -> Callable[[Handler], bool]:
        def before(handler: Handler) -> bool:
            handler.send(status, b"too long")
            return False

        return before

    server.before = refuse(400)
    with pytest.raises(EngineError, match="status 400: too long"):
        engine.generate(requests(1), SAMPLING, 1)
    server.before = refuse(401)
    with pytest.raises(InputError, match="VLLM_API_KEY"):
        engine.generate(requests(1), SAMPLING, 1)
    server.before = refuse(404)
    with pytest.raises(InputError, match="VLLM_SERVER_DEV_MODE=1"):
        engine.generate(requests(1), SAMPLING, 1)
    with pytest.raises(InputError, match="prompt p0: 3 tokens and 300 new ones"):
        engine.generate(requests(1), Sampling(max_new_tokens=300), 1)


def test_written_weights_are_removed(server: Server, tiny_model: Path, tmp_path: Path) -> None:
    engine = open_server(server, tiny_model, weights_folder=str(tmp_path / "weights"))
    for factor in (1.1, 1.2, 1.3):
        engine.update_weights(moved(tiny_model, factor))
        (scratch,) = (tmp_path / "weights").iterdir()
        assert len(list(scratch.iterdir())) == 1  # the current ones, for a server that returns
    engine.close()
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_removes_the_weights_that_its_killed_predecessor_left(
    shared: bool, server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    """They lie in the run's own folder, or in one of its name where the server reads."""
    work = tmp_path / "train_online-1a2b"
    vllm = {"weights_folder": str(tmp_path / "shared")} if shared else {}
    scratch = (
        tmp_path / "shared/entrograd-weights-train_online-1a2b" if shared else work / "weights"
    )
    (scratch / "000007-killed").mkdir(parents=True)
    engine = open_server(server, tiny_model, work, **vllm)
    trained = moved(tiny_model, 1.1)
    engine.update_weights(trained)
    assert [path.name for path in scratch.iterdir()] == [f"000001-{policy_version(trained)}"]
    engine.close()
    assert not scratch.exists()


class OnlineStage:
    """stages/train_online.py on the server: three rounds of four prompts by eight completions."""

    def __init__(self, server: Server, model: Path, folder: Path) -> None:
        self.folder, self.model = folder, model
        self.process: subprocess.Popen[str] | None = None
        self.params = yaml.safe_load(SHIPPED.read_text())
        self.params["rollout"].update(engine="vllm_server", group_size=8, dtype="float32")
        server_url = {"vllm": {"url": f"http://127.0.0.1:{server.port}"}}
        often = {"checkpoint": {"max_fraction": 1.0}}
        self.params["execution"] = {"rollout": server_url, "train_online": often}
        self.params["rollout"]["sampling"].update(max_new_tokens=3)
        self.params["method"] = {"name": "grpo", "grpo": {"importance_sampling": "truncated"}}
        self.set(rounds=3, prompts_per_round=4, dtype="float32", optimizer={"lr": 0.001})
        write_prompts(folder / "prompts.parquet", 8)

    def set(self, **online: Any) -> None:
        self.params["train_online"].update(online)
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params))

    def run(self, name: str, command: list[str]) -> tuple[str, int]:
        """What it said, and its exit code; outputs go to the folder `name`."""
        words = [*command, str(ROOT / "stages/train_online.py"), "--model", str(self.model)]
        words += ["--reward-heads", "", "--timings", "", "--prompts", "prompts.parquet"]
        words += ["--out", f"{name}/model", "--rounds", f"{name}/rounds"]
        words += ["--curve", f"{name}/curve.csv", "--work", f"work-{name}"]
        with subprocess.Popen(
            words,
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as self.process:
            said, _ = self.process.communicate()
        return said, self.process.returncode


@pytest.fixture
def stage(server: Server, tiny_model: Path, tmp_path: Path) -> OnlineStage:
    return OnlineStage(server, tiny_model, tmp_path)


class TestSeveralProcesses:
    """Of those that train, the first gives the server its weights; each draws its share."""

    def test_the_others_wait_for_the_weights(self, server: Server, tiny_model: Path) -> None:
        first, trained = open_server(server, tiny_model), moved(tiny_model, 1.5)
        follower = VllmServer(params(server), tiny_model, moved(tiny_model, 1.0), follows=True)
        server.engines.append(follower)
        assert server.loads == 0
        waiting = threading.Thread(target=follower.update_weights, args=(trained,), daemon=True)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        first.update_weights(trained)
        waiting.join(30)
        assert not waiting.is_alive()
        assert (server.loads, server.version) == (1, policy_version(trained))
        asked = requests(6)
        assert follower.generate(asked, SAMPLING, 1) == first.generate(asked, SAMPLING, 1)

    def test_weights_that_never_come_are_an_error(self, server: Server, tiny_model: Path) -> None:
        open_server(server, tiny_model)
        chosen = params(server, start_seconds=0.2)
        with pytest.raises(EngineError, match=r"which the first process should have given it"):
            VllmServer(chosen, tiny_model, moved(tiny_model, 1.5), follows=True)

    @pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
    def test_an_engine_a_process_is_refused_and_why(self, engine: str) -> None:
        chosen = check(RolloutParams, {"engine": engine}, "")
        check_processes(chosen, 1)
        with pytest.raises(InputError, match=r"on the same GPUs; start one server for all.*url"):
            check_processes(chosen, 2)
        check_processes(check(RolloutParams, {"engine": "transformers"}, ""), 2)

    def test_two_train_as_one(self, stage: OnlineStage, server: Server) -> None:
        """Through `accelerate launch`; the tables are equal."""
        launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu"]
        launcher += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        for name, command in {"one": [sys.executable], "two": launcher}.items():
            server.loads, server.version = 0, "default"
            said, code = stage.run(name, command)
            assert code == 0, said
            assert server.loads == 4  # the first weights and three updates, whoever trains
        one, two = (read_table(stage.folder / n / "rounds", "annotated") for n in ("one", "two"))
        for column in ("prompt_id", "sample_index", "completion_ids", "reward"):
            assert one[column].to_pylist() == two[column].to_pylist()
        assert len(set(two["policy_version"].to_pylist())) > 1


def test_overlapped_training_killed_while_it_draws_ends_with_the_same_bytes(
    stage: OnlineStage, server: Server
) -> None:
    """SIGKILL at the 16th of 32 completions of the third round, drawn beside the second's update;
    at the start of it (a check of the server) and in the first round 8 and 32 are drawn."""
    stage.set(prefetch=True)
    said, code = stage.run("whole", [sys.executable])
    assert code == 0, said
    server.drawn.clear()
    lock = threading.Lock()

    def before(_: Handler) -> bool:
        with lock:
            if len(server.drawn) == 8 + 32 + 32 + 16 and stage.process:
                stage.process.kill()
        return True

    server.before = before
    said, code = stage.run("killed", [sys.executable])
    assert code == -signal.SIGKILL, said
    server.before = answer_all
    said, code = stage.run("killed", [sys.executable])
    assert code == 0, said
    assert "continuing after update 1" in said
    for output in ("model", "rounds", "curve.csv"):
        whole, killed = (stage.folder / name / output for name in ("whole", "killed"))
        assert sha256(whole) == sha256(killed), output
    assert not list((stage.folder / "work-killed").iterdir())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"engine": "vllm", "vllm": {"url": "http://h:1"}}, "vllm.url is for engine vllm_server"),
        ({"engine": "vllm", "vllm": {"data_parallel_size": 2}}, "needs engine vllm_server"),
        ({"engine": "vllm", "vllm": {"weights": "nccl"}}, "nccl is for engine vllm_server"),
        ({"engine": "vllm_server", "vllm": {"weights": "ipc"}}, "on one GPU"),
        ({"engine": "vllm_server", "vllm": {"url": "h:1"}}, "rollout.vllm.url"),
    ],
)
def test_settings_that_cannot_be_are_errors(block: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(RolloutParams, block, "rollout")


def test_a_machine_without_vllm_is_told_how_to_get_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from entrograd.rollout import vllm_settings
    from entrograd.rollout.engines import open_engine

    monkeypatch.setattr(vllm_settings.importlib.util, "find_spec", lambda _: None)
    for engine in ("vllm", "vllm_server"):
        with pytest.raises(InputError, match=r"make setup VLLM=cuda"):
            open_engine(check(RolloutParams, {"engine": engine}, ""), tiny_model)


def test_flags_are_those_of_the_command_line() -> None:
    arguments = {"max_num_seqs": 8, "enforce_eager": True, "enable_chunked_prefill": False}
    assert flags_of({**arguments, "weight_transfer_config": {"backend": "nccl"}}) == [
        *("--max-num-seqs", "8", "--enforce-eager", "--no-enable-chunked-prefill"),
        "--weight-transfer-config.backend=nccl",
    ]
