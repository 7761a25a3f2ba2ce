"""Time, extra memory and error of the head on one CUDA device, against what else there is.

    python -m benchmarks.gpu.head [--minutes M] [--json FILE]    # measure; FILE is kept up to date
    python -m benchmarks.gpu.head --table FILE                   # print an earlier run

Qwen2-7B's head in bfloat16 (D=3584, V=152,064) with flat and with peaky logits. All variants of a
case run one after the other in each round; times are medians by CUDA events. The product alone, by
cuBLAS into bfloat16, is timed in the same rounds. What torch.compile makes comes last: it takes
half a minute to make. What does not fit, is not installed, or comes after the time is up is named
in the results, never guessed. --device cpu rehearses this at tiny size.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.common import peak_tflops, processor, write_json
from benchmarks.heads import NEEDED, OURS, Head, errors, exact, heads, make_inputs, step

WIDTH, WORDS = 3584, 152064
ROWS = (2048, 8192, 512, 16384, 1024, 4096)  # the most telling first, in case the time is short
LOGITS_STD = {"flat": 1.0, "peaky": 12.0}
COMPILED_ROWS = 8192  # each number of rows would be compiled anew
ROUNDS, SECONDS = (5, 20), 4.0  # of a case: at least and at most; after so long no further round
TINY = {"WIDTH": 16, "WORDS": 300, "ROWS": (8, 40), "COMPILED_ROWS": 8, "ROUNDS": (2, 2)}  # a CPU


@dataclass(frozen=True)
class Case:
    rows: int
    logits: str
    pass_name: str
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.pass_name} {self.logits} {self.rows}{' compiled' * self.compiled}"


def cases() -> list[Case]:
    """In the order of what is wanted first."""
    kinds = list(itertools.product(LOGITS_STD, NEEDED))
    plain = [Case(rows, *kind) for rows in ROWS for kind in kinds]
    return plain + [Case(COMPILED_ROWS, "flat", name, compiled=True) for name in NEEDED]


def product(hidden_RD, weight_VD, targets_R):
    """The matrix product that a forward pass cannot do without."""
    return hidden_RD @ weight_VD.t()


def liger() -> dict[str, Head]:
    """Liger's fused heads, if it is installed."""
    if not find_spec("liger_kernel"):
        return {}
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    cross_entropy = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    preference = LigerFusedLinearDPOLoss(use_ref_model=False)

    def liger_cross_entropy(hidden_RD, weight_VD, targets_R):
        return -cross_entropy(weight_VD, hidden_RD, targets_R)

    def liger_preference(hidden_RD, weight_VD, targets_R):
        """The rows as two pairs of sequences of R / 4 tokens: chosen first, then rejected."""
        loss = preference(weight_VD, hidden_RD.view(4, -1, WIDTH), targets_R.view(4, -1))
        return loss[0] if isinstance(loss, tuple) else loss

    return {"liger_cross_entropy": liger_cross_entropy, "liger_preference": liger_preference}


def variants_for(case: Case) -> dict[str, Head]:
    found = heads()
    compiled = found.pop("compile")
    if case.compiled:
        found = {OURS: found[OURS], "compile": compiled}
    else:
        found |= liger()
    return found | {"product": product} if case.pass_name == "forward" else found


def time_case(case: Case, device: str = "cuda") -> dict[str, dict]:
    """Medians over interleaved rounds, peak memory of a second step, and errors, per variant."""
    shape, std = (case.rows, WIDTH, WORDS), LOGITS_STD[case.logits]
    inputs = make_inputs(shape, torch.bfloat16, case.pass_name, device=device, std=std)
    truth_R = exact(inputs, rows=128)
    results: dict[str, dict] = {}
    runs = {}
    for name, head in variants_for(case).items():
        try:
            results[name] = _first_steps(head, name, case.pass_name, inputs, truth_R)
            runs[name] = functools.partial(step, head, case.pass_name, inputs)
        except torch.OutOfMemoryError:
            results[name] = {"skipped": "out of memory"}
        except Exception as error:  # a variant's failure is a result of its own
            results[name] = {"skipped": f"{type(error).__name__}: {error}"[:200]}
        inputs[0].grad = inputs[1].grad = None
        if device == "cuda":
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.monotonic()
    for round_ in range(ROUNDS[1]):
        if round_ >= ROUNDS[0] and time.monotonic() - started > SECONDS:
            break
        for name, run in runs.items():
            times[name].append(_milliseconds(run, device))
    for name, ms in times.items():
        low, median, high = statistics.quantiles(ms, n=4)
        results[name] |= {"ms": median, "q25": low, "q75": high, "rounds": len(ms)}
    return results


def _first_steps(head: Head, name: str, pass_name: str, inputs, truth_R) -> dict:
    found: dict = {}
    logp = step(head, pass_name, inputs)  # compiles, loads and chooses kernels
    if name not in ("product", "liger_preference"):  # these return no log-probabilities
        found["error"] = errors(head, logp, truth_R, inputs)
    del logp
    step(head, pass_name, inputs)
    inputs[0].grad = inputs[1].grad = None
    found["extra_bytes"] = 0
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(head, pass_name, inputs)
        torch.cuda.synchronize()
        found["extra_bytes"] = torch.cuda.max_memory_allocated() - before
    return found


def _milliseconds(run, device: str) -> float:
    if device == "cpu":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def facts(device: str) -> dict:
    packages = {p: version(p) for p in ("torch", "triton", "liger_kernel") if find_spec(p)}
    name, memory = processor(), None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory / 1e9
    return {
        "name": name,
        "memory_gb": memory,
        "peak_tflops": peak_tflops(name),
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        "packages": packages,
    }


def table(report: dict) -> str:
    """One line per case and variant."""
    about = report["device"]
    peak = about["peak_tflops"]
    lines = [
        f"{about['name']}, {about['date']}, {about['packages']}, D={WIDTH}, V={WORDS}, bfloat16",
        f"{'case':<30}{'variant':<30}{'ms':>9}{'TFLOP/s':>9}{'of peak':>9}{'of cuBLAS':>10}"
        f"{'extra GB':>10}{'error':>10}",
    ]
    for cell in report["head"]:
        case = str(Case(**cell["case"]))
        operations = cell["case"]["rows"] * WIDTH * WORDS / 1e9
        alone = cell["variants"].get("product", {}).get("ms")
        for name, found in cell["variants"].items():
            if "skipped" in found:
                lines.append(f"{case:<30}{name:<30}{found['skipped']}")
                continue
            done = NEEDED[cell["case"]["pass_name"]] * operations / found["ms"]
            of_peak = f"{done / peak:.0%}" if peak else ""
            of_product = f"{alone / found['ms']:.0%}" if alone else ""
            error = found.get("error", {}).get("largest", float("nan"))
            lines.append(
                f"{case:<30}{name:<30}{found['ms']:>9.2f}{done:>9.0f}{of_peak:>9}{of_product:>10}"
                f"{found['extra_bytes'] / 1e9:>10.2f}{error:>10.1e}"
            )
    lines += [f"not run, the time was up: {case}" for case in report["not_run"]]
    lines.append(
        "TFLOP/s count what the answer needs: 2, 4 and 6 RDV. With a trainable head linear_logprob "
        "computes 8 RDV."
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="start no case after this long")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print FILE and stop")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return 0
    if arguments.device == "cpu":
        globals().update(TINY)
        torch.compile = functools.partial(torch.compile, backend="aot_eager")  # in a second
    deadline = time.monotonic() + 60 * arguments.minutes
    report: dict = {"device": facts(arguments.device), "head": [], "not_run": []}
    for case in cases():
        if time.monotonic() > deadline:
            report["not_run"].append(str(case))
            continue
        try:
            variants = time_case(case, arguments.device)
        except Exception as error:  # the other cases still count
            report["not_run"].append(f"{case}: {type(error).__name__}: {error}"[:300])
            continue
        report["head"].append({"case": asdict(case), "variants": variants})
        print(f"done: {case}", flush=True)
        write_json(arguments.json, report)
    write_json(arguments.json, report)
    print(table(report))
    ours = [cell["variants"][OURS] for cell in report["head"]]
    wrong = sum("ms" not in found for found in ours)
    print(f"{len(ours)} cases timed, {len(report['not_run'])} not run, ours failed in {wrong}")
    return int(not ours or wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
