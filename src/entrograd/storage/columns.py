"""Every column of every table, once: schemas, batches, finite checks, the keys of a group file and
docs/columns.md come from here. A new column is a line here and whoever writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """One column.

    per: what has one value of it; a `token` column is a list with one value per completion token.
    type: of a value, of one token's value where `per` is token.
    writer: the stage that writes it, or `user`: no stage does.
    unit: of a number.
    optional: may be null, or absent in a table made elsewhere.
    batch: the field of `Batch` that holds it, and its key in a group file of `entrograd explain`.
    low, high: what a finite value may be at least and at most; for numbers with a `batch` field.
    """

    name: str
    per: Literal["prompt", "completion", "token", "row"]
    type: pa.DataType
    meaning: str
    writer: str = ""
    unit: str = ""
    optional: bool = False
    batch: str | None = None
    low: float | None = None
    high: float | None = None

    @property
    def field(self) -> pa.Field:
        """The column in an Arrow schema."""
        kind = pa.list_(self.type) if self.per == "token" else self.type
        return pa.field(self.name, kind, nullable=self.optional)


_TEXT, _INT, _LONG, _FLOAT = pa.string(), pa.int32(), pa.int64(), pa.float32()
_MESSAGES = pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))
_HEADS = pa.list_(pa.struct([("name", _TEXT), ("value", _FLOAT)]))

PROMPTS = (
    Column("prompt_id", "prompt", _TEXT, "hash of problem and answers", "prepare"),
    Column("source", "prompt", _TEXT, "where the problem comes from", "prepare"),
    Column("split", "prompt", _TEXT, "train or heldout", "prepare"),
    Column("problem", "prompt", _TEXT, "the problem's text", "prepare"),
    Column("answers", "prompt", pa.list_(_TEXT), "answers that count as correct", "prepare"),
    Column("level", "prompt", _TEXT, "difficulty, as the source has it", "prepare", optional=True),
    Column(
        "messages", "prompt", _MESSAGES, "the prompt as a chat, or null", "prepare", optional=True
    ),
    Column(
        "prompt_text", "prompt", _TEXT, "the prompt as raw text, or null", "prepare", optional=True
    ),
)

REJECTS = (
    Column("source", "row", _TEXT, "file or data set", "prepare"),
    Column("row", "row", _LONG, "number of the row in its source, from 1", "prepare"),
    Column("reason", "row", _TEXT, "why it was rejected", "prepare"),
    Column("content", "row", _TEXT, "its text", "prepare", optional=True),
    Column("line", "row", _LONG, "line of a text file it begins on", "prepare", optional=True),
)

ROLLOUTS = (
    Column("prompt_id", "prompt", _TEXT, "the prompt; rows of one prompt are a group", "rollout"),
    Column("sample_index", "completion", _INT, "number within the group, from 0", "rollout"),
    Column("prompt_ids", "prompt", pa.list_(_INT), "tokens of the prompt", "rollout"),
    Column("completion_ids", "token", _INT, "tokens, the end token included", "rollout"),
    Column("completion_text", "completion", _TEXT, "text before the stop string", "rollout"),
    Column(
        "sampling_logprobs",
        "token",
        _FLOAT,
        "log-probability as the engine reported it",
        "rollout",
        "nats",
        optional=True,
        batch="sampling_logprobs",
        high=0.0,
    ),
    Column("finish_reason", "completion", _TEXT, "stop or length", "rollout"),
    Column("seed", "completion", _LONG, "of the draw", "rollout"),
    Column("policy_version", "completion", _TEXT, "hash of the weights that sampled", "rollout"),
)

ANNOTATED = (
    *ROLLOUTS,
    Column("answer", "completion", _TEXT, "extracted final answer", "annotate", optional=True),
    Column("extraction_rule", "completion", _TEXT, "rule that found it", "annotate", optional=True),
    Column("reward", "completion", _FLOAT, "as graded", "annotate", batch="rewards"),
    Column(
        "reward_status",
        "completion",
        _TEXT,
        "ok, no_answer, timeout, truncated or error",
        "annotate",
    ),
    Column(
        "reward_heads",
        "completion",
        _HEADS,
        "further ratings by name, each in [0, 1]",
        "annotate",
        optional=True,
        batch="reward_heads",
        low=0.0,
        high=1.0,
    ),
    Column(
        "old_logprobs",
        "token",
        _FLOAT,
        "log-probability under the sampling policy, by the trainer's forward pass",
        "annotate",
        "nats",
        batch="old_logprobs",
        high=0.0,
    ),
    Column(
        "entropies",
        "token",
        _FLOAT,
        "entropy of the sampling policy",
        "annotate",
        "nats",
        batch="entropies",
        low=0.0,
    ),
    Column(
        "segment_ids",
        "token",
        _INT,
        "segment of each token, from 0",
        "annotate",
        optional=True,
        batch="segment_ids",
        low=0,
    ),
    Column(
        "cluster_id",
        "completion",
        _INT,
        "equal within a group = same answer",
        "annotate",
        batch="cluster_ids",
    ),
    Column(
        "token_scores",
        "token",
        _FLOAT,
        "of a token-level reward model",
        "user",
        optional=True,
        batch="token_scores",
    ),
)

# Not stored: the trainer adds it to the groups of a batch.
REF_LOGPROBS = Column(
    "ref_logprobs",
    "token",
    _FLOAT,
    "log-probability under the reference policy",
    "train_offline, train_online",
    "nats",
    optional=True,
    batch="ref_logprobs",
    high=0.0,
)

_ENTROPY = "semantic entropy of the group, estimator"
GROUPS = (
    Column("prompt_id", "prompt", _TEXT, "the prompt", "annotate"),
    Column("completions", "prompt", _INT, "size of the group", "annotate"),
    Column("mean_reward", "prompt", _FLOAT, "mean of the rewards", "annotate"),
    Column("clusters", "prompt", _INT, "different answers", "annotate"),
    Column("semantic_entropy_rao", "prompt", _FLOAT, f"{_ENTROPY} rao", "annotate", "nats"),
    Column(
        "semantic_entropy_discrete", "prompt", _FLOAT, f"{_ENTROPY} discrete", "annotate", "nats"
    ),
    Column("semantic_entropy_paper", "prompt", _FLOAT, f"{_ENTROPY} paper", "annotate", "nats"),
    Column("mean_token_entropy", "prompt", _FLOAT, "mean over tokens", "annotate", "nats"),
    Column(
        "kernel_language_entropy",
        "prompt",
        _FLOAT,
        "of the graph of answers",
        "annotate",
        "nats",
        optional=True,
    ),
)

SAMPLES = (
    Column("model", "completion", _TEXT, "name of the model", "evaluate"),
    Column("benchmark", "completion", _TEXT, "name of the list of problems", "evaluate"),
    Column("problem_id", "completion", _TEXT, "the problem within the list", "evaluate"),
    Column("sample_index", "completion", _INT, "number of the sample, from 0", "evaluate"),
    Column("problem", "completion", _TEXT, "the problem's text", "evaluate"),
    Column("answers", "completion", pa.list_(_TEXT), "answers that count as correct", "evaluate"),
    Column("completion_text", "completion", _TEXT, "what the model wrote", "evaluate"),
    Column("answer", "completion", _TEXT, "extracted final answer", "evaluate", optional=True),
    Column("extraction_rule", "completion", _TEXT, "rule that found it", "evaluate", optional=True),
    Column("reward", "completion", _FLOAT, "as graded", "evaluate"),
    Column("reward_status", "completion", _TEXT, "as in annotated", "evaluate"),
    Column("finish_reason", "completion", _TEXT, "stop or length", "evaluate"),
)

TABLES = {
    "prompts": PROMPTS,
    "rejects": REJECTS,
    "rollouts": ROLLOUTS,
    "annotated": ANNOTATED,
    "groups": GROUPS,
    "samples": SAMPLES,
}

# The token columns a completion may carry beside its tokens, by name.
TOKEN_COLUMNS = {
    column.name: column
    for column in (*ANNOTATED, REF_LOGPROBS)
    if column.per == "token" and column.name != "completion_ids"
}
# The columns of numbers of a Batch, by its fields; they must be finite.
BATCH_COLUMNS = {
    column.batch: column
    for column in (*ANNOTATED, REF_LOGPROBS)
    if column.batch and column.type in (_FLOAT, _HEADS)
}
