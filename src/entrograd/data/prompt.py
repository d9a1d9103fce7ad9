"""From a problem to what a model continues: text of the prompts table, then token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict

from jinja2 import TemplateError

from entrograd.data.params import PromptFormat
from entrograd.errors import InputError

Messages = list[dict[str, str]]


class Rendered(TypedDict):
    """A problem as text or as a chat; the other is None."""

    messages: Messages | None
    prompt_text: str | None


class PromptRow(Rendered):
    """A row of the prompts table."""

    prompt_id: str
    source: str
    split: str
    problem: str
    answers: list[str]
    level: str | None


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    eos_token_id: int | None
    chat_template: str | None

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""

    def decode(self, ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str:
        """The text of tokens."""

    def apply_chat_template(
        self,
        messages: Messages,
        /,
        *,
        add_generation_prompt: bool,
        tokenize: bool,
        return_dict: bool,
    ) -> list[int]:
        """The tokens of a chat."""


_SLOT = re.compile(r"\{(problem|answer)\}")


def render(problem: str, fmt: PromptFormat) -> Rendered:
    """A problem as the columns `messages` and `prompt_text` of the prompts table.

    Style few_shot gives text: the template once per example, with its answer, then once for the
    problem, cut before `{answer}`. Style chat gives messages: the system's, if there is one,
    and the user's. The other column is None. Braces in a problem are text, never slots.

    Raises InputError if a few_shot template has `{answer}` before `{problem}`.
    """
    if fmt.style == "chat":
        system = [] if fmt.system is None else [{"role": "system", "content": fmt.system}]
        user = {"role": "user", "content": _fill(fmt.template, problem)}
        return {"messages": [*system, user], "prompt_text": None}
    opening = fmt.template[: fmt.template.index("{answer}")]
    if "{problem}" not in opening:
        raise InputError(
            f"prompt.template {fmt.template!r}: {{answer}} stands before {{problem}}, so the "
            "prompt would hold no problem; put {problem} first"
        )
    shots = [_fill(fmt.template, shot.problem, shot.answer) for shot in fmt.examples]
    return {"messages": None, "prompt_text": "".join([*shots, _fill(opening, problem)])}


def encode(row: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The prompt ids of a row of the prompts table.

    `prompt_text` is tokenised as raw text, with the special tokens its tokenizer begins a text
    with; `messages` go through the tokenizer's chat template, opened for the assistant's turn.

    Raises InputError naming the prompt if it is empty, if the tokenizer has no chat template
    or if the template refuses the messages.
    """
    name, text, messages = row.get("prompt_id", "?"), row.get("prompt_text"), row.get("messages")
    if (text is None) == (messages is None):
        raise InputError(f"prompt {name}: set exactly one of messages and prompt_text")
    if text is not None:
        ids = tokenizer.encode(text) if text.strip() else []
    else:
        ids = _encode_messages(name, messages, tokenizer) if messages else []
    if not ids:
        raise InputError(f"prompt {name} is empty; remove it or give it text")
    return [int(token) for token in ids]


def _encode_messages(name: str, messages: Messages, tokenizer: Tokenizer) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"prompt {name} has messages, but the tokenizer has no chat template; "
            "use a model with one or prompt.style few_shot"
        )
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise InputError(
            f"prompt {name}: the tokenizer's chat template refuses its messages: {error}"
        ) from None


def _fill(template: str, problem: str, answer: str = "") -> str:
    values = {"problem": problem, "answer": answer}
    return _SLOT.sub(lambda slot: values[slot[1]], template)
