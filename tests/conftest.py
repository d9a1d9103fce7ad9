"""Fixtures every test may use: a tiny random language model with a character tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
)
# Two files run beside each other: threads of one would only wait for those of the other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from pydantic import create_model

from entrograd.params import Section
from entrograd.pipeline.sections import Params

ROOT = Path(__file__).parent.parent
SHIPPED = Path(__file__).parent / "params.yaml"  # valid parameters; those in ROOT are the user's
CHARACTERS = "\n 0123456789+-*/=().,:?!abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\\{}$_^"
SPECIAL = ["<pad>", "<eos>", "<unk>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_tiny_model(
    path: Path,
    seed: int = 0,
    characters: str = CHARACTERS,
    head_dim: int = 8,
    tied: bool = True,
) -> Path:
    """A two-layer Llama of random weights over single characters, in the Hugging Face layout."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def write_prompts(path: Path, count: int) -> None:
    """A table of `count` training prompts `0 = `, `1 = `, ... that any digit answers: a random
    model hits some."""
    from entrograd.storage.tables import write_table

    rows = [
        {
            "prompt_id": f"id{i}",
            "source": "s",
            "split": "train",
            "problem": f"{i}",
            "answers": list("0123456789"),
            "prompt_text": f"{i} = ",
        }
        for i in range(count)
    ]
    write_table(path, rows, "prompts")


def online_hashes(params: Any, model: Path, folder: Path, name: str) -> list[str]:
    """Train online on `folder`/prompts.parquet, resuming what a run of this name left; the hashes
    of weights, rounds and curve."""
    from entrograd.storage.hashing import sha256
    from entrograd.train.online import train_online

    (folder / f"work-{name}").mkdir(exist_ok=True)
    train_online(
        params,
        model,
        folder / "prompts.parquet",
        folder / name,
        folder / f"rounds-{name}",
        folder / f"{name}.csv",
        folder / f"work-{name}",
    )
    return [sha256(folder / part) for part in (name, f"rounds-{name}", f"{name}.csv")]


def only(*sections: str) -> type[Section]:
    """The model of these sections alone, as a stage that reads them has one."""
    fields: Any = {name: (Params.model_fields[name].annotation, ...) for name in sections}
    return create_model("Only", __base__=Section, **fields)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest goes first: nobody waits for it alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model; read only."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout. Where CI is set it must be there."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{folder} is absent; tests on real data need it")
        pytest.skip(f"{folder} is absent")
    return folder
