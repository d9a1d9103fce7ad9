"""What every generation engine offers. Two engines behind one protocol give the same table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from entrograd.errors import InputError
from entrograd.pipeline.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from entrograd.data.prompt import Tokenizer
    from entrograd.rollout.params import Sampling


class EngineError(RuntimeError):
    """The engine cannot answer, and its own retries are used up: out of memory, dead, unreachable.
    Nothing of the call is kept; the message says what to change."""


@dataclass(frozen=True)
class Request:
    """One completion to draw. The noise is a function of (seed, prompt_id, sample_index, position)
    alone: batch, order and shard never change what is drawn."""

    prompt_id: str
    sample_index: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int | None = None  # of this request, where less than the sampling's


@dataclass(frozen=True)
class Sampled:
    """What an engine gives for a request: tokens (the end-of-sequence token or the tokens of a
    stop string included), their logprobs under the distribution really sampled from, and why it
    ended."""

    completion_ids: tuple[int, ...]
    text: str
    sampling_logprobs: tuple[float, ...]
    finish_reason: str  # stop | length


class Engine(Protocol):
    """A language model that draws completions and can be given new weights."""

    @property
    def policy_version(self) -> str:
        """`models.load.policy_version` of the weights it samples from."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> list[Sampled]:
        """One completion per request, in order; all or an error.

        Raises:
            InputError: a prompt without tokens or too long for the model, by its prompt_id.
            EngineError: the engine failed for good.
        """

    def update_weights(self, model: PreTrainedModel) -> None:
        """Take the weights of `model` (the trainer's, of transformers): what is sampled from now
        on. An engine that is restarted after a crash starts with the weights it was given last."""

    def close(self) -> None:
        """End what it holds (processes, GPU memory); a closed engine is closed once more in vain.
        `contextlib.closing` calls it."""


def check_requests(requests: Sequence[Request], sampling: Sampling, context: int) -> None:
    """InputError names the prompt that has no tokens or leaves the context too little room."""
    for request in requests:
        if not request.prompt_ids:
            raise InputError(f"prompt {request.prompt_id}: it has no tokens; give it a text")
        new = max_new_tokens(request, sampling)
        if len(request.prompt_ids) + new > context:
            raise InputError(
                f"prompt {request.prompt_id}: {len(request.prompt_ids)} tokens and {new} new ones "
                f"exceed the model's context of {context}; shorten the prompt or lower "
                "max_new_tokens"
            )


def max_new_tokens(request: Request, sampling: Sampling) -> int:
    """How many tokens a request's completion may have."""
    return min(request.max_new_tokens or sampling.max_new_tokens, sampling.max_new_tokens)


def cut_at_stop(text: str, stop: Sequence[str], after: int = 0) -> str | None:
    """`text` before the first stop string that ends beyond its first `after` characters (those of
    the first min_new_tokens tokens), None where there is none."""
    places = (text.find(end, max(0, after + 1 - len(end))) for end in stop)
    return text[:first] if (first := min((p for p in places if p >= 0), default=-1)) >= 0 else None


def finish(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str,
    sampling: Sampling,
) -> Sampled:
    """The completion of these tokens: its text ends before the stop string."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    first = len(tokenizer.decode(ids[: sampling.min_new_tokens], skip_special_tokens=True))
    cut = cut_at_stop(text, sampling.stop, first)
    return Sampled(
        completion_ids=tuple(ids),
        text=text if cut is None else cut,
        sampling_logprobs=tuple(logprobs),
        finish_reason=finish_reason,
    )
