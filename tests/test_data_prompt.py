"""Prompts: what text a problem becomes and which ids that text becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from entrograd.data.params import Example, PromptFormat
from entrograd.data.prompt import encode, render
from entrograd.errors import InputError
from entrograd.models.load import load_tokenizer

SUMS = PromptFormat(
    style="few_shot",
    template="{problem} = {answer}\n",
    examples=[Example(problem="1 + 2", answer="3"), Example(problem="9 - 4", answer="5")],
)


def test_few_shot_is_the_template_per_example_then_cut_before_the_answer() -> None:
    assert render("7 + 5", SUMS) == {
        "messages": None,
        "prompt_text": "1 + 2 = 3\n9 - 4 = 5\n7 + 5 = ",
    }


def test_chat_is_a_system_and_a_user_message() -> None:
    fmt = PromptFormat(system="Be brief.", template="Solve: {problem}")
    assert render("7 + 5", fmt) == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Solve: 7 + 5"},
        ],
        "prompt_text": None,
    }
    assert render("x", PromptFormat())["messages"] == [{"role": "user", "content": "x"}]


def test_braces_in_a_problem_are_text() -> None:
    problem = "\\frac{1}{2} {answer} {problem} {} {0}"
    assert render(problem, PromptFormat())["messages"] == [{"role": "user", "content": problem}]
    text = render(problem, SUMS)["prompt_text"]
    assert text is not None
    assert text.endswith(f"\n{problem} = ")


def test_answer_before_problem_is_an_error() -> None:
    fmt = PromptFormat(style="few_shot", template="{answer} <- {problem}\n")
    with pytest.raises(InputError, match=r"put \{problem\} first"):
        render("1", fmt)


def test_raw_text_ids(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    row = {"prompt_id": "p", "prompt_text": "7 + 5 = ", "messages": None}
    ids = encode(row, tokenizer)
    assert len(ids) == len("7 + 5 = ")  # one token per character
    assert tokenizer.decode(ids) == "7 + 5 = "


def test_messages_go_through_the_chat_template(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    row = {"prompt_id": "p", "messages": [{"role": "user", "content": "hi"}], "prompt_text": None}
    assert tokenizer.decode(encode(row, tokenizer)) == "user: hi\nassistant: "


def test_bos_is_added_to_raw_text_and_never_twice_to_chat(tiny_model: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tiny_model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    raw = encode({"prompt_id": "p", "prompt_text": "a"}, tokenizer)
    chat = encode({"prompt_id": "p", "messages": [{"role": "user", "content": "a"}]}, tokenizer)
    assert raw[0] == 1
    assert len(raw) == 2
    assert 1 not in chat


@pytest.mark.parametrize(
    "row",
    [
        {"prompt_text": ""},
        {"prompt_text": " \n"},
        {"messages": []},
    ],
)
def test_an_empty_prompt_is_named(row: dict[str, object], tiny_model: Path) -> None:
    with pytest.raises(InputError, match="prompt abc is empty"):
        encode({"prompt_id": "abc", **row}, load_tokenizer(tiny_model))


def test_neither_or_both_columns_set_is_an_error(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    both = {"prompt_id": "abc", "prompt_text": "a", "messages": [{"role": "user", "content": "a"}]}
    for row in ({"prompt_id": "abc"}, both):
        with pytest.raises(InputError, match="prompt abc: set exactly one"):
            encode(row, tokenizer)


def test_a_template_that_refuses_the_messages_is_named(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    row = {"prompt_id": "abc", "messages": [{"role": "system", "content": "x"}]}
    with pytest.raises(InputError, match=r"prompt abc: .*refuses.*no system role"):
        encode(row, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"prompt abc .*no chat template.*few_shot"):
        encode(row, tokenizer)
