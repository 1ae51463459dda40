"""`python -m training compare`: what stands on the pages is what the run folders say."""

import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.comparison.pages import figures as figures_beside
from tests.training.comparison.pages import tables
from training.__main__ import main
from training.checkpoint import load_model
from training.comparison import next_item_sections as sections
from training.comparison.costs import LENGTHS, LengthCost
from training.comparison.next_item_choice import METRICS, MODELS, compare
from training.comparison.next_item_measurements import Measurements, cost_subjects, retrieval_setups
from training.comparison.next_item_page import write_comparison
from training.comparison.next_item_published import published
from training.comparison.next_item_sections import LABELS
from training.config import parse_config
from training.data.log import PreparedLog
from training.distributed import Worker
from training.errors import CheckpointError, ConfigError
from training.trainer import CONFIG, COST, MODEL, train
from training.trainer import METRICS as METRICS_FILE

CPU = torch.device("cpu")
PROTOCOLS = ("full", "pop100", "pop100_history_excluded")
SASREC = {"name": "sasrec", "embedding_dim": 8, "layers": 1, "heads": 1, "ffn_units": 8}
PKM_ACT = {**SASREC, "name": "pkm_act", "keys_per_side": 4, "experts": 2}
RUNS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "sasrec-1": (SASREC, {"seed": 1}),
    "sasrec-2": (SASREC, {"seed": 2}),
    # Nothing is learned: its validation must be worse.
    "sasrec-slow": (SASREC, {"seed": 1, "learning_rate": 1e-9}),
    "gru4rec": ({"name": "gru4rec", "embedding_dim": 4, "hidden_units": 4}, {"patience": 9}),
    "pkm-1": (PKM_ACT, {"seed": 1}),
    "pkm-2": (PKM_ACT, {"seed": 2}),
    "pkm-more-keys": ({**PKM_ACT, "keys_per_side": 8}, {"seed": 1}),
    "pkm-no-query": ({**PKM_ACT, "query_network": False}, {"seed": 1}),
}  # fmt: skip


def write_run(folder: Path, log: PreparedLog, model: dict[str, object], **train_settings: object):
    config = parse_config(
        {
            "name": "tiny",
            "features": {"history_length": 16},
            "data": {"split": "leave-one-out"},
            "model": model,
            "train": {
                "batch_size": 32,
                "learning_rate": 0.02,
                "max_epochs": 3,
                "patience": 1,
                **train_settings,
            },
        },
        "test",
    )
    train(config, log, folder, Worker(device=CPU), show_progress=False)


@pytest.fixture(scope="module")
def runs(world_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, named as in RUNS."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (model, train_settings) in RUNS.items():
        write_run(folder / name, PreparedLog(world_log), model, **train_settings)
    return folder


@pytest.fixture(scope="module")
def pages(runs: Path, world_log: Path) -> Path:
    """The folder of the pages over all runs."""
    folders = [str(runs / name) for name in RUNS]
    arguments = ["--log", str(world_log), "--data", "tiny"]
    targets = ["--page", str(runs / "next_item.md"), "--html", str(runs / "out.html")]
    assert main(["compare", *folders, *arguments, *targets]) == 0
    return runs


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def outcome(folder: Path) -> dict[str, float]:
    test = lines(folder)[-1]
    assert test["part"] == "test"
    return test


def validated(folder: Path) -> float:
    best: float = max(line["full_ndcg10"] for line in lines(folder) if line["part"] == "valid")
    return best


def change_metrics(folder: Path, *, valid: float, test: float) -> None:
    """Let a run have had other metrics, the same at every epoch."""
    changed = [
        {name: (valid if line["part"] == "valid" else test) if "_" in name else value
         for name, value in line.items()}
        for line in lines(folder)
    ]  # fmt: skip
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in changed))


def figures(folder: Path) -> dict[str, float]:
    return figures_beside(folder / "next_item.md")


class TestAccuracy:
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_one_run_is_told_as_its_folder_has_it(self, pages, protocol):
        named, test = figures(pages), outcome(pages / "gru4rec")
        row = next(r for r in tables(pages / "next_item.md")[f"Ranking: {protocol}"]
                   if r["model"] == "GRU4Rec")  # fmt: skip
        for metric in METRICS:
            assert named[f"tiny_{protocol}_gru4rec_{metric}"] == test[f"{protocol}_{metric}"]
            head = metric[:-2].upper() + "@" + metric[-2:]
            assert row[head] == f"{test[f'{protocol}_{metric}']:.4f}"
        assert f"tiny_{protocol}_gru4rec_ndcg10_sd" not in named

    def test_seeds_are_averaged_with_their_spread(self, pages):
        values = [outcome(pages / f"sasrec-{seed}")["full_hr20"] for seed in (1, 2)]
        named = figures(pages)
        assert named["tiny_full_sasrec_hr20"] == pytest.approx(statistics.mean(values))
        assert named["tiny_full_sasrec_hr20_sd"] == pytest.approx(statistics.stdev(values))
        row = tables(pages / "next_item.md")["Ranking: full"][1]
        assert row["HR@20"] == f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
        assert row["seeds"] == "1, 2"

    def test_a_budget_is_told(self, pages):
        cost = json.loads((pages / "gru4rec" / COST).read_text())
        row = tables(pages / "next_item.md")["Ranking: full"][0]
        assert row["epochs (best)"] == f"{cost['epochs']} ({cost['best_epoch'] + 1})"
        assert row["training s"] == f"{cost['trained_s']:,.0f}"
        assert row["device"].startswith("cpu, ")
        assert row["runs or source"] == "gru4rec"

    def test_a_run_that_a_limit_ended_is_marked_as_shortened(self, pages):
        rows = tables(pages / "next_item.md")
        assert rows["Ranking: full"][0]["ended by"] == "shortened: max_epochs = 3"
        slow = next(r for r in rows["Variants and ablations"] if "1e-09" in r["differs in"])
        assert slow["ended by"] == "patience"

    def test_a_time_limit_is_told_apart(self, world_log, tmp_path):
        log = PreparedLog(world_log)
        write_run(tmp_path / "run", log, SASREC, max_train_s=1e-6, patience=9, max_epochs=9)
        assert compare([tmp_path / "run"], log).mains["sasrec"].runs[0].ending == "max_train_s"

    def test_published_figures_stand_beside_the_log_they_are_of(self, runs, world_log, tmp_path):
        log = PreparedLog(world_log)
        with pytest.raises(ConfigError, match="ml1m: has 6,040 users, this log 60"):
            write_comparison(
                [runs / "gru4rec"], log, page=tmp_path / "a.md", html=tmp_path / "a.html",
                data="ml1m", command="", device=CPU,
            )  # fmt: skip
        paper = next(p for p in published("ml1m", 6_040) if p.label == "PKM-ACT")
        assert paper.metrics.keys() == set(METRICS)
        assert published("tiny", 60) == ()


class TestChoice:
    def test_the_main_run_of_a_model_has_the_best_validation(self, pages, world_log):
        assert validated(pages / "sasrec-slow") < validated(pages / "sasrec-1")
        comparison = compare([pages / name for name in RUNS], PreparedLog(world_log))
        assert [run.folder.name for run in comparison.mains["sasrec"].runs] == [
            "sasrec-1",
            "sasrec-2",
        ]

    def test_the_test_part_chooses_nothing(self, runs, world_log, tmp_path):
        for name, valid, test in (("sasrec-1", 0.2, 0.3), ("sasrec-slow", 0.1, 0.9)):
            shutil.copytree(runs / name, tmp_path / name)
            change_metrics(tmp_path / name, valid=valid, test=test)
        folders = [tmp_path / "sasrec-slow", tmp_path / "sasrec-1"]
        comparison = compare(folders, PreparedLog(world_log))
        assert comparison.mains["sasrec"].runs[0].folder == tmp_path / "sasrec-1"
        assert comparison.variants[0].runs[0].folder == tmp_path / "sasrec-slow"

    def test_the_best_run_brings_its_seeds_along(self, runs, world_log, tmp_path):
        for name, valid in (("sasrec-1", 0.1), ("sasrec-2", 0.4), ("sasrec-slow", 0.3)):
            shutil.copytree(runs / name, tmp_path / name)
            change_metrics(tmp_path / name, valid=valid, test=0.5)
        comparison = compare(sorted(tmp_path.iterdir()), PreparedLog(world_log))
        assert len(comparison.mains["sasrec"].runs) == 2
        assert comparison.mains["sasrec"].validation.mean == 0.25

    def test_variants_name_what_they_differ_in(self, pages):
        rows = tables(pages / "next_item.md")["Variants and ablations"]
        by_run = {row["runs or source"]: row for row in rows}
        slow = by_run["sasrec-slow"]
        assert slow["differs in"] == "train.learning_rate = 1e-09, not 0.02"
        test = outcome(pages / "sasrec-slow")
        assert slow["validation full NDCG@10"] == f"{validated(pages / 'sasrec-slow'):.4f}"
        assert slow["pop100 HR@10"] == f"{test['pop100_hr10']:.4f}"
        name = "tiny_pop100_sasrec_learning_rate_1e_09_hr10"
        assert figures(pages)[name] == test["pop100_hr10"]
        assert by_run["sasrec-1, sasrec-2"]["differs in"] == "(the main setup)"
        assert "gru4rec" not in by_run

    def test_a_lead_is_tested_where_both_have_seeds(self, runs, world_log):
        folders = [runs / name for name in ("sasrec-1", "sasrec-2", "pkm-1", "pkm-2")]
        comparison = compare(folders, PreparedLog(world_log))
        assert comparison.best_baseline == comparison.mains["sasrec"]
        test = comparison.test_of_lead("full_ndcg20")
        assert test is not None
        values = [comparison.mains[name].values("full_ndcg20") for name in ("pkm_act", "sasrec")]
        assert (test.t > 0) == (sum(values[0]) > sum(values[1]))
        assert 0 < test.p_value < 1
        timed = {"sasrec": 1e-3, "pkm_act": 1e-3}
        measured = Measurements(scoring_s=timed, experts=(), by_length={})
        named = sections.figures(comparison, measured, "tiny")
        assert named["tiny_full_pkm_act_lead_ndcg20_p_value"] == test.p_value
        titles = [section.title for section in sections.sections(comparison, measured, ())]
        assert "PKM-ACT against the best baseline" in titles

    def test_a_lead_of_one_seed_is_not_tested(self, runs, world_log):
        folders = [runs / name for name in ("sasrec-1", "sasrec-2", "pkm-1")]
        assert compare(folders, PreparedLog(world_log)).test_of_lead("full_ndcg20") is None


class TestCitations:
    def test_figures_of_other_pages_stand_beside_the_own(self, runs, world_log, tmp_path):
        (tmp_path / "keys.json").write_text('{"figures": {"retrieval_us": 23.25}}')
        arguments = [str(runs / "gru4rec"), "--log", str(world_log), "--data", "tiny"]
        targets = ["--page", str(tmp_path / "next_item.md"), "--html", str(tmp_path / "out.html")]
        cited = ["--cite", str(tmp_path / "keys.json")]
        assert main(["compare", *arguments, *targets, *cited]) == 0
        assert figures(tmp_path)["retrieval_us"] == 23.25
        assert tables(tmp_path / "next_item.md")["From keys.md"] == [
            {"figure": "retrieval_us", "value": "23.25"}
        ]
        assert "--cite keys.json" in (tmp_path / "next_item.md").read_text()

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"figures": {"a": "b"}}', '{"figures": 1}'])
    def test_what_is_no_page_of_figures_is_refused_before_anything_is_measured(
        self, runs, world_log, tmp_path, text
    ):
        (tmp_path / "keys.json").write_text(text)
        with pytest.raises(ConfigError, match=r'keys\.json: expected JSON with "figures"'):
            write_comparison(
                [runs / "gru4rec"], PreparedLog(world_log), page=tmp_path / "a.md",
                html=tmp_path / "a.html", data="tiny", command="", device=CPU,
                cited=[tmp_path / "keys.json"],
            )  # fmt: skip
        assert not (tmp_path / "a.md").exists()


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (CONFIG, "config.json is missing"),
            (METRICS_FILE, "metrics.jsonl is missing"),
            (COST, "cost.json is missing"),
            (MODEL, "model.pt: no such file"),
        ],
    )
    def test_a_missing_file_is_named(self, runs, world_log, tmp_path, name, message):
        shutil.copytree(runs / "gru4rec", tmp_path / "run")
        (tmp_path / "run" / name).unlink()
        with pytest.raises(CheckpointError, match=f"run.*{message}"):
            compare([tmp_path / "run"], PreparedLog(world_log))

    def test_an_unfinished_run_is_refused(self, runs, world_log, tmp_path):
        shutil.copytree(runs / "gru4rec", tmp_path / "run")
        kept = lines(tmp_path / "run")[:-1]
        (tmp_path / "run" / METRICS_FILE).write_text("\n".join(map(json.dumps, kept)))
        with pytest.raises(CheckpointError, match="run: the run is not finished"):
            compare([tmp_path / "run"], PreparedLog(world_log))

    def test_a_run_without_the_metric_it_watched_is_refused(self, runs, world_log, tmp_path):
        shutil.copytree(runs / "gru4rec", tmp_path / "run")
        metrics = tmp_path / "run" / METRICS_FILE
        metrics.write_text(metrics.read_text().replace("full_ndcg10", "ndcg10"))
        with pytest.raises(CheckpointError, match=r"run: metrics\.jsonl lacks full_ndcg10"):
            compare([tmp_path / "run"], PreparedLog(world_log))

    @pytest.mark.parametrize("text", ["no json", "[1]", '{"epoch": 1}'])
    def test_broken_metrics_are_refused(self, runs, world_log, tmp_path, text):
        shutil.copytree(runs / "gru4rec", tmp_path / "run")
        (tmp_path / "run" / METRICS_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=r"run: metrics\.jsonl is not readable"):
            compare([tmp_path / "run"], PreparedLog(world_log))

    def test_a_broken_cost_is_refused(self, runs, world_log, tmp_path):
        shutil.copytree(runs / "gru4rec", tmp_path / "run")
        (tmp_path / "run" / COST).write_text('{"epochs": "many"}')
        with pytest.raises(CheckpointError, match=r"run: cost\.json: epochs"):
            compare([tmp_path / "run"], PreparedLog(world_log))

    def test_a_folder_with_settings_of_another_run_is_refused(self, runs, world_log, tmp_path):
        shutil.copytree(runs / "gru4rec", tmp_path / "run")
        shutil.copy(runs / "sasrec-1" / CONFIG, tmp_path / "run" / CONFIG)
        with pytest.raises(CheckpointError, match=r"config\.json and model\.pt are of different"):
            compare([tmp_path / "run"], PreparedLog(world_log))

    def test_a_run_of_a_click_model_is_refused(self, runs, world_log, tmp_path):
        shutil.copytree(runs / "gru4rec", tmp_path / "run")
        config = json.loads((tmp_path / "run" / CONFIG).read_text())
        config["model"] = {"name": "imn"}
        (tmp_path / "run" / CONFIG).write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="run: holds a run of imn, expected one of a nex"):
            compare([tmp_path / "run"], PreparedLog(world_log))

    def test_a_run_on_another_log_is_refused(self, runs, world_log, tmp_path):
        shutil.copytree(world_log, tmp_path / "log")
        header = json.loads((tmp_path / "log/log.json").read_text())
        (tmp_path / "log/log.json").write_text(json.dumps({**header, "fingerprint": "other"}))
        with pytest.raises(ConfigError, match=r"gru4rec: was trained on another log than .*log"):
            compare([runs / "gru4rec"], PreparedLog(tmp_path / "log"))

    def test_one_run_twice_is_refused(self, runs, world_log, tmp_path):
        shutil.copytree(runs / "gru4rec", tmp_path / "again")
        with pytest.raises(ConfigError, match=r"again: has the settings and the seed of .*gru4rec"):
            compare([runs / "gru4rec", tmp_path / "again"], PreparedLog(world_log))

    def test_rankings_of_different_kinds_are_refused(self, runs, world_log, tmp_path):
        def changed(**next_item: object) -> Path:
            shutil.copytree(runs / "gru4rec", tmp_path / "run", dirs_exist_ok=True)
            path: Path = tmp_path / "run" / CONFIG
            config = json.loads(path.read_text())
            config["next_item"] |= next_item
            path.write_text(json.dumps(config))
            content = torch.load(tmp_path / "run" / MODEL, weights_only=True)
            content["fields"]["config"] = config
            torch.save(content, tmp_path / "run" / MODEL)
            return path.parent

        log = PreparedLog(world_log)
        with pytest.raises(ConfigError, match=r"n_ranked = 9, .*sasrec-1 with 100"):
            compare([runs / "sasrec-1", changed(n_ranked=9)], log)
        metrics = changed(protocols=["pop100", "full"]) / METRICS_FILE
        metrics.write_text(metrics.read_text().replace("full_ndcg10", "pop100_ndcg10"))
        with pytest.raises(ConfigError, match=r"watched pop100_ndcg10, in .*sasrec-1 full_ndcg10"):
            compare([runs / "sasrec-1", tmp_path / "run"], log)

    def test_the_command_line_ends_in_one_clear_line(self, runs, world_log, tmp_path, capsys):
        targets = ["--page", str(tmp_path / "a.md"), "--html", str(tmp_path / "no/a.html")]
        assert main(["compare", str(runs / "gru4rec"), "--log", str(world_log), *targets]) == 2
        assert re.fullmatch(r"error: .*a\.html: there is no folder .*\n", capsys.readouterr().err)


class TestPages:
    def test_every_model_has_a_label(self):
        assert tuple(LABELS) == MODELS

    def test_the_html_page_has_its_plots_and_refers_to_nothing(self, pages):
        page = (pages / "out.html").read_text()
        assert page.count("<svg") == 3  # trade-off, key usage, expert load
        assert "http" not in page
        assert not re.search(r"(src|href)=\"(?!#)", page)
        for word in ("Ranking: pop100", "Key usage", "Expert load", "SASRec", "layer 1"):
            assert word in page

    def test_the_command_names_no_place_of_this_machine(self, pages):
        command = json.loads((pages / "next_item.json").read_text())["command"]
        assert command.startswith("python -m training compare sasrec-1 sasrec-2 ")
        assert str(pages) not in (pages / "next_item.md").read_text()

    def test_key_usage_counts_experts_that_were_ever_selected(self, pages):
        named, rows = figures(pages), tables(pages / "next_item.md")["Key usage"]
        assert [row["K"] for row in rows] == ["16", "64"]
        told = [value for name, value in named.items() if name.endswith("key_usage_layer1")]
        assert all(0 < usage <= 1 for usage in told)
        assert {row["layer 1"] for row in rows} == {f"{usage:.1%}" for usage in told}

    def test_only_runs_that_differ_in_nothing_else_show_key_usage(self, pages, world_log):
        comparison = compare([pages / n for n in RUNS if "pkm" in n], PreparedLog(world_log))
        names = {run.folder.name for one in retrieval_setups(comparison) for run in one.runs}
        assert names == {"pkm-1", "pkm-2", "pkm-more-keys"}

    def test_runs_without_experts_have_no_plot_of_them(self, runs, world_log, tmp_path):
        write_comparison(
            [runs / "gru4rec"], PreparedLog(world_log), page=tmp_path / "a.md",
            html=tmp_path / "a.html", data="tiny", command="", device=CPU,
        )  # fmt: skip
        assert (tmp_path / "a.html").read_text().count("<svg") == 1
        assert set(tables(tmp_path / "a.md")) == {
            *(f"Ranking: {protocol}" for protocol in PROTOCOLS),
            "Quality, latency, parameters",
        }

    def test_costs_over_the_length_make_a_section_and_two_ratios(self, runs, world_log):
        comparison = compare([runs / "sasrec-1", runs / "pkm-1"], PreparedLog(world_log))
        measured = Measurements(
            scoring_s={"sasrec": 1e-3, "pkm_act": 2e-3},
            experts=(),
            by_length={
                name: {length: LengthCost(encode_s=length * s, step_bytes=length * size)
                       for length in LENGTHS}
                for name, s, size in (("sasrec", 3e-6, 1000), ("pkm_act", 2e-6, 250))
            },
        )  # fmt: skip
        named = sections.figures(comparison, measured, "tiny")
        assert named["tiny_sasrec_scoring_ms"] == 1.0
        assert named["sasrec_encode_ms_L64"] == pytest.approx(64 * 3e-3)
        assert named["pkm_act_training_step_mb_L512"] == 512 * 250 / 1e6
        assert named["pkm_act_speedup_over_sasrec_L1024"] == pytest.approx(1.5)
        assert named["pkm_act_memory_over_sasrec_L1024"] == 0.25
        section = sections.sections(comparison, measured, ())[-1]
        assert section.table.rows[0] == ("SASRec", "64", "0.19", "0.1")
        assert len(section.table.rows) == 2 * len(LENGTHS)
        assert section.svg is not None

    def test_costs_are_taken_of_both_forms_and_of_the_published_baseline(
        self, runs, world_log, tmp_path
    ):
        log = PreparedLog(world_log)
        write_run(tmp_path / "causal", log, {**PKM_ACT, "form": "causal", "time_features": False})
        folders = [runs / "sasrec-1", runs / "pkm-1", tmp_path / "causal"]
        comparison = compare(folders, log)
        main = comparison.mains["pkm_act"].settings["model.form"]
        subjects = cost_subjects(comparison, log)
        other = {"last": "causal", "causal": "last"}[main]
        assert list(subjects) == ["sasrec", "pkm_act", "sasrec_as_published", f"pkm_act_{other}"]
        assert [name for name, one in subjects.items() if one.as_published] == [
            "sasrec_as_published"
        ]
        assert subjects[f"pkm_act_{other}"].config.model.model_dump()["form"] == other

    def test_the_parameters_are_the_models(self, pages):
        model = load_model(pages / "gru4rec" / MODEL).model
        count = sum(parameter.numel() for parameter in model.parameters())
        assert figures(pages)["tiny_gru4rec_parameters"] == count
