"""IFBench: the adapter around verifiers that the authors publish."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from iopo.evaluation.benchmarks import ifbench
from iopo.files import write_records


class Contains:
    """A verifier with the authors' interface: the response must hold a word."""

    def __init__(self, name: str):
        self.name = name
        self.arguments: dict[str, Any] = {}

    def build_description(self, **arguments: Any) -> str:
        assert None not in arguments.values(), "nulls are left out"
        self.arguments |= arguments
        return ""

    def get_instruction_args(self) -> dict[str, Any]:
        return self.arguments

    def check_following(self, text: str) -> bool:
        return text.startswith(self.arguments["word"])


@pytest.fixture
def verifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = types.ModuleType("ifbench.instructions_registry")
    registry.INSTRUCTION_DICT = {"count:word": Contains}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ifbench", types.ModuleType("ifbench"))
    monkeypatch.setitem(sys.modules, "ifbench.instructions_registry", registry)


def load(tmp_path: Path, *words: str) -> list:
    path = tmp_path / "IFBench_test.jsonl"
    row = {
        "key": "0",
        "prompt": "Begin well.",
        "instruction_id_list": ["count:word"] * len(words),
        "kwargs": [{"word": word, "N": None} for word in words],
    }
    write_records(path, [row])
    return ifbench.load(path)


def test_strict_and_loose(tmp_path: Path, verifiers: None) -> None:
    items = load(tmp_path, "so", "Hm")
    found = ifbench.by_code(items[0], "Hm:\n**so** it is")
    # Without its first line and its asterisks the answer begins with "so".
    reasons = ["too_short"]
    assert found == {
        "key": "0", "strict": [False, True], "loose": [True, True], "hollow": reasons,
    }  # fmt: skip
    table = ifbench.BENCHMARK.measures(items, [found])
    assert table["answers"] == {"0": (0.0, 1)} and table["hollow/too_short"] == {"0": (1.0, 1)}
    assert table["prompt_strict"] == {"0": (0.0, 1)}
    assert table["prompt_loose"] == {"0": (1.0, 1)}
    assert table["instruction_strict"] == {"0": (1, 2)}
    assert table["strict/count:word"] == {"0": (1, 2)}


def test_an_empty_or_missing_answer_follows_nothing(tmp_path: Path, verifiers: None) -> None:
    (item,) = load(tmp_path, "")
    assert ifbench.by_code(item, " \n")["loose"] == [False]
    assert ifbench.by_code(item, "")["strict"] == [False]


def test_an_unknown_kind_is_refused(tmp_path: Path, verifiers: None) -> None:
    items = load(tmp_path, "a")
    items[0].row["instruction_id_list"][0] = "new:kind"
    with pytest.raises(ValueError, match="item 0: no verifier for new:kind"):
        ifbench.by_code(items[0], "a")


def test_without_the_package_the_message_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pip install git"):
        load(tmp_path, "a")
