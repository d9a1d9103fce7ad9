"""Every number of the mathematics, worked by `entrograd explain` from the files in docs/examples.

A row: method, file, settings, where the value stands in the answer, the value.
"""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from entrograd.cli.main import main

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"

# Eq. 6 over three populations, and the shaped rewards they are taken from
SHAPED = [[1.08, 1.16, 1.10], [1.12, 1.04], [-1.022222, -1.177778, -1.1], [-1.177778, -1.022222]]
OWN = [[-0.5, 1.5, 0], [0.5, -1.5], [1.11803, -1.11803, 0], [-1.11803, 1.11803]]
WITH_ZEROS = [
    [0.96236, 1.10763, 0.99868],
    [1.03500, 0.88973],
    [-0.85517, -1.13688, -0.99602],
    [-1.13688, -0.85517],
]
JOINT = [
    [0.98051, 1.05315, 0.99867],
    [1.01683, 0.94420],
    [-0.92806, -1.06929, -0.99867],
    [-1.06929, -0.92806],
]
COUNTS, PAPER = "estimator=discrete", "estimator=paper"
SE = "diagnostics semantic_entropy"
ASR = "source=reward_model segmentation=token"
RATED = "entropies={'format':0,'brevity':0.693147,'reasoning':1.609438}".replace("'", '"')

NUMBERS: list[tuple[str, str, str, str, Any]] = [
    # SEED-GRPO: ids (0,1,2,1); five answers and one; eight distinct
    (
        "seed_grpo",
        "semantic_entropy_counts",
        COUNTS,
        SE,
        1.0397208,
    ),
    (
        "seed_grpo",
        "semantic_entropy_six",
        COUNTS,
        SE,
        0.4505612,
    ),
    (
        "seed_grpo",
        "semantic_entropy_eight",
        COUNTS,
        SE,
        2.0794415,
    ),
    (
        "seed_grpo",
        "group_of_four",
        "",
        "working seed_grpo cluster_mass",
        [0.5498340, 0.5498340, 0.2363278, 0.2138382],
    ),
    ("seed_grpo", "group_of_four", "", SE, 0.9996414),
    ("seed_grpo", "group_of_four", PAPER, SE, 1.1944033),
    ("seed_grpo", "group_of_four", "", "diagnostics weighting_mean", 0.9708084),
    ("seed_grpo", "group_of_four", "", "advantages", [[0.4854042]] * 2 + [[-0.4854042]] * 2),
    ("seed_grpo", "one_answer", "alpha=5", "working seed_grpo weight", [1.0] * 4),
    ("seed_grpo", "semantic_entropy_masses", "", SE, 0.1677),
    (
        "seed_grpo",
        "semantic_entropy_masses",
        PAPER,
        SE,
        3.4615,
    ),
    # the smallest multiplier of the default, at the largest entropy: 1 / 1.0417
    (
        "seed_grpo",
        "semantic_entropy_eight",
        COUNTS,
        "diagnostics weighting_min",
        0.9599693,
    ),
    # GTPO: Eq. 3, Eq. 5, Eq. 6
    (
        "gtpo",
        "gtpo_equation_3",
        "",
        "working gtpo shaped_rewards",
        [[1.15, 1.05], [1.05, 1.15]],
    ),
    (
        "gtpo",
        "gtpo_equation_5",
        "",
        "working gtpo shaped_rewards",
        [[-1.04, -1.16], [-1.16, -1.04]],
    ),
    ("gtpo", "gtpo", "", "working gtpo shaped_rewards", SHAPED),
    ("gtpo", "gtpo", "normalization=own_set", "advantages", OWN),
    ("gtpo", "gtpo", "", "advantages", WITH_ZEROS),
    ("gtpo", "gtpo", "normalization=joint", "advantages", JOINT),
    ("gtpo", "gtpo", "normalization=own_set", "diagnostics positive_correct", 0.4),
    ("gtpo", "gtpo", "", "diagnostics positive_correct", 1.0),
    ("gtpo", "gtpo", "normalization=joint", "diagnostics positive_correct", 1.0),
    # GRPO-S: Eq. 9, its z-score, the arithmetic ratio beside GSPO's geometric one (A = 1 and -1)
    (
        "grpo_s",
        "grpo_s",
        "",
        "working grpo_s shaped_rewards",
        [1.133333, 1.066667, -1.16, -1.04],
    ),
    (
        "grpo_s",
        "grpo_s",
        "",
        "advantages",
        [[1.029302] * 2, [0.968754] * 2, [-1.053520] * 2, [-0.944536]],
    ),
    ("dr_grpo", "ratios", "loss=grpo_s", "token_losses 0", [-1.0912535] * 3),
    (
        "dr_grpo",
        "ratios",
        "loss=gspo gspo.clip_high=1 gspo.clip_low=1",
        "token_losses 0",
        [-1.0689391] * 3,
    ),
    # ENCORE: entropies 0, ln 2, ln 5 of the ratings in the file
    ("encore", "encore", "tau=0.5", "diagnostics weight_format", 0.775194),
    ("encore", "encore", "tau=0.5", "diagnostics weight_brevity", 0.193798),
    ("encore", "encore", "tau=0.5", "diagnostics weight_reasoning", 0.031008),
    ("encore", "encore", "tau=1", "diagnostics weight_format", 0.588235),
    ("encore", "encore", "tau=1", "diagnostics weight_brevity", 0.294118),
    ("encore", "encore", "tau=1", "diagnostics weight_reasoning", 0.117647),
    ("encore", "encore", "", "diagnostics weight_format", 0.464184),
    ("encore", "encore", "", "diagnostics weight_brevity", 0.328227),
    ("encore", "encore", "", "diagnostics weight_reasoning", 0.207589),
    ("encore", "encore", "", "rewards 0", 0.7198405),
    ("encore", "encore", RATED, "rewards 0", 0.7198405),
    ("encore", "encore", "tau=inf", "diagnostics weight_brevity", 1 / 3),
    ("encore", "encore", "tau=0.001", "diagnostics weight_format", 1.0),
    # ASR and its neighbours
    ("asr", "asr", ASR, "working asr kept", [[1, 0, 1], [0, 1, 0]]),
    (
        "asr",
        "segments",
        "source=entropy segmentation=entropy_cutoff cutoff=2",
        "working asr segments 0",
        [0, 0, 1, 1, 1, 2],
    ),
    # the baselines: standard deviations over n and n - 1
    ("grpo_s", "gtpo", "b2=0 epsilon=0", "advantages 0", [1.0] * 3),
    ("grpo", "group_of_four", "epsilon=0", "advantages", [[0.8660254]] * 2 + [[-0.8660254]] * 2),
    ("grpo", "group_of_four", "", "advantages", [[0.8658754]] * 2 + [[-0.8658754]] * 2),
    # clip .2/.28 at (A, rho) (1,1.5) (-1,1.5) (1,.5) (-1,.5); a loss is minus the objective
    ("dr_grpo", "clip", "loss=dapo", "token_losses", [[-1.28], [1.5], [-0.5], [0.8]]),
    (
        "dapo",
        "overlong",
        "overlong_length=20480 overlong_buffer=4096",
        "rewards",
        [1.0, 0.5, 0.0, 0.0],
    ),
    ("empo", "empo", "", "rewards", [0.6, 0.6, 0.6, 0.2, 0.2]),
    ("empo", "empo", "", SE, 0.9502705),
    # two nodes, weight 2, t .3
    (
        "grpo",
        "kernel_language",
        "",
        "working kernel_language eigenvalues",
        [0.23147522, 0.76852478],
    ),
    ("grpo", "kernel_language", "", "diagnostics kernel_language_entropy", 0.5410527),
    # composed rewards: both heads' ratings fall 2, 1, 1 on three points, so each weighs a half, and
    # r = (.375, .75, .5, .5); O+ are the completions graded 1, the first and the last: .375 + .1 *
    # 2 * 2 / 2.5, .375 + .1 * 2 * 4 / 8, .375 + .1 (alone at the third step), ...
    ("gtpo", "composed_rewards", "reward=encore", "rewards", [0.375, 0.75, 0.5, 0.5]),
    (
        "gtpo",
        "composed_rewards",
        "reward=encore",
        "working gtpo shaped_rewards",
        [
            [0.535, 0.475, 0.475],
            [-1.1142857, -1.0666667],
            [-1.0857143, -1.1333333, -1.1],
            [0.54, 0.6],
        ],
    ),
    # mean entropies of O+ 7/3 and 9/4, of O- 2 and 5/2: .375 + .1 * 2 * 28/55, ...
    (
        "grpo_s",
        "composed_rewards",
        "reward=encore",
        "working grpo_s shaped_rewards",
        [0.4768182, -1.1111111, -1.0888889, 0.5981818],
    ),
]


def ids(row: Any) -> str | None:
    return row if isinstance(row, str) else None


@pytest.mark.parametrize(("method", "file", "settings", "place", "value"), NUMBERS, ids=ids)
def test_number(
    method: str,
    file: str,
    settings: str,
    place: str,
    value: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["explain", "--method", method, "--group", str(EXAMPLES / f"{file}.json")]
    if settings:
        arguments += ["--set", *settings.split()]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    parts = [int(part) if part.isdigit() else part for part in place.split()]
    found = reduce(lambda at, part: at[part], parts, answer)
    # as many digits as are printed
    shown = [value] if not isinstance(value, list) else value
    found = [found] if not isinstance(value, list) else found
    rows = shown if isinstance(shown[0], list) else [shown]
    got = found if isinstance(shown[0], list) else [found]
    assert [len(row) for row in got] == [len(row) for row in rows]
    digits = 5e-5 if value in (0.1677, 3.4615) else 5e-6 if abs(rows[0][0]) in POPULATIONS else 6e-7
    for row, wanted in zip(got, rows, strict=True):
        assert row == pytest.approx(wanted, abs=digits)


POPULATIONS = {abs(table[0][0]) for table in (OWN, WITH_ZEROS, JOINT)}


def test_every_example_is_used() -> None:
    used = {file for _, file, *_ in NUMBERS}
    assert used == {path.stem for path in EXAMPLES.glob("*.json")}


def test_long_completions_are_shown_as_one_token(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(EXAMPLES / "overlong.json")
    assert main(["explain", "--method", "dapo", "--group", file]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [len(row) for row in answer["advantages"]] == [1] * 4
    assert answer["diagnostics"]["length_mean"] == (16384 + 18432 + 20480 + 20481) / 4
