"""Clusters and semantic entropy by hand arithmetic; checks of token values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from entrograd.annotate.semantic_entropy import cluster_masses, discrete, paper, rao
from entrograd.annotate.token_entropy import Score, token_values
from entrograd.data.groups import Completion, PromptGroup
from entrograd.errors import InputError
from entrograd.numerics.semantic_entropy import semantic_entropy


class TestSemanticEntropy:
    """Numbers worked out by hand for arXiv 2505.12346v1 and its estimators."""

    IDS, ELL = [0, 0, 1, 2], [-0.1, -0.2, -0.3, -0.4]

    def test_masses(self) -> None:
        # exp: .904837 .818731 .740818 .670320, sum 3.134706; (.904837+.818731)/3.134706 = .549834
        masses = cluster_masses(self.IDS, self.ELL)
        assert list(masses.values()) == pytest.approx([0.5498340, 0.2363278, 0.2138382], abs=5e-8)

    def test_rao(self) -> None:
        assert rao(self.IDS, self.ELL) == pytest.approx(0.9996414, abs=5e-8)

    def test_paper(self) -> None:
        assert paper(self.IDS, self.ELL) == pytest.approx(1.1944033, abs=5e-8)

    def test_concentrated_mass(self) -> None:
        ell = [math.log(p) for p in (0.97, 0.01, 0.01, 0.01)]
        assert rao([0, 1, 2, 3], ell) == pytest.approx(0.1677, abs=5e-5)
        assert paper([0, 1, 2, 3], ell) == pytest.approx(3.4615, abs=5e-5)  # over ln 4

    @pytest.mark.parametrize(
        ("ids", "value"),
        [
            ([0, 1, 2, 1], 1.0397208),  # 2 * 1/4 ln 4 + 1/2 ln 2
            ([0, 0, 0, 0, 0, 1], 0.4505612),
            (list(range(8)), 2.0794415),  # ln 8
        ],
    )
    def test_discrete(self, ids: list[int], value: float) -> None:
        assert discrete(ids) == pytest.approx(value, abs=5e-8)
        assert rao(ids, [-1.5] * len(ids)) == pytest.approx(value, abs=5e-8)  # equally likely

    def test_one_cluster_is_zero_and_not_minus_zero(self) -> None:
        for value in (rao([3, 3], [-1, -2]), discrete([3, 3]), paper([3, 3], [-1, -2])):
            assert value == 0
            assert math.copysign(1, value) == 1

    def test_extreme_likelihoods_stay_finite(self) -> None:
        assert rao([0, 1], [-1.0, -5000.0]) == 0
        assert math.isfinite(paper([0, 1], [-1.0, -5000.0]))

    def test_agrees_with_the_trainers_tensors(self) -> None:
        ids, ell = [0, 2, 2, 5, 0], [-0.3, -1.7, -0.2, -3.0, -0.9]
        tensors = torch.tensor(ell), torch.zeros(5, dtype=torch.long), torch.tensor(ids)
        for mine, name in ((rao(ids, ell), "rao"), (paper(ids, ell), "paper")):
            theirs = semantic_entropy(*tensors, name)  # type: ignore[arg-type]
            assert mine == pytest.approx(float(theirs[0]), abs=1e-6)

    @pytest.mark.parametrize(
        ("ids", "ell"), [([], []), ([0], [-1.0, -2.0]), ([0], [math.nan]), ([0], [-math.inf])]
    )
    def test_bad_input(self, ids: list[int], ell: list[float]) -> None:
        with pytest.raises(ValueError, match="need one finite each"):
            rao(ids, ell)


def group(prompt_ids: list[int], completion_ids: list[int]) -> PromptGroup:
    ids = np.array(completion_ids, np.int32)
    completion = Completion(3, ids, "", "stop", 0, "v")
    return PromptGroup("p", np.array(prompt_ids, np.int32), [completion])


def scored(logprobs: list[float], entropies: list[float]) -> Score:
    return lambda _: [(np.array(logprobs, np.float32), np.array(entropies, np.float32))]


class TestTokenValues:
    GROUP = group([1], [4, 5])

    def test_passes_values_through(self) -> None:
        ((logprobs, entropies),) = token_values([self.GROUP], scored([-1.0, -2.0], [0.5, 0.25]))
        assert (logprobs.tolist(), entropies.tolist()) == ([-1.0, -2.0], [0.5, 0.25])

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_value_that_is_not_finite_names_the_row(self, bad: float) -> None:
        message = rf"prompt_id p, sample_index 3: entropies is {bad} at token 1"
        with pytest.raises(InputError, match=message):
            token_values([self.GROUP], scored([-1.0, -2.0], [0.5, bad]))

    @pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
    def test_no_tokens(self, column: str) -> None:
        empty = group([], [4]) if column == "prompt_ids" else group([1], [])
        with pytest.raises(InputError, match=f"sample_index 3: {column} is empty"):
            token_values([empty], scored([], []))

    def test_a_wrong_number_of_values_is_a_defect(self) -> None:
        with pytest.raises(ValueError, match="1 old_logprobs for 2 tokens"):
            token_values([self.GROUP], scored([-1.0], [0.5, 0.5]))
        with pytest.raises(ValueError, match="0 scores for 1 completions"):
            token_values([self.GROUP], lambda _: [])
