"""vLLM itself, in process and as a server, on a tiny model: `make test-vllm` runs these.

Where vLLM is not installed there is nothing to run: pytest then ends with code 5.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests as http
import torch

from entrograd.errors import InputError
from entrograd.models.forward import score
from entrograd.models.load import load_model, load_tokenizer, policy_version
from entrograd.params import check
from entrograd.rollout.engine import EngineError, Request, Sampled
from entrograd.rollout.params import RolloutParams, Sampling
from entrograd.rollout.sampler import filter_logits
from entrograd.rollout.transformers_engine import TransformersEngine
from entrograd.storage.tables import provenance, read_table, write_table
from helpers.tiny_model import write_tiny_model

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from entrograd.rollout.vllm_engine import InProcessVllm
from entrograd.rollout.vllm_server import VllmServer

pytestmark = pytest.mark.timeout(900)
GAP = 1e-3  # nats; float32 in both


def params(engine: str, **vllm: Any) -> RolloutParams:
    block = {"kv_cache_gib": 0.25, "max_num_seqs": 64, **vllm}
    return check(RolloutParams, {"engine": engine, "dtype": "float32", "vllm": block}, "rollout")


def requests(count: int, samples: int = 2, **more: Any) -> list[Request]:
    return [
        Request(f"p{i}", s, (6, 7, 4, *range(5, 6 + i)), **more)
        for i in range(count)
        for s in range(samples)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's kernels for the CPU begin at heads of 32."""
    return write_tiny_model(tmp_path_factory.mktemp("vllm") / "model", head_dim=32)


@pytest.fixture(scope="module")
def trainer(folder: Path) -> Any:
    """The trainer's model; a test that trains it hands the engine its weights."""
    return load_model(folder, "float32", "cpu")


@pytest.fixture(scope="module")
def engine(folder: Path, trainer: Any) -> Iterator[InProcessVllm]:
    opened = InProcessVllm(params("vllm"), folder, trainer)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def server(folder: Path, trainer: Any, engine: InProcessVllm) -> Iterator[VllmServer]:
    opened = VllmServer(params("vllm_server", concurrency=16), folder, trainer)
    assert opened.policy_version == engine.policy_version
    yield opened
    opened.close()


@pytest.fixture(params=["engine", "server"])
def either(request: pytest.FixtureRequest) -> InProcessVllm | VllmServer:
    chosen: InProcessVllm | VllmServer = request.getfixturevalue(request.param)
    return chosen


def rescored(
    model: Any, asked: list[Request], drawn: list[Sampled], temperature: float
) -> list[np.ndarray]:
    prompts, completions = [r.prompt_ids for r in asked], [c.completion_ids for c in drawn]
    return [values for values, _ in score(model, prompts, completions, temperature, 2048)]


def train(model: Any, seed: int) -> None:
    """Weights move as after an update, every one of them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))


class TestEitherEngine:
    def test_logprobs_are_the_trainers(self, either: Any, trainer: Any) -> None:
        asked = requests(8, 4)
        drawn = either.generate(asked, Sampling(temperature=0.7, max_new_tokens=24), 3)
        assert len({c.completion_ids for c in drawn}) > 24  # samples do differ
        for completion, want in zip(drawn, rescored(trainer, asked, drawn, 0.7), strict=True):
            assert list(completion.sampling_logprobs) == pytest.approx(want, abs=GAP)
            ended = completion.completion_ids[-1] == 1
            assert completion.finish_reason == ("stop" if ended else "length")
            assert ended or len(completion.completion_ids) == 24
            assert 1 not in completion.completion_ids[:-1]

    def test_logprobs_are_of_the_filtered_distribution(self, either: Any, trainer: Any) -> None:
        asked = requests(4, 2)
        sampling = Sampling(temperature=1.3, top_k=12, top_p=0.8, max_new_tokens=5)
        for request, completion in zip(asked, either.generate(asked, sampling, 1), strict=True):
            ids = torch.tensor([[*request.prompt_ids, *completion.completion_ids]])
            with torch.inference_mode():
                logits = trainer(ids).logits[0, len(request.prompt_ids) - 1 : -1] / 1.3
            logprobs = torch.log_softmax(filter_logits(logits, sampling), -1)
            want = logprobs.gather(-1, torch.tensor(completion.completion_ids)[:, None])[:, 0]
            assert list(completion.sampling_logprobs) == pytest.approx(want.tolist(), abs=GAP)

    def test_greedy_and_stop_strings_equal_the_transformers_engine(
        self, either: Any, folder: Path, trainer: Any
    ) -> None:
        reference = TransformersEngine(trainer, load_tokenizer(folder), 4096)
        asked = requests(8, 1)
        greedy = Sampling(temperature=0.0, max_new_tokens=20)
        want = reference.generate(asked, greedy, 0)
        assert either.generate(asked, greedy, 0) == want
        stop = next(c.text[3:5] for c in want if len(c.text) > 6)
        stopping = Sampling(temperature=0.0, max_new_tokens=20, stop=[stop, "never met"])
        drawn = either.generate(asked, stopping, 0)
        assert drawn == reference.generate(asked, stopping, 0)
        assert any(c.finish_reason == "stop" and stop not in c.text for c in drawn)
        late = stopping.model_copy(update={"min_new_tokens": 8})
        drawn = either.generate(asked, late, 0)
        assert all(len(c.completion_ids) >= 8 for c in drawn)
        assert drawn == reference.generate(asked, late, 0)

    def test_order_and_subset_do_not_change_what_is_drawn(self, either: Any) -> None:
        asked, sampling = requests(6, 3), Sampling(max_new_tokens=12)
        whole = [c.completion_ids for c in either.generate(asked, sampling, 5)]
        turned = either.generate(asked[::-1], sampling, 5)
        assert [c.completion_ids for c in turned[::-1]] == whole
        part = either.generate(asked[4:9], sampling, 5)
        assert [c.completion_ids for c in part] == whole[4:9]
        other = either.generate(asked, sampling, 6)
        assert [c.completion_ids for c in other] != whole

    def test_limits(self, either: Any) -> None:
        short = requests(2, 1, max_new_tokens=3)
        drawn = either.generate(short, Sampling(max_new_tokens=9), 0)
        assert all(len(c.completion_ids) <= 3 for c in drawn)
        with pytest.raises(InputError, match=r"prompt long: 250 tokens .* context of 256"):
            either.generate([Request("long", 0, (5,) * 250)], Sampling(max_new_tokens=8), 0)
        with pytest.raises(InputError, match="prompt bare: it has no tokens"):
            either.generate([Request("bare", 0, ())], Sampling(max_new_tokens=8), 0)


class TestInProcess:
    def test_equal_calls_are_equal_to_the_bit(self, engine: InProcessVllm) -> None:
        asked, sampling = requests(12, 4), Sampling(max_new_tokens=30)
        assert engine.generate(asked, sampling, 2) == engine.generate(asked, sampling, 2)

    def test_new_weights_arrive_and_are_proved(
        self, engine: InProcessVllm, trainer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train(trainer, 1)
        asked, sampling = requests(4, 2), Sampling(max_new_tokens=8)
        monkeypatch.setattr(engine, "_reload", lambda: None)  # they get lost on the way
        with pytest.raises(EngineError, match="does not have the weights"):
            engine.update_weights(trainer)
        monkeypatch.undo()
        engine.update_weights(trainer)
        assert engine.policy_version == policy_version(trainer)
        drawn = engine.generate(asked, sampling, 3)
        for completion, want in zip(drawn, rescored(trainer, asked, drawn, 1.0), strict=True):
            assert list(completion.sampling_logprobs) == pytest.approx(want, abs=GAP)

    def test_a_crash_mid_batch_is_survived(
        self, engine: InProcessVllm, trainer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The engine is started again with the weights it was given last, not the first ones."""
        train(trainer, 2)
        engine.update_weights(trainer)
        asked, sampling = requests(8, 8), Sampling(max_new_tokens=120, min_new_tokens=120)
        want = engine.generate(asked, sampling, 4)
        (core,) = [p for p in multiprocessing.active_children() if "EngineCore" in p.name]
        assert core.pid
        pid, real = core.pid, engine._llm.wait_for_completion

        def killed(**arguments: Any) -> Any:
            time.sleep(0.05)  # the first of 120 tokens are drawn
            os.kill(pid, signal.SIGKILL)
            return real(**arguments)

        monkeypatch.setattr(engine._llm, "wait_for_completion", killed)
        assert engine.generate(asked, sampling, 4) == want
        (again,) = [p for p in multiprocessing.active_children() if "EngineCore" in p.name]
        assert again.pid != pid
        assert engine.policy_version == policy_version(trainer)


class TestServer:
    def test_draws_what_the_engine_in_process_draws(
        self, engine: InProcessVllm, server: VllmServer, trainer: Any
    ) -> None:
        engine.update_weights(trainer)
        server.update_weights(trainer)
        asked, sampling = requests(6, 4), Sampling(max_new_tokens=16)
        ours, theirs = engine.generate(asked, sampling, 9), server.generate(asked, sampling, 9)
        assert [c.completion_ids for c in ours] == [c.completion_ids for c in theirs]

    def test_a_server_killed_mid_batch(self, server: VllmServer, trainer: Any) -> None:
        """What had come back is kept, the rest is drawn by its successor from the same weights."""
        train(trainer, 3)
        server.update_weights(trainer)
        asked, sampling = requests(6, 8), Sampling(max_new_tokens=40)
        want = server.generate(asked, sampling, 7)
        assert server._child
        before = server._child._process.pid

        class KillAtTen:
            done = 0

            def advance(self, count: int = 1, _: str = "") -> None:
                self.done += count
                if self.done == 10:
                    os.killpg(before, signal.SIGKILL)

        progress: Any = KillAtTen()
        drawn = server.generate(asked, sampling, 7, progress)
        assert progress.done == len(asked)
        assert [c.completion_ids for c in drawn] == [c.completion_ids for c in want]
        assert server._child._process.pid != before
        for completion, again in zip(drawn, rescored(trainer, asked, drawn, 1.0), strict=True):
            assert list(completion.sampling_logprobs) == pytest.approx(again, abs=GAP)

    def test_a_server_of_somebody_elses(
        self, server: VllmServer, folder: Path, trainer: Any
    ) -> None:
        """Reached by its address; where its weights were changed meanwhile, ours come back."""
        theirs = VllmServer(params("vllm_server", url=server._url), folder, trainer)
        train(trainer, 4)
        theirs.update_weights(trainer)
        info = http.get(f"{server._url}/weight_info", timeout=30).json()
        assert info == {"weight_version": policy_version(trainer)}
        http.post(
            f"{server._url}/update_weight_version", json={"new_version": "other"}, timeout=30
        ).raise_for_status()
        asked = requests(4, 2)
        drawn = theirs.generate(asked, Sampling(max_new_tokens=6), 0)
        for completion, want in zip(drawn, rescored(trainer, asked, drawn, 1.0), strict=True):
            assert list(completion.sampling_logprobs) == pytest.approx(want, abs=GAP)
        theirs.close()
        assert server._child
        assert server._child.alive()
        server.update_weights(trainer)


@pytest.mark.parametrize(
    ("engine", "overlap"), [("vllm", False), ("vllm", True), ("vllm_server", True)]
)
def test_online_steps_sample_from_the_weights_just_trained(
    engine: str, overlap: bool, folder: Path, tmp_path: Path
) -> None:
    """Stage train_online on vLLM: each round's completions come from the weights of the update
    before it or, overlapped, from those before that update."""
    from entrograd.train.online import train_online
    from helpers.training import pipeline_params

    rows = [
        {
            "prompt_id": f"id{i}",
            "source": "s",
            "split": "train",
            "problem": f"{i}",
            "answers": [str(digit) for digit in range(10)],  # a random model hits some
            "prompt_text": f"{i} = ",
        }
        for i in range(8)
    ]
    write_table(tmp_path / "prompts.parquet", rows, "prompts")
    chosen = pipeline_params(
        rollout={
            "engine": engine,
            "vllm": {"kv_cache_gib": 0.25},
            "group_size": 16,
            "sampling": {"max_new_tokens": 1},
        },
        train_online={
            "rounds": 3,
            "prompts_per_round": 8,
            "optimizer": {"lr": 0.01},
            "prefetch": overlap,
        },
        method={
            "name": "grpo",
            "grpo": {"importance_sampling": "truncated" if overlap else "none"},
        },
    )
    (tmp_path / "work").mkdir()
    out, rounds, curve = tmp_path / "out", tmp_path / "rounds", tmp_path / "curve.csv"
    train_online(
        chosen, folder, tmp_path / "prompts.parquet", out, rounds, curve, tmp_path / "work"
    )
    drawn = read_table(rounds, "annotated").to_pylist()
    versions = [row["policy_version"] for row in drawn]
    assert versions[0] == policy_version(load_model(folder, "float32", "cpu"))
    assert len(set(versions)) == (2 if overlap else 3)
    gaps = [abs(row["sampling_logprobs"][0] - row["old_logprobs"][0]) for row in drawn]
    assert max(gaps[: 8 * 16]) < GAP
    assert (max(gaps[8 * 16 :]) < GAP) != overlap
    assert provenance(rounds)["engine"] == engine


@pytest.mark.parametrize("engine", [InProcessVllm, VllmServer])
def test_too_little_memory_is_an_error_that_names_the_setting(engine: Any, folder: Path) -> None:
    name = "vllm" if engine is InProcessVllm else "vllm_server"
    with pytest.raises(EngineError, match=r"does not start: .*rollout\.vllm\.kv_cache_gib"):
        engine(params(name, kv_cache_gib=1e-5), folder, None)


HOLD = """
import sys
import time
from pathlib import Path

from entrograd.params import check
from entrograd.rollout.params import RolloutParams
from entrograd.rollout.engines import open_engine

if __name__ == "__main__":
    block = {"engine": sys.argv[1], "dtype": "float32", "vllm": {"kv_cache_gib": 0.25}}
    engine = open_engine(check(RolloutParams, block, ""), Path(sys.argv[2]))
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_nothing_outlives_a_killed_process(engine: str, folder: Path, tmp_path: Path) -> None:
    """SIGKILL gives nobody a chance to clean up: vLLM's processes see it themselves."""
    (tmp_path / "hold.py").write_text(HOLD)
    words = [sys.executable, str(tmp_path / "hold.py"), engine, str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        started = descendants(process.pid)
        assert len(started) >= 2  # its engine and a worker at least
        process.kill()
    deadline = time.monotonic() + 60
    while left := [pid for pid in started if runs(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def descendants(pid: int) -> list[int]:
    """The processes below one, as Linux lists them."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
