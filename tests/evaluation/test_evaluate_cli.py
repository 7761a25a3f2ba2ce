"""The command itself: composing, refusing, answers of every odd kind, and what it leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_judge import PLAIN, Answer, StubServer, ifeval_rows, settings
from helpers_models import tiny_llama
from helpers_tokenizer import THINKING, tiny_tokenizer
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from iopo.evaluation.config import (
    BOOTSTRAP,
    BenchmarkSection,
    EvaluateConfig,
    GenerateSection,
    ModelSection,
)
from iopo.evaluation.responses import default_out
from iopo.evaluation.run import evaluate, find, names
from iopo.files import read_records, write_records

ROOT = Path(__file__).resolve().parents[2]
ROWS = ifeval_rows(1000, 1001, 1005, 1012)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_records(tmp_path / "data.jsonl", ROWS)
    return tmp_path / "data.jsonl"


def compose_evaluate(*overrides: str) -> EvaluateConfig:
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_object(compose("evaluate", list(overrides)))
    assert isinstance(config, EvaluateConfig)
    return config


def test_every_benchmark_and_judge_composes() -> None:
    files = [path.stem for path in (ROOT / "conf" / "benchmark").glob("*.yaml")]
    assert sorted(files) == names(), "a module and a yaml for each benchmark"
    for name in names():
        module = find(name)
        assert hasattr(module, "evaluate") or module.BENCHMARK.source.benchmark == name
        assert compose_evaluate(f"+benchmark={name}", "model.path=x").benchmark.name == name
    for judge in (ROOT / "conf" / "judge").glob("*.yaml"):
        compose_evaluate("+benchmark=trace", f"judge={judge.stem}", "model.path=x")
    assert compose_evaluate("+benchmark=trace", "model.path=x").generate.temperature == 0.1
    assert compose_evaluate("+benchmark=ifeval", "model.path=x").generate.temperature == 0.0
    found = compose_evaluate("+benchmark=trace", "model.path=x", "generate.temperature=0")
    assert found.generate.temperature == 0.0, "the command line wins over the benchmark"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("judge.modle=x", "modle"),
        ("generate.max_new_tokens=many", "max_new_tokens"),
        ("judge.style=clever", "style"),
    ],
)
def test_unknown_keys_and_types_fail_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigCompositionException) as error:
        compose_evaluate("+benchmark=trace", "model.path=x", override)
    assert message in str(error.value) + str(error.value.__cause__)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "nothing to score"),
        (["model.path=x", "responses.path=y"], "model.path and responses.path are all set"),
        (["model.adapter=x", "responses.path=y"], "adapter is set without model.path"),
        (["generate.base_url=x"], "without generate.model"),
        (["model.path=x", "limit=0"], "limit is 0"),
        (["model.path=x", "benchmark.scored=-1"], "scored is -1"),
        (["model.path=x", "benchmark.scored=0"], "no log-probs for benchmark.controls"),
        (["model.path=x", "judge.concurrency=0"], "concurrency is 0"),
        (["model.path=x", "generate.temperature=-1"], "temperature is -1"),
        (["responses.path=x", "+model.template_options={a: 1}"], "no effect with responses.path"),
        (
            [
                "generate.base_url=x",
                "generate.model=m",
                "+model.template_options={a: 1}",
                "+generate.extra={chat_template_kwargs: {}}",
            ],
            "would replace generate.extra.chat_template_kwargs",
        ),
    ],
)
def test_impossible_settings_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_evaluate("+benchmark=ifeval", *overrides)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "evaluate.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_scores_answers(data: Path, tmp_path: Path) -> None:
    rows = [{"key": row["key"], "response": PLAIN} for row in ROWS]
    rows[1]["response"] = "Now, this has a comma and capitals"
    write_records(tmp_path / "answers.jsonl", rows[::-1])
    done = command(
        "+benchmark=ifeval",
        f"data.path={data}",
        f"responses.path={tmp_path / 'answers.jsonl'}",
        f"out={tmp_path / 'out'}",
    )
    assert done.returncode == 0, done.stderr
    assert "prompt_strict" in done.stdout and "75.0" in done.stdout
    verdicts = read_records(tmp_path / "out" / "verdicts.jsonl")
    assert verdicts[0] == {
        "key": 1000, "strict": [True, True], "loose": [True, True], "hollow": [],
    }  # fmt: skip
    assert [row["key"] for row in verdicts] == [1000, 1001, 1005, 1012], "in the data's order"
    assert verdicts[1]["strict"] == [False, False]
    for name in ("responses.jsonl", "scores.json", "report.html", "measures.jsonl"):
        assert (tmp_path / "out" / name).is_file()
    assert not list(tmp_path.glob("**/.hydra")) and not (ROOT / "outputs").exists()
    refused = command("+benchmark=ifeval", "model.path=x", "data.path=/nowhere")
    assert refused.returncode == 2
    assert "google-research" in refused.stderr and "Traceback" not in refused.stderr
    unnamed = command()
    assert unnamed.returncode == 2
    assert "+benchmark=NAME" in unnamed.stderr and "Traceback" not in unnamed.stderr


def test_odd_answers_are_counted_not_fatal(data: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    answers = tmp_path / "answers.jsonl"
    rows = [
        {"key": 1000, "response": PLAIN},
        {"key": 1000, "response": PLAIN},  # the same twice
        {"id": "1001", "response": "  \n"},
        {"key": 1005, "response": "word " * 200_000},  # 1 MB
        {"key": 9999, "response": "for another data file"},
    ]
    write_records(answers, rows)
    scores = evaluate(settings(data, answers))
    assert scores["responses"] == {
        "answers": 3, "empty": 1, "missing": 1, "unknown": 1, "repeated": 1, "failed": 0,
        "cut_at_token_limit": 0, "unpinned": 0,
    }  # fmt: skip
    assert scores["scores"]["prompt_strict"]["n"] == 4, "missing answers stay in the denominator"
    text = caplog.text
    for part in (
        "no answer to 1 items (1012)",
        "1 ids that the data lacks (9999)",
        "1 empty",
        "1 answers are there twice",
    ):
        assert part in text
    assert (data.parent / "out" / "report.html").stat().st_size < 200_000


def test_thinking_is_not_scored(data: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    answers = tmp_path / "answers.jsonl"
    said = {1000: PLAIN, 1001: "Now, capitals", 1005: PLAIN, 1012: ""}
    thinking = dict.fromkeys(said, "<think>\nSo, PLAN.\n</think>\n\n") | {1012: "<think>\n" + PLAIN}
    # of a server whose template ends with <think>
    opened = {key: before.removeprefix("<think>") for key, before in thinking.items()}
    for number, before in enumerate(({}, thinking, opened)):
        rows = [{"key": key, "response": before.get(key, "") + said[key]} for key in said]
        if before is opened:
            rows[-1]["finish_reason"] = "length"
        write_records(answers, rows)
        out = tmp_path / f"out{number}"
        scores = evaluate(settings(data, answers, out=str(out)))
        assert scores["scores"]["prompt_strict"]["value"] == 0.5
        assert scores["responses"]["empty"] == 1
        assert read_records(out / "responses.jsonl") == rows, "as they came"
        note = "thinking removed from 4 answers, 1 unclosed, which are empty"
        assert (note in scores["notes"]) == (f"note: {note}" in caplog.text) == bool(before)


def test_template_options_are_known_to_the_template_or_refused(data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer(THINKING).save_pretrained(model)
    for name, file in (("ifeval", data), ("quads", ROOT / "data/verified/heldout.jsonl")):
        config = settings(
            file,
            out=str(tmp_path / name),
            benchmark=BenchmarkSection(name),
            model=ModelSection(str(model), template_options={"tone": 1}),
            bootstrap=BOOTSTRAP,
        )
        with pytest.raises(ValueError, match="never reads tone; expected some of enable_thinking"):
            evaluate(config)
        assert not Path(config.out or "").exists()


def test_a_server_is_sent_the_template_options(data: Path) -> None:
    with StubServer(lambda body, before: Answer(PLAIN)) as server:
        section = GenerateSection(base_url=server.base_url, model="m")
        options = {"enable_thinking": False}
        evaluate(settings(data, generate=section, model=ModelSection(template_options=options)))
        assert all(body["chat_template_kwargs"] == options for body in server.bodies)
    manifest = json.loads((data.parent / "out" / "responses.manifest.json").read_text())
    assert manifest["extra"] == {"chat_template_kwargs": options}


def test_answers_may_be_named_by_their_prompt(data: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    other = {"prompt": "of another file", "response": "a"}
    write_records(answers, [{"prompt": ROWS[1]["prompt"], "response": PLAIN}, other])
    assert evaluate(settings(data, answers))["responses"]["unknown"] == 1
    said = read_records(tmp_path / "out" / "responses.jsonl")
    assert [(row["key"], row["response"]) for row in said] == [(1001, PLAIN)]
    write_records(data, [*ROWS, ROWS[1] | {"key": 7}])
    with pytest.raises(ValueError, match='answers.jsonl:1: .* a "prompt" that only one item has'):
        evaluate(settings(data, answers))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"key": 1000, "response": "\xff"}\n', r"answers.jsonl:1: the line is not UTF-8"),
        (b'{"key": 1000, "response": "a"\n{"key": 1}\n', r"answers.jsonl:1: "),
        (b'{"key": 1000}\n', 'answers.jsonl:1: "response": expected text, found nothing'),
        (b'{"key": 1000, "response": null}\n', "found NoneType"),
        (b'{"response": "a"}\n', 'expected "id" or "key"'),
        (b'{"key": 1000.5, "response": "a"}\n', "with text or a whole number"),
        (
            b'{"key": 1000, "response": "a"}\n{"key": "1000", "response": "b"}\n',
            "answers.jsonl:2: a second, different answer to 1000",
        ),
        (b'{"key": 1, "response": "a"}\n', "none of 1 ids is in the data"),
        (b"\n", "no answers in it"),
    ],
)
def test_answers_that_cannot_be_read(
    data: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        evaluate(settings(data, answers))
    with pytest.raises(ValueError, match="no such file"):
        evaluate(settings(data, tmp_path / "mistyped.jsonl"))


def test_answers_are_not_overwritten_by_their_copy(data: Path, tmp_path: Path) -> None:
    answers = tmp_path / "out" / "responses.jsonl"
    answers.parent.mkdir()
    write_records(answers, [{"key": 1000, "response": "a"}])
    config = settings(data, answers)
    config.out, config.limit = str(answers.parent), 1
    with pytest.raises(ValueError, match="would be overwritten"):
        evaluate(config)


@pytest.mark.parametrize(
    ("path", "folder"),
    [("runs/iopo/export", "iopo_export"), ("demo", "demo"), ("/export", "export")],
)
def test_models_of_one_name_have_folders_of_their_own(path: str, folder: str) -> None:
    config = compose_evaluate("+benchmark=ifeval", f"model.path={path}")
    assert default_out(config) == Path("runs/evaluate/ifeval") / folder


def test_scoring_answers_does_not_wait_for_torch() -> None:
    code = "import sys, evaluate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_whole_numbers_that_pandas_writes_as_floats_are_ids(data: Path, tmp_path: Path) -> None:
    rows = read_records(data)
    answers = [{"key": float(row["key"]), "response": PLAIN} for row in rows]
    write_records(data, [{**row, "key": float(row["key"])} for row in rows])
    write_records(tmp_path / "answers.jsonl", answers)
    found = evaluate(settings(data, tmp_path / "answers.jsonl"))["responses"]
    assert found["answers"] == len(rows) and not found["missing"] and not found["unknown"]
    verdicts = read_records(data.parent / "out" / "verdicts.jsonl")
    assert [row["key"] for row in verdicts] == [row["key"] for row in rows]


def test_the_report_escapes_what_answers_hold(data: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    write_records(answers, [{"key": 1000, "response": "<script>alert(1)</script> \ud800"}])
    evaluate(settings(data, answers))
    page = (data.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_plan_touches_nothing(data: Path, tmp_path: Path) -> None:
    found = evaluate(settings(data, plan=True))
    assert found["items"] == 4 and found["answers_to_make"] == 4
    assert not (data.parent / "out").exists()


def test_scores_hold_what_is_needed_to_repeat_them(data: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    write_records(answers, [{"key": 1000, "response": PLAIN}])
    evaluate(settings(data, answers, limit=2))
    scores = json.loads((data.parent / "out" / "scores.json").read_text())
    assert scores["items"] == 2 and len(scores["data"]["sha256"]) == 64
    assert scores["data"]["known"] is False
    assert scores["config"]["judge"]["style"] == "robust"


def test_a_misspelt_option_ends_with_code_2(data: Path) -> None:
    for wrong in ("generate.tempature=0", "+generate.tempature=0", "+benchmrk=ifeval"):
        done = command("+benchmark=ifeval", f"data.path={data}", "model.path=x", wrong)
        assert done.returncode == 2 and not done.stdout, wrong
