"""The comparison's tables, from run folders written by hand with known answers."""

import json
import shutil
from pathlib import Path

import pytest

from iopo.experiments.paper_table import gains
from iopo.experiments.paper_table import table as comparison_table
from iopo.experiments.paper_table.measures import HIGH, LOW, measures
from iopo.experiments.paper_table.table import REGIMES, TWICE
from iopo.files import write_records

QUADS = 40
TASKS = {f"q{n}": f"Task {n // 2}." for n in range(QUADS)}  # two quads of each, of two splits
SPLITS = ("seen", "unseen_params", "unseen_kinds", "seen")


def model(
    folder: Path,
    follows: int,
    logps: list[float],
    *,
    prompts: int = 0,
    text: str = "two words",
    hollow: int = 5,
) -> None:
    """A measured model: its first answers of 80 follow or are hollow, its first of 20 prompts pass
    (IFEval)."""
    rows = [
        {
            "id": f"q{n // 2}/{n % 2 + 1}", "prompt": "p", "text": text,
            "finish_reason": "stop", "split": SPLITS[n // 2 % 4], "kinds": ["case"],
            "follows": [n < follows], "texts": ["Lower case."],
            "hollow": ["too_short"] if n < hollow else [], "task_rank": None,
        }
        for n in range(2 * QUADS)
    ]  # fmt: skip
    (folder / "quads").mkdir(parents=True)
    write_records(folder / "quads/verdicts.jsonl", rows)
    write_records(
        folder / "quads/logps.jsonl", [{"id": f"q{n}", "logps": logps} for n in range(QUADS)]
    )
    plain = {"sha256": "abcdefgh0", "nats_per_token": [3.0, 3.5], "perplexity": 26.0}
    (folder / "quads/scores.json").write_text(json.dumps({"plain_text": plain}))
    (folder / "ifeval").mkdir()
    write_records(folder / "ifeval/measures.jsonl", [
        {"metric": metric, "unit": str(n), "numerator": float(n < prompts), "denominator": 1}
        for metric in ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
        for n in range(20)
    ])  # fmt: skip


def trained(run: Path, method: str, seed: int, follows: int, logps: list[float]) -> None:
    folder = run / "paper_table" / method / f"seed{seed}"
    model(folder, follows, logps, prompts=10, text=f"word {method}")
    write_records(folder / "metrics.jsonl", [
        {"step": step, "split": "train", "tokens_per_s": 100.0, "step_s": 2.0, "grad_norm": step}
        for step in (1, 2, 3)
    ])  # fmt: skip
    facts = {
        "time": "2026-11-25T05:00:00+0000", "git_commit": "0123456789abcdef", "git_diff": "",
        "python": "3.11.7", "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
        "cpu": "a processor", "cpu_cores": 2, "gpus": [],
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps([facts]))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    model(run / "base", 10, [-4.0, -3.0, -4.0, -3.0])
    model(run / "sft", 20, [-2.0, -3.0, -2.0, -3.0], prompts=10)
    for seed in (1, 2):
        trained(run, "dpo", seed, 20 + seed, [-2.0, -4.0, -2.0, -4.0])
        trained(run, "output_preference", seed, 40, [-2.5, -5.0, -2.5, -5.0])
        trained(run, "iopo", seed, 40 + 20 * (seed - 1), [-2.5, -6.0, -2.5, -6.0])
    (run / "data").mkdir()
    write_records(run / "data/test.jsonl", [{"id": q, "task": t} for q, t in TASKS.items()])
    (run / "data/counts.json").write_text(json.dumps({"train": 384, "test_splits": {"seen": 1}}))
    choice = {"chosen": {"iopo": ["optim.lr=1e-5", "objective.beta=0.2"]}}
    (run / "choice.json").write_text(json.dumps(choice))
    write_records(run / "jobs.jsonl", [
        {"job": "paper_table/iopo/seed1 train", "code": 75, "seconds": 5.0,
         "peak_rss_gb": 3.0},
        {"job": "paper_table/iopo/seed1 train", "code": 0, "seconds": 7.0,
         "peak_rss_gb": 2.0},
    ])  # fmt: skip
    comparison_table.write(run, "paper_table")
    return run


def test_values_and_differences_are_those_of_the_files(run):
    found = json.loads((run / "paper_table.json").read_text())
    values, differences = found["values"], found["differences"]
    assert values["SFT"]["following"]["value"] == pytest.approx(20 / 80)
    assert values["IOPO"]["following"]["value"] == pytest.approx(50 / 80)
    assert values["IOPO"]["following_answering"]["value"] == pytest.approx(45 / 80)
    assert values["IOPO"]["answering"]["value"] == pytest.approx(75 / 80)
    assert values["IOPO"]["following"]["n"] == len(set(TASKS.values()))
    assert values["base"]["group_accuracy"]["value"] == 0
    assert values["base"]["group_accuracy"]["high"] > 0.1  # not certain: twenty tasks
    assert LOW not in differences["SFT"]["IOPO"] and HIGH not in differences["SFT"]["IOPO"]
    assert values["DPO"]["group_accuracy"]["value"] == 1
    assert differences["SFT"]["IOPO"]["following"]["value"] == pytest.approx(30 / 80)
    assert differences["SFT"]["IOPO"]["as_sft"]["value"] == pytest.approx(-1)
    ratio = differences["SFT"]["IOPO"]["logratio_matched"]
    assert ratio["value"] == ratio["low"] == ratio["high"] == pytest.approx(-0.5)
    assert values["IOPO"]["logratio_mismatched"]["value"] == pytest.approx(-3)


def test_only_what_excludes_zero_is_called_a_gain(run):
    text = (run / "paper_table.md").read_text()
    against_sft = text[text.index("## Minus SFT") : text.index("## Minus DPO on both rows")]
    row = next(x for x in against_sft.splitlines() if x.startswith("| follows all"))
    head = next(x for x in against_sft.splitlines() if x.startswith("|  |"))
    cells = dict(zip(head.split("|")[2:-1], row.split("|")[2:-1], strict=True))
    assert cells[" IOPO "].startswith(" +37.5 [") and cells[" IOPO "].endswith(" gain ")
    sure = next(x for x in against_sft.splitlines() if x.startswith("| answers word for word"))
    assert sure.count("-100.0 [-100.0, -100.0] lower† ") == 3
    assert cells[" DPO "].startswith(" +1.9 [") and cells[" DPO "].endswith(" not shown ")
    same = next(x for x in against_sft.splitlines() if x.startswith("| IFEval prompt strict"))
    assert same.count("+0.0 [+0.0, +0.0] not shown") == 3


def test_the_gain_over_dpo_is_the_sum_of_its_parts(run, tmp_path):
    """Of the seeds that all three have."""
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "paper_table/dpo/seed1")
    comparison_table.write(folder, "paper_table")
    text = (folder / "paper_table.md").read_text()
    split = text[text.index("## Where the gain over DPO comes from") :]
    row = next(x for x in split.splitlines() if x.startswith("| follows all"))
    whole, data, loss = (float(cell.split()[0]) for cell in row.split("|")[2:-1])
    assert whole == pytest.approx(100 * (60 - 22) / 80, abs=0.06)
    assert whole == pytest.approx(data + loss, abs=0.11)


def test_costs_and_provenance(run):
    text = (run / "paper_table.md").read_text()
    # both attempts' time, the larger peak
    assert "| IOPO | 3 | 600 | 12 | 3.0 | 1.00 | 2.00 | 3.00 |" in text
    assert "2026-11-25" in text and "2 cores of a processor" in text and "0123456789ab" in text
    assert "chosen for iopo: optim.lr=1e-5 objective.beta=0.2" in text
    picture = run / "paper_table_differences.png"
    assert picture.stat().st_size > 1000 and f"({picture.name})" in text


def test_an_ablation_stands_beside_iopo_and_against_it(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    folder = run / "ablation_beta/iopo-objective.beta-0.5/seed1"
    model(folder, 60, [-2.5, -6.0, -2.5, -6.0], prompts=10)
    comparison_table.write(run, "ablation_beta")
    found = json.loads((run / "ablation_beta.json").read_text())
    assert list(found["values"]) == [
        "base", "SFT", "DPO on both rows", "IOPO", "IOPO beta=0.5",
    ]  # fmt: skip
    gain = found["differences"]["IOPO"]["IOPO beta=0.5"]["following"]
    assert gain["value"] == pytest.approx(20 / 80)  # of seed 1, the one both have


def test_regimes_compare_the_two_on_the_same_quads(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    for sweep, change, ahead in (
        ("ablation_apart", "optim.lr-5e-5-objective.beta-0.2", 4),
        ("ablation_regimes", "optim.lr-5e-5-objective.beta-0.2-data.train-noise10.jsonl", 6),
    ):
        for method, follows in (("iopo", 50), ("output_preference", 50 - ahead)):
            folder = run / sweep / f"{method}-{change}" / "seed1"
            model(folder, follows, [-2.5, -6.0, -2.5, -6.0], prompts=10)
    comparison_table.write(run, "ablation_regimes")
    found = json.loads((run / "ablation_regimes.json").read_text())["questions"][REGIMES]
    gains = {name: of["following"]["value"] for name, of in found.items()}
    assert gains == pytest.approx({
        "main table": 10 / 80, "lr=5e-5 beta=0.2": 4 / 80,
        "lr=5e-5 beta=0.2 train=noise10": 6 / 80,
    })  # fmt: skip


def test_dpo_on_both_rows_at_twice_the_beta_stands_against_iopo(run, tmp_path):
    """And an ablation has the runs of the others beside its own."""
    run = shutil.copytree(run, tmp_path / "run")
    for place, follows in (
        ("ablation_apart/iopo-optim.lr-5e-5-objective.beta-0.5", 50),
        ("ablation_apart/output_preference-optim.lr-5e-5-objective.beta-0.5", 40),
        ("ablation_double_beta/output_preference-optim.lr-5e-5-objective.beta-1.0", 47),
    ):
        model(run / place / "seed1", follows, [-2.5, -6.0, -2.5, -6.0], prompts=10)
    comparison_table.write(run, "ablation_double_beta")
    found = json.loads((run / "ablation_double_beta.json").read_text())["questions"]
    gains = {name: of["following"]["value"] for name, of in found[TWICE].items()}
    assert gains == pytest.approx({"IOPO lr=5e-5 beta=0.5": 3 / 80})
    assert found[REGIMES]["lr=5e-5 beta=0.5"]["following"]["value"] == pytest.approx(10 / 80)


def test_two_sittings_give_the_tables_of_their_seeds_together(run, tmp_path):
    whole = json.loads((run / "paper_table.json").read_text())
    kept = (run / "paper_table_measures.jsonl.gz").read_bytes()
    folders = tmp_path / "first", tmp_path / "second"
    for folder, seed in zip(folders, ("seed1", "seed2"), strict=True):
        shutil.copytree(run, folder)
        for other in folder.glob("paper_table/*/seed*"):
            if other.name != seed:
                shutil.rmtree(other)
    comparison_table.write(folders[0], "paper_table")
    first = folders[0] / "paper_table_measures.jsonl.gz"
    comparison_table.write(folders[1], "paper_table", [first])
    found = json.loads((folders[1] / "paper_table.json").read_text())
    assert found["differences"] == whole["differences"]  # SFT's seeds are alike here
    assert found["values"]["IOPO"] == whole["values"]["IOPO"]
    comparison_table.write(run, "paper_table")
    assert (run / "paper_table_measures.jsonl.gz").read_bytes() == kept
    merged = folders[1] / "paper_table_measures.jsonl.gz"
    with pytest.raises(ValueError, match="seed 1, is in two sittings"):
        comparison_table.write(folders[0], "paper_table", [merged])
    with pytest.raises(ValueError, match="expected the kept measures"):
        comparison_table.write(run, "paper_table", [run / "jobs.jsonl"])


def test_methods_without_a_common_seed_are_not_compared(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    for method, seed in (("iopo", 1), ("output_preference", 2)):
        shutil.rmtree(folder / f"paper_table/{method}/seed{seed}")
    comparison_table.write(folder, "paper_table")
    found = json.loads((folder / "paper_table.json").read_text())
    assert found["differences"]["DPO on both rows"]["IOPO"] == {}
    assert "following" in found["differences"]["DPO on both rows"]["DPO"]
    assert not any(found["questions"][comparison_table.PARTS].values())


def test_a_sitting_has_its_own_checkpoint(run, tmp_path):
    """The second sitting's SFT follows 40 of 80 and not 20: its run is paired with that."""
    folder = tmp_path / "second"
    shutil.copytree(run, folder)
    for other in (*folder.glob("paper_table/*/seed2"), folder / "paper_table/output_preference"):
        shutil.rmtree(other)
    shutil.rmtree(folder / "sft")
    model(folder / "sft", 40, [-2.0, -3.0, -2.0, -3.0], prompts=10)
    for own in folder.glob("paper_table/*/seed1"):
        own.rename(own.with_name("seed3"))
    comparison_table.write(folder, "paper_table", [run / "paper_table_measures.jsonl.gz"])
    found = json.loads((folder / "paper_table.json").read_text())
    assert found["values"]["SFT"]["following"]["value"] == pytest.approx((20 + 40) / 160)
    gains = {m: of["following"]["value"] for m, of in found["differences"]["SFT"].items()}
    assert gains["IOPO"] == pytest.approx((40 + 60 + 40 - 20 - 20 - 40) / 240)
    assert gains["DPO on both rows"] == pytest.approx((40 + 40 - 20 - 20) / 160)
    assert gains["DPO"] == pytest.approx((21 + 22 + 21 - 20 - 20 - 40) / 240)


def test_following_stands_by_the_sign_of_the_smaller_margin(tmp_path):
    model(tmp_path / "sft", 20, [-2.0, -3.0, -2.0, -3.0])
    model(tmp_path / "one", 30, [-2.0, -4.0, -2.0, -4.0])
    path = tmp_path / "one/quads/logps.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:10]:
        row["logps"] = [-2.0, -2.5, -2.0, -4.0]  # margins of -0.5 and 1 nats
    write_records(path, rows)
    found = measures(tmp_path / "one", tmp_path / "sft", TASKS)
    totals = {
        name: [sum(column) for column in zip(*found[name].values(), strict=True)]
        for name in (LOW, HIGH, "one_margin_negative")
    }
    # answers 5 to 29 follow and are not hollow; the first 20 are of the ten quads
    assert totals == {LOW: [15, 20], HIGH: [10, 60], "one_margin_negative": [10, 40]}
    assert LOW not in measures(tmp_path / "sft", tmp_path / "sft", TASKS)


def test_reliability_stands_beside_where_it_was_measured(run):
    """Of all prompts with cousins; those that the model had not followed were not asked again."""
    everything = [{"cousin_of": n, "change": "none"} for n in range(25)]
    write_records(run / "data/cousins.jsonl", everything)
    for folder, reliable, asked in (
        (run / "sft", 4, 20), (run / "paper_table/iopo/seed1", 8, 15),
    ):  # fmt: skip
        (folder / "cousins").mkdir()
        write_records(folder / "cousins.jsonl", everything[:asked])
        write_records(folder / "cousins/measures.jsonl", [
            {"metric": metric, "unit": str(n), "numerator": number, "denominator": of}
            for n in range(asked)
            for metric, number, of in (
                ("follows_and_answers", float(n < 10), 1.0),
                ("reliable", float(n < reliable), 1.0),
                ("drop", float(reliable <= n < 10), float(n < 10)),
                ("prompt_strict", 1.0, 1.0),
            )
        ])  # fmt: skip
    comparison_table.write(run, "paper_table")
    found = json.loads((run / "paper_table.json").read_text())
    drops = [found["values"][name]["drop"]["value"] for name in ("SFT", "IOPO")]
    assert drops == pytest.approx([0.6, 0.2]) and "drop" not in found["values"]["DPO"]
    assert found["differences"]["SFT"]["IOPO"]["reliable"]["value"] == pytest.approx(0.16)
    assert found["values"]["SFT"]["before_cousins"]["value"] == pytest.approx(0.4)
    assert found["values"]["SFT"]["prompt_strict"]["value"] == pytest.approx(0.5)  # IFEval's own


def test_the_figure_shows_what_each_step_adds(tmp_path):
    def less(value: float) -> dict:
        return {
            "following_answering": {"value": value, "low": value - 1, "high": value + 3, "n": 9}
        }

    to_rows = {"DPO": less(-9), "IOPO": less(2)}
    to_sft = {"SFT": {"SFT, continued": less(7)}, "SFT, continued": {"DPO": less(11)}}
    both = {"differences": to_sft | {"DPO on both rows": to_rows}}
    rounds = {
        "differences": {"IOPO, rounds": {"IOPO, one pass": less(5), "GRPO, rounds": less(-4)}}
    }
    for name, content in (("both.json", both), ("rounds.json", rounds)):
        (tmp_path / name).write_text(json.dumps(content))
    steps = gains.steps(both, rounds)
    found = [of["following_answering"] for of in steps.values()]
    ends = [(one["low"], one["value"], one["high"]) for one in found]
    assert ends == [(6, 7, 10), (10, 11, 14), (6, 9, 10), (1, 2, 5), (-8, -5, -4), (-5, -4, -1)]
    paths = [str(tmp_path / name) for name in ("both.json", "rounds.json", "gains.png")]
    assert gains.main(paths) == 0 and (tmp_path / "gains.png").stat().st_size > 1000
    assert gains.main([paths[1], *paths[1:]]) == 2


def test_what_cannot_be_compared_is_refused(run, tmp_path, capsys):
    assert comparison_table.main([str(tmp_path)]) == 2
    assert "SFT checkpoint was not measured" in capsys.readouterr().err
    logps = run / "base/quads/logps.jsonl"
    whole = logps.read_text()
    logps.write_text(whole.splitlines()[0] + "\n")
    assert comparison_table.main([str(run)]) == 2
    assert "scored on different quads" in capsys.readouterr().err
    logps.write_text(whole)
