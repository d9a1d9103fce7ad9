"""The page and its numbers: choices by hand, escaping, determinism, absent inputs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from entrograd.errors import InputError
from entrograd.params import check
from entrograd.pipeline.rules import read
from entrograd.pipeline.sections import Params
from entrograd.report import curves, plots, samples, scores, settings, tables
from entrograd.report.browser import Inputs, report
from entrograd.storage.files import read_json, write_csv, write_json
from entrograd.storage.schemas import SCHEMAS
from entrograd.storage.tables import shard_name, write_manifest, write_table
from helpers.paths import ROOT, SHIPPED

SUMMARY = {
    "base": {"n": 4, "accuracy": 0.25, "ci_low": 0.05, "ci_high": 0.70},
    "offline": {"n": 4, "accuracy": 0.5, "ci_low": 0.15, "ci_high": 0.85},
    "online": {"n": 4, "accuracy": 0.5, "ci_low": 0.15, "ci_high": 0.85},
    "offline_minus_base": {"diff": 0.25, "ci_low": 0.01, "ci_high": 0.5},
    "online_minus_base": {"diff": 0.25, "ci_low": -0.25, "ci_high": 0.75},
}
PREPARED = {
    "sources": {"sums": {"rows": 1234, "rejected": 3}},
    "total": {"rows": 1234, "rejected": 3},
    "reject_reasons": {"missing answer": 3},
    "overlap": {"ngram": 13, "by_benchmark": {"aime24": {"benchmark_rows": 30, "rows": 7}}},
}
SCRIPT = "<script>alert('owned')</script>"


def sample(model: str, problem: int, reward: float, text: str = "4", **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "benchmark": "heldout",
        "problem_id": f"p{problem}",
        "sample_index": 0,
        "problem": f"2 + {problem} <i>",
        "answers": ["4"],
        "completion_text": text,
        "answer": text or None,
        "reward": reward,
        "reward_status": "ok" if text else "no_answer",
        "finish_reason": "stop",
        **more,
    }


@pytest.fixture
def files(tmp_path: Path) -> Inputs:
    """A small run's files: p0 fixed, p1 broken, p2 still wrong, p3 fixed."""
    write_json(tmp_path / "summary.json", SUMMARY)
    rewards = {"base": (0, 1, 0, 0), "offline": (1, 1, 0, 0), "online": (1, 0, 0, 1)}
    for index, (model, row) in enumerate(rewards.items()):
        rows = [
            sample(model, i, float(reward), SCRIPT if i == 2 else "" if i == 1 else "4")
            for i, reward in enumerate(row)
        ]
        write_table(tmp_path / "samples" / shard_name(index), rows, "samples")
    write_manifest(tmp_path / "samples")
    return Inputs(tmp_path / "summary.json", tmp_path / "samples")


@pytest.fixture
def all_files(files: Inputs, tmp_path: Path) -> Inputs:
    entry = {
        "problems": 30,
        "n": 4,
        "temperature": 0.6,
        "top_p": 0.95,
        "stop": ["\n"],
        "seed": 7,
        "list_sha256": "c0ffee" * 10 + "abcd",
        "grader": "math-verify 0.9.0",
        "models": {
            "base": {"accuracy": 0.1, "ci_low": 0.0, "ci_high": 0.2, "policy_version": "beef"}
        },
        "differences": {},
    }
    write_json(tmp_path / "benchmarks.json", {"aime24": entry})
    curve = [{"update": i + 1, "loss": 0.1 * i, "entropy_mean": 1.0 / (i + 1)} for i in range(30)]
    write_csv(tmp_path / "offline.csv", curve[:3])
    write_csv(tmp_path / "online.csv", [{**row, "reward_mean": 0.5} for row in curve])
    groups = [
        {
            "prompt_id": f"p{i}",
            "completions": 8,
            "mean_reward": i / 8,
            "clusters": 2,
            "semantic_entropy_rao": i * math.log(8) / 8,
            "semantic_entropy_discrete": 0.0,
            "semantic_entropy_paper": 0.0,
            "mean_token_entropy": 0.5,
        }
        for i in range(9)
    ]
    write_table(tmp_path / "groups.parquet", groups, "groups")
    write_json(tmp_path / "prepare.json", PREPARED)
    write_json(
        tmp_path / "annotate.json",
        {"groups": 9, "status": {"timeout": 0.25, "ok": 0.75, "error": 0.0}},
    )
    names = ("benchmarks.json", "offline.csv", "online.csv", "groups.parquet")
    paths = [tmp_path / name for name in (*names, "prepare.json", "annotate.json")]
    return Inputs(files.summary, files.samples, *paths)


def settings_of(**sections: Any) -> Params:
    """A run's parameters, `sections` instead of the project's own."""
    values = yaml.safe_load(SHIPPED.read_text())
    del values["execution"]
    return check(Params, {**values, **sections}, "")


def page(inputs: Inputs, out: Path, **section: Any) -> str:
    report(settings_of(report=section), inputs, out)
    return (out / "index.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """The tags of a page and the text of its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)


class TestPage:
    def test_needs_no_other_file_and_runs_nothing(self, all_files: Inputs, tmp_path: Path) -> None:
        outline = Outline(page(all_files, tmp_path / "report"))
        assert {"script", "link", "img", "iframe", "object"}.isdisjoint(outline.tags)
        assert all(link.startswith("#") for link in outline.links)
        assert [file.name for file in (tmp_path / "report").iterdir()] == ["index.html"]

    def test_shows_every_part(self, all_files: Inputs, tmp_path: Path) -> None:
        text = page(all_files, tmp_path / "report", title="a <b> run")
        assert {"Result", "Benchmarks", "Training", "Data", "Samples"} <= set(
            Outline(text).headings
        )
        assert "a &lt;b&gt; run" in text
        assert "25.0 %" in text
        assert "5.0 – 70.0 %" in text
        assert "+25.0 points" in text
        assert "avg@4 at temperature 0.6" in text
        assert "c0ffeec0ffee" in text
        assert "ok 75.0 %" in text
        assert "error 0.0 %" not in text
        assert '<td>sums</td><td class="number">1\u202f234</td>' in text
        assert "total" not in text  # of one source
        assert "<dt>missing answer</dt><dd>3</dd>" in text
        # accuracy; loss and entropy of both runs; reward of one; two of the groups
        assert Outline(text).tags.count("svg") == 1 + 2 + 2 + 1 + 2

    def test_leaves_out_what_a_run_does_not_have(self, files: Inputs, tmp_path: Path) -> None:
        assert Outline(page(files, tmp_path / "report")).headings == [
            "Result",
            "This run",
            "Code and machine",
            "Samples",
        ]

    def test_benchmarks_alone(self, all_files: Inputs, tmp_path: Path) -> None:
        write_json(tmp_path / "none.json", {})
        inputs = Inputs(tmp_path / "none.json", all_files.samples, all_files.benchmarks)
        assert Outline(page(inputs, tmp_path / "report")).headings == [
            "This run",
            "Code and machine",
            "Benchmarks",
            "aime24",
            "Samples",
        ]

    def test_model_text_is_escaped(self, files: Inputs, tmp_path: Path) -> None:
        text = page(files, tmp_path / "report")
        assert SCRIPT not in text
        assert "&lt;script&gt;alert(&#39;owned&#39;)&lt;/script&gt;" in text
        assert "2 + 0 &lt;i&gt;" in text

    def test_names_in_figures_are_escaped(self, files: Inputs, tmp_path: Path) -> None:
        write_json(tmp_path / "summary.json", {"<script>x": SUMMARY["base"]})
        text = page(files, tmp_path / "report")
        assert "<script" not in text
        assert "&lt;script&gt;x" in text

    def test_equal_inputs_give_equal_bytes_wherever_they_are(
        self, all_files: Inputs, tmp_path: Path
    ) -> None:
        first = page(all_files, tmp_path / "one")
        assert page(all_files, tmp_path / "elsewhere" / "two") == first
        assert str(tmp_path) not in first

    def test_ids_of_figures_are_unique(self, all_files: Inputs, tmp_path: Path) -> None:
        found = re.findall(r'\bid="([^"]+)"', page(all_files, tmp_path / "report"))
        assert len(found) == len(set(found))

    def test_the_interval_is_named_by_its_confidence(self, files: Inputs, tmp_path: Path) -> None:
        report(settings_of(score={"confidence": 0.9}), files, tmp_path / "report")
        text = (tmp_path / "report" / "index.html").read_text()
        assert "90 % interval" in text
        assert "95 %" not in text

    def test_an_empty_completion_is_called_so(self, files: Inputs, tmp_path: Path) -> None:
        assert "(empty completion)" in page(files, tmp_path / "report")

    def test_no_samples_wanted(self, files: Inputs, tmp_path: Path) -> None:
        assert "Samples" not in Outline(page(files, tmp_path / "report", samples=0)).headings

    def test_a_summary_that_is_not_one_is_named(self, files: Inputs, tmp_path: Path) -> None:
        write_json(tmp_path / "summary.json", {"base": {"accuracy": "high"}})
        with pytest.raises(InputError, match=r"summary\.json: base: expected accuracy"):
            page(files, tmp_path / "report")
        assert not (tmp_path / "report").exists()

    def test_malformed_benchmarks_are_named(self, all_files: Inputs, tmp_path: Path) -> None:
        write_json(tmp_path / "benchmarks.json", {"aime24": {"problems": 3}})
        with pytest.raises(InputError, match=r"benchmarks\.json: aime24"):
            page(all_files, tmp_path / "report")


class TestThisRun:
    def rows(self, inputs: Inputs, run: Params) -> dict[str, tuple[str, dict[str, str]]]:
        found = settings.topics(run, inputs.given, {"Model": "a note"})
        return {topic.title: (topic.note, dict(topic.pairs)) for topic in found}

    def test_keys_and_values_are_those_of_params_yaml(self, all_files: Inputs) -> None:
        run = read(SHIPPED, Params)
        rows = self.rows(all_files, run)
        assert rows["Model"][0] == "a note"
        shown = {key: value for _, pairs in rows.values() for key, value in pairs.items()}
        assert shown["prepare.sources[0].task"] == "basic_arithmetic"
        assert shown["prepare.prompt.template"] == r'"{problem} = {answer}\n"'
        assert shown["rollout.sampling.stop"] == r'["\n"]'
        assert shown["method.gtpo"] == "{a1: 1.0, a2: 0.1, normalization: with_zeros}"
        assert shown["method.advantage"] == "null"
        assert "optimizer.lr" in "".join(shown)
        written = yaml.safe_load(SHIPPED.read_text())
        for key, value in shown.items():
            found = written
            for part in re.findall(r"[^.\[\]]+", key):
                found = found[int(part)] if isinstance(found, list) else found.get(part, {})
            assert found in ({}, yaml.safe_load(value)), key

    def test_a_method_shows_what_it_is_made_of_and_no_other_ones_block(
        self, all_files: Inputs
    ) -> None:
        blocks = {"gtpo": {"a1": 1.0}, "seed_grpo": {"alpha": 0.5}, "gspo": {"eps_low": 0.1}}
        run = settings_of(method={"name": "grpo", "weighting": "seed_grpo", **blocks})
        shown = self.rows(all_files, run)["Method"][1]
        assert [key for key in shown if key.removeprefix("method.") in blocks] == [
            "method.seed_grpo"
        ]
        assert settings.recipe(run.method) == (
            "reward composition single, advantage grpo, prompt weighting seed_grpo, "
            "policy loss grpo"
        )

    def test_a_page_without_training_claims_none(self, files: Inputs) -> None:
        run = read(SHIPPED, Params)
        assert list(self.rows(files, run)) == ["Evaluation", "Scores"]
        shown = set(yaml.safe_load(settings.whole(run, files.given)))
        assert shown == {"evaluate", "score", "report"}

    def test_the_whole_of_it_is_a_params_file(self, all_files: Inputs) -> None:
        run = read(SHIPPED, Params)
        text = settings.whole(run, all_files.given)
        again = check(Params, yaml.safe_load(text), "")
        assert again.model_dump() == run.model_dump()

    def test_a_servers_address_is_left_out(self, all_files: Inputs) -> None:
        vllm = {"url": "http://user:secret@host:8000"}
        run = settings_of(rollout={"engine": "vllm_server", "vllm": vllm})
        assert "secret" not in settings.whole(run, all_files.given)

    def test_the_page_has_numbers_and_weights_from_the_files(
        self, all_files: Inputs, tmp_path: Path
    ) -> None:
        numbers = {"sources": {}, "total": {"train": 2113, "heldout": 733}}
        write_json(tmp_path / "prepare.json", numbers)
        for index, model in enumerate(("base", "offline", "online")):
            rows = [sample(model, 0, 1.0)]
            origin = {"model": model, "policy_version": f"{index}" * 16}
            write_table(all_files.samples / shard_name(index), rows, "samples", seed=0, **origin)
        write_manifest(all_files.samples)
        text = page(all_files, tmp_path / "report")
        assert "2\u202f113 to train on, 733 held out" in text
        assert f"Weights: base {'0' * 16}, offline {'1' * 16}, online {'2' * 16}" in text
        assert "30 updates" in text
        assert "<span>rollout.group_size:</span> 8" in text
        assert "<span>train_online.optimizer.lr:</span> 1.0e-05" in text

    def test_a_benchmark_says_how_it_was_asked(self, all_files: Inputs, tmp_path: Path) -> None:
        text = page(all_files, tmp_path / "report")
        for shown in (
            "<span>top_p:</span> 0.95",
            "<span>stop:</span> [&#34;\\n&#34;]",
            "<span>seed:</span> 7",
            "<span>models.base:</span> {policy_version: beef}",
        ):
            assert shown in text


class TestIntervalsWithoutWidth:
    def test_are_no_verdict_and_say_why(self, files: Inputs, tmp_path: Path) -> None:
        same = {"diff": 1.0, "ci_low": 1.0, "ci_high": 1.0}
        write_json(tmp_path / "summary.json", {**SUMMARY, "online_minus_base": same})
        text = page(files, tmp_path / "report")
        assert text.count("+100.0 to +100.0*") == 2  # above the page, and in its table
        assert "no verdict" in text
        assert "if all 4 differences are equal" in text
        assert text.count("without width") == 1

    def test_of_a_benchmark(self, all_files: Inputs, tmp_path: Path) -> None:
        benchmarks = read_json(tmp_path / "benchmarks.json")
        benchmarks["aime24"]["models"]["base"].update(accuracy=0.0, ci_low=0.0, ci_high=0.0)
        write_json(tmp_path / "benchmarks.json", benchmarks)
        text = page(all_files, tmp_path / "report")
        assert "0.0 – 0.0 %*" in text
        assert "if all 30 means or differences are equal" in text

    def test_others_have_no_note(self, all_files: Inputs, tmp_path: Path) -> None:
        assert "without width" not in page(all_files, tmp_path / "report")


class TestScores:
    def test_the_reference_comes_first_and_differences_keep_the_order(self) -> None:
        names = {"zebra": SUMMARY["online"], "zebra_minus_base": SUMMARY["online_minus_base"]}
        models, differences = scores.scores(dict(sorted((SUMMARY | names).items())), "here")
        assert [m.name for m in models] == ["base", "zebra", "offline", "online"]
        assert [d.words for d in differences] == ["zebra − base", "offline − base", "online − base"]

    def test_words_of_a_difference(self) -> None:
        _, (offline, online) = scores.scores(SUMMARY, "here")
        assert (offline.points, offline.points_range) == ("+25.0 points", "+1.0 to +50.0")
        assert (offline.verdict, online.verdict) == ("better", "no clear difference")
        assert scores.Score("x", -0.125, -0.2, -0.1).points == "−12.5 points"
        assert scores.Score("x", -0.125, -0.2, -0.1).verdict == "worse"
        assert scores.signed(-0.01) == "0.0"


class TestCurves:
    def test_reads_numbers_and_gaps(self, tmp_path: Path) -> None:
        (tmp_path / "c.csv").write_text("update,loss,kl\n1,0.5,\n2,-1e-3,0.25\n")
        columns = tables.read_curve(tmp_path / "c.csv")
        assert columns["update"] == [1.0, 2.0]
        assert columns["loss"] == [0.5, -0.001]
        assert math.isnan(columns["kl"][0])
        assert columns["kl"][1] == 0.25

    def test_a_cell_that_is_no_number_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "c.csv").write_text("update,loss\n1,0.5\n2,oops\n")
        with pytest.raises(InputError, match=r"c\.csv: line 3: loss is 'oops'"):
            tables.read_curve(tmp_path / "c.csv")

    def test_a_log_without_updates_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "c.csv").write_text("loss\n1\n")
        with pytest.raises(InputError, match="no column update or round"):
            tables.read_curve(tmp_path / "c.csv")

    def test_a_run_without_steps_has_no_figure(self, tmp_path: Path) -> None:
        (tmp_path / "c.csv").write_text("")
        columns = tables.read_curve(tmp_path / "c.csv")
        assert curves.curve(curves.FIGURES[0], columns, "online", "#000000") is None

    def test_rolling_mean(self) -> None:
        # half 1: (1+2)/2, (1+2+6)/3, (2+6)/2 with the NaN left out, 6, and the last alone with 6
        nan = math.nan
        assert tables.rolling_mean([1.0, 2.0, 6.0, nan], 1) == [1.5, 3.0, 4.0, 6.0]
        assert math.isnan(tables.rolling_mean([nan], 3)[0])

    def test_only_finite_columns_are_drawn(self) -> None:
        clipped = next(f for f in curves.FIGURES if "clip_low" in f.columns)
        columns = {"update": [1.0, 2.0], "clip_low": [math.nan] * 2, "clip_high": [0.5, math.nan]}
        spec = curves.curve(clipped, columns, "online", "#000000")
        assert spec is not None
        assert [(row["update"], row["raw"]) for row in spec["data"]["values"]] == [(1.0, 0.5)]


class TestFigures:
    def test_same_bytes_each_time(self) -> None:
        spec = plots.entropy_histogram([0.1, 0.5, 2.0], math.log(8), 4)
        assert plots.svg(spec, "a") == plots.svg(spec, "a")

    def test_axes_have_titles_with_units(self) -> None:
        text = plots.svg(plots.entropy_histogram([0.1], math.log(8), 4), "a")
        assert "semantic entropy of the group, nats" in text
        models, _ = scores.scores(SUMMARY, "here")
        assert "accuracy on the same problems, %" in plots.svg(plots.accuracy(models), "b")

    def test_histogram(self) -> None:
        # bins of [0, 2]: [0, .5) [.5, 1) [1, 1.5) [1.5, 2]; 2.1 counts in the last
        assert tables.histogram([0, 0.49, 0.5, 1.2, 2.0, 2.1], 0, 2, 4) == [2, 1, 1, 2]

    def test_reward_by_entropy(self) -> None:
        found = tables.reward_by_entropy([0.1, 0.2, 1.9], [1.0, 0.5, 0.0], 2.0, 4)
        assert found == [tables.Bin(0.0, 0.5, 2, 0.75), tables.Bin(1.5, 2.0, 1, 0.0)]


class TestSamples:
    def kinds(self, rows: list[dict[str, Any]]) -> dict[str, pa.Array]:
        return samples.kinds(
            pa.Table.from_pylist(rows, SCHEMAS["samples"]), models=["base", "online"]
        )

    def rows(self, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
        return [
            sample(model, i, float(pair[place]))
            for place, model in enumerate(("base", "online"))
            for i, pair in enumerate(pairs)
        ]

    def test_kinds(self) -> None:
        found = self.kinds(self.rows([(0, 1), (1, 0), (0, 0), (1, 1)]))
        ids = [sample("base", i, 0.0)["problem_id"] for i in range(4)]
        assert {kind: found[kind].to_pylist() for kind in found} == {
            "fixed": ids[:1],
            "broken": ids[1:2],
            "still wrong": ids[2:3],
            "right throughout": ids[3:],
        }

    def test_only_problems_all_models_answered(self) -> None:
        found = self.kinds([*self.rows([(0, 1)]), sample("base", 7, 1.0)])
        assert sum(map(len, found.values())) == 1

    def test_of_several_rows_the_last_counts(self) -> None:
        found = self.kinds([*self.rows([(0, 1)]), sample("base", 0, 1.0)])
        assert {kind: len(found[kind]) for kind in found if len(found[kind])} == {
            "right throughout": 1
        }

    def test_twelve_of_plenty(self) -> None:
        pairs = [(0, 1), (1, 0), (0, 0), (1, 1)] * 20
        kinds = [kind for kind, _ in samples.choose(self.kinds(self.rows(pairs)), 12)]
        assert [kinds.count(kind) for kind in samples.KINDS] == [5, 3, 3, 1]

    def test_other_kinds_fill_up_where_one_runs_short(self) -> None:
        found = self.kinds(self.rows([(0, 1)] * 2 + [(1, 1)] * 9))
        kinds = [kind for kind, _ in samples.choose(found, 6)]
        assert kinds == ["fixed"] * 2 + ["right throughout"] * 4
        assert len(samples.choose(found, 100)) == 11


def test_facts_join_nested_names() -> None:
    value = {"rows": 12345, "overlap": {"aime24": 0}, "share": 0.25, "ids": [1], "ok": True}
    assert tables.facts(value) == [
        ("rows", "12\u202f345"),
        ("overlap · aime24", "0"),
        ("share", "0.25"),
        ("ok", "True"),
    ]


def test_reward_heads_are_shown_where_there_are_any(all_files: Inputs, tmp_path: Path) -> None:
    head = {"mean": 0.75, "entropy": 0.6931, "weight": 0.25, "ratings": {"0.5": 0.5, "1": 0.5}}
    write_json(tmp_path / "h.json", {"completions": 8, "tau": 2.0, "heads": {"brevity": head}})
    text = page(replace(all_files, reward_heads=tmp_path / "h.json"), tmp_path / "report")
    assert "head · brevity · entropy" in text
    assert "0.6931" in text
    # method.encore.tau may be another
    assert "head · brevity · weight at tau 2, natural logarithm" in text
    write_json(tmp_path / "h.json", {"completions": 8, "tau": 2.0, "heads": {}})
    assert "head ·" not in page(
        replace(all_files, reward_heads=tmp_path / "h.json"), tmp_path / "r"
    )


def test_counts_are_a_table_of_equal_keys() -> None:
    table = tables.counts({"a": {"mine": 1, "rows": 2000}, "b": {"rows": 5}, "note": "x"})
    assert table == tables.Counts(["rows", "mine"], [("a", ["2\u202f000", "1"]), ("b", ["5", ""])])
    assert tables.counts({}) is None


def test_every_metric_is_a_column_of_its_own() -> None:
    columns = [column for figure in curves.FIGURES for column in figure.columns]
    assert len(columns) == len(set(columns))


def test_the_page_of_dvc_plots_has_every_plot_and_loads_nothing(tmp_path: Path) -> None:
    """`dvc plots show` in a clone with curves of the columns that dvc.yaml names."""
    for name in ("dvc.yaml", "params.yaml", ".dvc/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    stages = yaml.safe_load((tmp_path / "dvc.yaml").read_text())["stages"]
    named = {
        path: axes
        for stage in stages.values()
        for plot in stage.get("plots", ())
        for path, axes in plot.items()
    }
    for path, axes in named.items():
        rows = [{axes["x"]: step, axes["y"]: 0.5 / step} for step in (1, 2, 3)]
        write_csv(tmp_path / path, rows)
    scripts = Path(sys.executable).parent
    for command in (
        ["git", "init", "-q"],
        [sys.executable, "-m", "entrograd.report.dvc_plots"],
        [str(scripts / "dvc"), "plots", "show", "--out", "shown"],
    ):
        environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    text = (tmp_path / "shown" / "index.html").read_text()
    assert Outline(text).links == []  # of scripts, styles and images too
    library, drawn = text.split("</script>", 1)
    assert "vegaEmbed" in library
    assert not re.findall(r"\b(?:import|fetch)\(\s*[\"'`]https?:", library)
    # what a plot is called in the language it is written in is a name, not a place to load
    drawn = re.sub(r'(?<="\$schema": )"[^"]*"', '""', drawn)
    assert "://" not in drawn
    assert len(named) == 2
    for path, axes in named.items():
        (spec,) = re.findall(rf'var spec = (.*"text": "{re.escape(path)}".*);', drawn)
        values = json.loads(spec)["data"]["values"]
        assert [row[axes["x"]] for row in values] == ["1", "2", "3"]
        assert f'"field": "{axes["y"]}"' in spec
