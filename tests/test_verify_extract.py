"""Extraction of final answers: every rule, their order, and strings meant to break them."""

from __future__ import annotations

import pytest

from entrograd.rewards.verify.extract import MAX_ANSWER, extract, trim


@pytest.mark.parametrize(
    ("text", "answer", "rule"),
    [
        (r"First \boxed{3}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}", "boxed"),
        (r"\boxed{\boxed{5}}", "5", "boxed"),
        (r"\boxed{7} fills the form \boxed{}", "7", "boxed"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
        (r"} } { \boxed{8} and answer is 9", "8", "boxed"),
        (r"so the answer is $\frac{3}{4}$.", r"\frac{3}{4}", "anchor"),
        ("The answer is 3. No, the answer is 1,234.", "1,234", "anchor"),
        ("**Answer:** 5 apples, because 6 is too many", "5", "anchor"),
        ("The answer is therefore 15 dollars.", "15", "anchor"),
        ("Answer: 5 + 3 = 8", "5 + 3 = 8", "anchor"),
        ("the answer is:\n\\[ x = 5 \\]\nbecause of 3", "x = 5", "anchor"),
        ("The answer is (B) 5 apples", "B", "anchor"),
        ("The answer is Paris. It has 2 airports.", "Paris", "anchor"),
        ("6 + 6 = 12\n#### 12", "12", "anchor"),
        ("12\n", "12", "leading"),
        (" 12", "12", "leading"),
        ("12\n7 + 5 =", "12", "leading"),
        ("12.\n7 + 5 = 12", "12", "leading"),
        ("-3\n\n4 + 4 =", "-3", "leading"),
        ("7 + 5 = 12", "12", "last"),
        ("from 12 - 5", "5", "last"),
        ("it is -5", "-5", "last"),
        (r"a chance of $\frac{3}{4}$ in all", r"\frac{3}{4}", "last"),
        ("costs $5 and then $6", "$6", "last"),
        (r"unclosed \boxed{\frac{1}{2}", r"\frac{1}{2}", "last"),
        ("True", "True", "line"),
    ],
)
def test_rule_and_answer(text: str, answer: str, rule: str) -> None:
    assert extract(text) == (answer, rule)


@pytest.mark.parametrize("text", ["", "\n \n", "\x00\u202e", "...", "I do not\nknow."])
def test_no_answer(text: str) -> None:
    assert extract(text) is None


def test_rules_can_be_chosen() -> None:
    assert extract("12\nThe answer is 13") == ("13", "anchor")
    assert extract("12\nThe answer is 13", ["leading"]) == ("12", "leading")
    assert extract("The answer is 13", ["boxed"]) is None


def test_an_answer_of_absurd_length_is_none() -> None:
    assert extract("\\boxed{" + "x" * (MAX_ANSWER + 1) + "}", ["boxed"]) is None


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * (MEGABYTE // 7),
        "\\boxed{" * (MEGABYTE // 14) + "}" * (MEGABYTE // 14),
        "{" * MEGABYTE,
        "\\boxed" + " " * MEGABYTE,
        "answer is " * (MEGABYTE // 10),
        "answer" + " " * MEGABYTE,
        "$" * MEGABYTE,
        "\\(" * (MEGABYTE // 2),
        "9" * MEGABYTE,
        "1," * (MEGABYTE // 2),
        "-" * MEGABYTE + "1",
        "####" * (MEGABYTE // 4),
        "\x00\u202e" * (MEGABYTE // 2),
    ],
)
def test_megabytes_are_linear(text: str) -> None:
    found = extract(text)  # the suite's time limit is the assertion on time
    assert found is None or len(found.answer) <= MAX_ANSWER


def test_trim_drops_invisible_ends_only() -> None:
    assert trim("\u202e\x00 1\u202e2 \ufeff") == "1\u202e2"
