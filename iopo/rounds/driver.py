"""The stages of all rounds, in order: each a process with a folder and a marker, done once."""

import dataclasses
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iopo.config import Dtype, TrainConfig
from iopo.data.rows import spread
from iopo.evaluation.config import ModelSection
from iopo.evaluation.responses import check_manifest, require_model
from iopo.files import sha256_rows, write_records, write_text
from iopo.jobs import REPOSITORY, STOPPED, Job, Runner, print_now
from iopo.objectives import OBJECTIVES
from iopo.rounds import prompts, report
from iopo.rounds.config import Round, RoundsConfig, round_folder
from iopo.rounds.stage import LABELLED, SAMPLED
from iopo.training.plan.report import plan_report

OK, FAILED, REFUSED, FELL = 0, 1, 2, 3  # exit codes; STOPPED is another
# of a single train.py
OWN = ("data.train", "reference.path", "replay_step", "export_step", "export.push_to_hub")
COMPLETE = "COMPLETE"  # holds the path of the last policy, once all rounds are done
FREE = ("count", "stop_drop", "serve_timeout_s")  # may change when a run goes on


@dataclass
class Rounds:
    """What every stage follows from. overrides: of every train.py. folder: of the run."""

    cfg: TrainConfig
    rounds: RoundsConfig
    overrides: list[str]
    folder: Path

    @property
    def kind(self) -> str:
        """Of the rows."""
        return OBJECTIVES[self.cfg.objective.name].rows.kind

    @property
    def adapted(self) -> bool:
        return self.cfg.model.lora.rank > 0

    # --- before anything is made ------------------------------------------------------------------

    def check(self) -> None:
        """Raises ValueError for what rounds cannot do."""
        cfg, rounds, name = self.cfg, self.rounds, self.cfg.objective.name
        if cfg.data.max_response_tokens < rounds.max_new_tokens:
            key = f"data.max_response_tokens={cfg.data.max_response_tokens}"
            if key in self.overrides:
                raise ValueError(
                    f"{key} with rounds.max_new_tokens={rounds.max_new_tokens}: longer responses "
                    "would be dropped after they were sampled; set both alike"
                )
            # what stood there is for the experiment's own rows
            cfg.data.max_response_tokens = rounds.max_new_tokens
        for word in self.overrides:
            if word.lstrip("+~").partition("=")[0] in OWN:
                raise ValueError(f"{word}: rounds set it, or have no use for it; remove it")
        if cfg.model.path is None:
            raise ValueError("model.tiny: rounds start from model.path; save the model to a folder")
        if not (cfg.export.model or self.adapted):
            raise ValueError("export.model=false: the next round starts from the export; remove it")
        if rounds.command is not None and cfg.model.adapter is not None:
            raise ValueError(
                "rounds.serve with model.adapter: the server gets a whole model; merge the adapter "
                "into model.path first"
            )
        if rounds.reward != "all" and self.kind not in ("group", "pair"):
            raise ValueError(
                f"rounds.reward={rounds.reward} has no effect with objective.name={name}; remove "
                "it (used by objectives on groups and on pairs)"
            )
        if rounds.reference == "first":
            if cfg.model.adapter is not None:
                raise ValueError(
                    "rounds.reference=first with model.adapter: the reference is a whole model; "
                    "merge the adapter into model.path first"
                )
            with_path = dataclasses.replace(cfg.reference, path=cfg.model.path)
            dataclasses.replace(cfg, reference=with_path)  # checked as train.py's config is
        if rounds.reference == "first" and self.kind == "group":
            raise ValueError(
                f"rounds.reference=first with objective.name={name}: its ratios are to the policy "
                "that sampled; remove it (start)"
            )
        if rounds.seen is not None and not rounds.heldout:
            raise ValueError("rounds.seen has no effect with rounds.heldout=[]; set it to null")

    def plan(self) -> str:
        """What a round's training needs, and what the rounds sample. The rows are not known yet."""
        self.cfg.data.train, each = None, self.rounds.prompts_per_round
        where = "in process" if self.rounds.command is None else f"from `{self.rounds.command}`"
        return (
            f"{plan_report(self.cfg)}\n\n{self.rounds.count} rounds, each: {each} prompts x "
            f"{self.rounds.samples} = {each * self.rounds.samples} responses of at most "
            f"{self.rounds.max_new_tokens} tokens, {where}"
        )

    def prepare(self) -> None:
        """The run folder, its arguments.json and held-out quads, after all checks.

        Raises ValueError for a model, held-out quads or prompts that cannot be used, and if the
        folder was made with other arguments, or with files of another content.
        """
        require_model(self.policy(0))
        rows = prompts.heldout_rows(self.rounds)
        found, dropped = prompts.read_prompts(
            self.rounds.prompts, prompts.held_of(self.rounds, rows)
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in asdict(self.rounds).items() if key not in FREE}
        words = sorted(word for word in self.overrides if not word.startswith("run="))
        asked = None if self.rounds.prompts == prompts.TASKS else self.rounds.prompts
        sources = [*self.rounds.heldout, *filter(None, (self.rounds.seen, asked))]
        content = {source: sha256_rows(source) for source in sources}
        made_with = kept | {"overrides": words, "content": content}
        check_manifest(self.folder / "arguments.json", made_with)
        (self.folder / COMPLETE).unlink(missing_ok=True)
        write_records(self.folder / prompts.HELDOUT, rows)
        splits = Counter(str(row.get("split")) for row in spread(rows, self.rounds.limit))
        print_now(f"{len(found)} prompts; held-out quads that are scored: {dict(splits)}")
        for why, n in dropped.items():
            print_now(f"prompts left out, {why}: {n}")

    # --- the stages -------------------------------------------------------------------------------

    def run(self, runner: Runner) -> int:
        """All stages that are not done; returns the exit code."""
        for number in range(self.rounds.count + 1):
            stages = [self.sample, self.label, self.train, self.evaluate]
            for stage in stages if number else stages[3:]:
                if stage == self.train and not self.gave_rows(number):
                    continue  # the policy stays as it is
                job = stage(number)
                if job is not None and not runner.job(job):
                    return STOPPED if runner.stopping else FAILED
                if stage in (self.label, self.evaluate) and self.fell(number):
                    return FELL
        path = self.policy(self.rounds.count).path
        write_text(self.folder / COMPLETE, f"{path}\n")
        print_now(f"{path}\n{self.folder / 'report.html'}")
        return OK

    def gave_rows(self, number: int) -> bool:
        """Whether the round has new rows to train on, as far as its responses are labelled."""
        counts = round_folder(self.folder, number) / "rows" / LABELLED
        return not counts.exists() or json.loads(counts.read_text("utf-8"))["rows_new"] > 0

    def policy(self, number: int) -> ModelSection:
        """The policy after so many rounds; 0 is the first policy. A round without rows keeps it."""
        path = Path(str(self.cfg.model.path))
        start = ModelSection(
            str(path.absolute()) if path.is_dir() else str(path),
            self.cfg.model.adapter,
            self.cfg.model.dtype.value,
            self.cfg.parallel.device.value,
            self.cfg.model.template_options,
        )
        while number and not self.gave_rows(number):
            number -= 1
        if number == 0:
            return start
        export = "export-merged" if self.adapted else "export"
        made = round_folder(self.folder, number) / "train" / export
        return dataclasses.replace(start, path=str(made), adapter=None)

    def sample(self, number: int) -> Job:
        """Responses of the policy before the round."""
        folder = str(round_folder(self.folder, number))
        policy, system = self.policy(number - 1), self.cfg.model.system
        of = Round(folder, number, self.kind, self.cfg.seed, policy, system, self.rounds)
        of.write()
        return self._own(number, "sample", SAMPLED)

    def label(self, number: int) -> Job:
        """The rows of the round."""
        return self._own(number, "rows", LABELLED)

    def _own(self, number: int, stage: str, marker: str) -> Job:
        folder = round_folder(self.folder, number)
        command = ["-m", "iopo.rounds.stage", stage, str(folder)]
        return Job(f"{folder.name} {stage}", command, folder / stage / marker)

    def train(self, number: int) -> Job:
        """train.py from the policy before the round, with a fresh optimizer and schedule."""
        folder, start = round_folder(self.folder, number), self.policy(number - 1)
        own = {"run": folder / "train", "data.train": folder / "rows/train.jsonl",
               "data.max_response_tokens": self.cfg.data.max_response_tokens,
               "model.path": start.path}  # fmt: skip
        words = [f"{key}={quoted(value)}" for key, value in own.items()]
        if not any(word.startswith("data.limit_rows=") for word in self.overrides):
            words.append("data.limit_rows=null")  # that of the experiment's own rows
        if start.adapter is None and self.cfg.model.adapter is not None:
            words.append("model.adapter=null")
        if self.adapted:
            words.append("export.merged=true")
        elif self.cfg.export.dtype is Dtype.auto:
            words.append("export.dtype=fp32")  # a round's updates are small beside bf16's steps
        if self.rounds.reference == "first" and number > 1:
            words.append(f"reference.path={quoted(self.policy(0).path)}")
        command = [str(REPOSITORY / "train.py"), *self.overrides, *words]
        return Job(f"{folder.name} train", command, folder / "train" / "COMPLETE")

    def evaluate(self, number: int) -> Job | None:
        """The policy after the round on the held-out quads; None where there are none.

        The first policy says whether an answer is on its task.
        """
        limit = self.rounds.limit
        if not self.rounds.heldout or limit == 0:
            return None
        folder, policy = round_folder(self.folder, number), self.policy(number)
        own = {
            "model.path": policy.path, "model.adapter": policy.adapter,
            "model.dtype": policy.dtype, "model.device": policy.device,
            "data.path": self.folder / prompts.HELDOUT, "limit": limit, "out": folder / "evaluate",
            "benchmark.base": self.policy(0).path, "benchmark.controls": False,
            "generate.system_prompt": self.cfg.model.system,
            "generate.max_new_tokens": self.rounds.max_new_tokens,
        }  # fmt: skip
        words = [f"{key}={quoted(value)}" for key, value in own.items() if value is not None]
        options = policy.template_options.items()
        words += [f"++model.template_options.{key}={quoted(value)}" for key, value in options]
        command = [str(REPOSITORY / "evaluate.py"), "+benchmark=quads", *words]
        return Job(f"{folder.name} evaluate", command, folder / "evaluate" / "scores.json")

    def fell(self, number: int) -> bool:
        """Write the page; whether the rounds must not go on, which is said."""
        rows = report.collect(self.folder)
        last = next((row for row in rows if row["round"] == number), {})
        found = report.fallen(rows, self.rounds.stop_drop)
        stops = self.rounds.stop_drop is not None
        if stops and last.get("rows", {}).get("rows_new") == 0:
            found = f"acceptance fell in round {number}: no prompt gave a row", max(number - 2, 0)
        note = f"{number} of {self.rounds.count} rounds."
        if found is not None:
            note = f"Stopped: {found[0]}. The last good checkpoint: {self.policy(found[1]).path}"
            print_now(f"{note}\n{self.folder / 'report.html'}")
        report.write(self.folder, rows, note)
        return found is not None


def quoted(value: Any) -> str:
    """A value as Hydra's grammar reads it, whatever signs are in it."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    # a backslash is one, but for those before a quote
    return (
        "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), str(value)) + "'"
    )
