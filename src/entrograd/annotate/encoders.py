"""Models that compare texts: sentence embeddings, and judges of entailment. Any of the Hugging
Face layout, loaded from safetensors in float32; no code that comes with a model is run."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from entrograd.annotate.params import EmbeddingClusters, EntailmentClusters
from entrograd.errors import InputError
from entrograd.models.load import resolve_device
from entrograd.models.resolve import fetch
from entrograd.storage.files import read_json

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("entrograd")

# N texts -> [N, D] of unit length.
Embed = Callable[[Sequence[str]], np.ndarray]
# (premise, hypothesis) pairs -> how much each premise says its hypothesis: entailment 1,
# neutral 0.5, contradiction 0.
Judge = Callable[[Sequence[tuple[str, str]]], Sequence[float]]

TOKENS = 8192  # of one forward pass, padding included
SAYS = {"entailment": 1.0, "neutral": 0.5, "contradiction": 0.0}


def load_embedder(params: EmbeddingClusters, device: str) -> Embed:
    """The sentence-embedding model `params.model`: texts -> [N, D] float32 of unit length.

    Pooling and longest text are those of its sentence-transformers files, where it has them, else
    the mean over tokens and the model's own length; what is longer is cut. InputError where it
    cannot be had, or pools or transforms in another way.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = fetch(params.model, params.sha256, Path(scratch), "annotate.clusters.model")
        pooling, longest = _sentence_files(folder, params.model)
        model, tokenizer = _load(AutoModel, folder, params.model, device)
    longest = min(longest, _context(model, tokenizer))

    def embed(texts: Sequence[str]) -> np.ndarray:
        result = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
        cut = 0
        for rows, encoded in _batches(tokenizer, [(text,) for text in texts], longest):
            cut += int((encoded["attention_mask"].sum(-1) == longest).sum())
            with torch.inference_mode():
                states = model(**encoded.to(model.device)).last_hidden_state
            pooled = _pool(states, encoded["attention_mask"], pooling)
            result[rows] = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
        if cut:
            log.warning("%d of %d texts reach the %d tokens %s reads; what is longer is cut", cut,
                        len(texts), longest, params.model)  # fmt: skip
        return result

    return embed


def load_judge(params: EntailmentClusters, device: str) -> Judge:
    """The sequence-classification model `params.model`, trained on natural language inference:
    (premise, hypothesis) pairs -> 1 entailment, 0.5 neutral, 0 contradiction, by its likeliest
    label. InputError where it cannot be had or does not name a label `entailment`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = fetch(params.model, params.sha256, Path(scratch), "annotate.clusters.model")
        model, tokenizer = _load(AutoModelForSequenceClassification, folder, params.model, device)
    names = cast("dict[int, str]", model.config.id2label)  # its config's reader makes them ints
    labels = [str(names[i]).lower() for i in range(len(names))]
    if "entailment" not in labels:
        raise InputError(
            f"{params.model}: its labels are {', '.join(labels)}; a judge of entailment names one "
            "`entailment` (id2label in its config.json)"
        )
    says = np.array([SAYS.get(label, 0.0) for label in labels])
    longest = _context(model, tokenizer)

    def judge(pairs: Sequence[tuple[str, str]]) -> Sequence[float]:
        result = np.zeros(len(pairs))
        cut = 0
        for rows, encoded in _batches(tokenizer, pairs, longest):
            cut += int((encoded["attention_mask"].sum(-1) == longest).sum())
            with torch.inference_mode():
                logits = model(**encoded.to(model.device)).logits
            result[rows] = says[logits.argmax(-1).cpu().numpy()]
        if cut:
            log.warning("%d of %d pairs reach the %d tokens %s reads; what is longer is cut", cut,
                        len(pairs), longest, params.model)  # fmt: skip
        return [float(value) for value in result]

    return judge


def _load(
    kind: type[AutoModel | AutoModelForSequenceClassification],
    folder: Path,
    reference: str,
    device: str,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, said = kind.from_pretrained(
            str(folder),
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise InputError(f"{reference}: cannot be read as {kind.__name__}: {error}") from error
    # A pooler that no weights were given for is not used; a classifier's head is.
    absent = sorted(name for name in said["missing_keys"] if not name.startswith("pooler."))
    if absent:
        raise InputError(
            f"{reference}: has no weights for {', '.join(absent[:3])}: it is another kind of model"
        )
    return model.to(resolve_device(device)).eval(), tokenizer


def _context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens one text may have, as the stricter of the two says."""
    return min(int(model.config.max_position_embeddings), int(tokenizer.model_max_length))


def _batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]], longest: int
) -> Iterator[tuple[list[int], BatchEncoding]]:
    """Rows of similar length and their padded tokens, at most TOKENS of them a batch."""
    if not texts:
        return
    columns = [list(column) for column in zip(*texts, strict=True)]
    ids = tokenizer(*columns, truncation=True, max_length=longest)
    lengths = [len(row) for row in ids["input_ids"]]
    batch: list[int] = []
    for row in sorted(range(len(texts)), key=lambda row: (lengths[row], row)):
        if batch and (len(batch) + 1) * lengths[row] > TOKENS:
            yield batch, _padded(tokenizer, ids, batch)
            batch = []
        batch.append(row)
    yield batch, _padded(tokenizer, ids, batch)


def _padded(
    tokenizer: PreTrainedTokenizerBase, ids: BatchEncoding, rows: Sequence[int]
) -> BatchEncoding:
    chosen = {name: [values[row] for row in rows] for name, values in ids.items()}
    return tokenizer.pad(chosen, return_tensors="pt")


def _pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """[B, D] from [B, T, D]: the first token's state, or the mean over real tokens."""
    if pooling == "cls":
        return states[:, 0]
    weight = mask.to(states.dtype)[..., None]
    return (states * weight).sum(1) / weight.sum(1)


def _sentence_files(folder: Path, reference: str) -> tuple[str, int]:
    """(pooling, longest text in tokens) of a model in the sentence-transformers layout."""
    modules = read_json(folder / "modules.json") if (folder / "modules.json").exists() else []
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise InputError(
            f"{reference}: has a module {', '.join(sorted(unknown))}; supported are sentence "
            "models of Transformer, Pooling and Normalize"
        )
    pooling, longest = "mean", 1 << 30
    for module in modules:
        if module["type"].endswith(".Pooling"):
            settings = read_json(folder / module["path"] / "config.json")
            chosen = [key for key, value in settings.items() if value is True and "_mode_" in key]
            known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
            if len(chosen) != 1 or chosen[0] not in known:
                raise InputError(
                    f"{reference}: pools by {' and '.join(chosen) or 'nothing'}; supported are "
                    "the mean over tokens and the first token"
                )
            pooling = known[chosen[0]]
    limit = folder / "sentence_bert_config.json"
    if limit.exists():
        longest = read_json(limit).get("max_seq_length") or longest
    return pooling, int(longest)
