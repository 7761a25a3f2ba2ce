"""Time, extra memory and error of the head on one CUDA device, against what else there is.

    python -m benchmarks.gpu_head [--minutes M] [--json FILE]    # measure; FILE is kept up to date
    python -m benchmarks.gpu_head --table FILE                   # print an earlier run

Qwen2-7B's head in bfloat16 (D=3584, V=152,064) with flat and with peaky logits. All variants of a
case run one after the other in each round; times are medians by CUDA events. The product alone, by
cuBLAS into bfloat16, is timed in the same rounds. What does not fit, is not installed, or comes
after the time is up is named in the results, never guessed.
"""

import argparse
import functools
import itertools
import json
import re
import statistics
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.common import peak_tflops, write_json
from benchmarks.heads import NEEDED, OURS, Head, errors, exact, heads, make_inputs, step

WIDTH, WORDS = 3584, 152064
ROWS = (2048, 8192, 512, 16384, 1024, 4096)  # the most telling first, in case the time is short
LOGITS_STD = {"flat": 1.0, "peaky": 12.0}
COMPILED_ROWS = (2048, 8192)  # each number of rows is compiled anew, three times: that takes long
ROUNDS, SECONDS = (5, 20), 8.0  # of a case: at least and at most; after so long no further round


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


def variants_for(rows: int, pass_name: str) -> dict[str, Head]:
    torch._dynamo.reset()  # else it stops compiling `plain` after eight sets of shapes
    found = heads() | liger()
    if rows not in COMPILED_ROWS:
        del found["compile"]
    return found | {"product": product} if pass_name == "forward" else found


def time_case(rows: int, logits: str, pass_name: str) -> dict[str, dict]:
    """Medians over interleaved rounds, peak memory of a second step, and errors, per variant."""
    shape = (rows, WIDTH, WORDS)
    inputs = make_inputs(shape, torch.bfloat16, pass_name, device="cuda", std=LOGITS_STD[logits])
    truth_R = exact(inputs, rows=128)
    results: dict[str, dict] = {}
    runs = {}
    for name, head in variants_for(rows, pass_name).items():
        try:
            results[name] = _first_steps(head, name, pass_name, inputs, truth_R)
            runs[name] = functools.partial(step, head, pass_name, inputs)
        except torch.OutOfMemoryError:
            results[name] = {"skipped": "out of memory"}
        except Exception as error:  # a peer's failure is a result of its own, not ours
            if name == OURS:
                raise
            results[name] = {"skipped": f"{type(error).__name__}: {error}"[:200]}
        inputs[0].grad = inputs[1].grad = None
        torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.monotonic()
    for round_ in range(ROUNDS[1]):
        if round_ >= ROUNDS[0] and time.monotonic() - started > SECONDS:
            break
        for name, run in runs.items():
            times[name].append(_milliseconds(run))
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
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(head, pass_name, inputs)
    torch.cuda.synchronize()
    found["extra_bytes"] = torch.cuda.max_memory_allocated() - before
    return found


def _milliseconds(run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def device() -> dict:
    properties = torch.cuda.get_device_properties(0)
    packages = {p: version(p) for p in ("torch", "triton", "liger_kernel") if find_spec(p)}
    return {
        "name": properties.name,
        "memory_gb": properties.total_memory / 1e9,
        "peak_tflops": peak_tflops(properties.name),
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        "packages": packages,
    }


def default_path() -> Path:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu_head: no CUDA device; use benchmarks.linear_logprob")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return Path("benchmarks/results") / f"{name}.json"


def table(report: dict) -> str:
    """One line per case and variant."""
    about = report["device"]
    peak = about["peak_tflops"]
    lines = [
        f"{about['name']}, {about['date']}, {about['packages']}, D={WIDTH}, V={WORDS}, bfloat16",
        f"{'case':<24}{'variant':<30}{'ms':>9}{'TFLOP/s':>9}{'of peak':>9}{'of cuBLAS':>10}"
        f"{'extra GB':>10}{'error':>10}",
    ]
    for cell in report["head"]:
        case = f"{cell['pass']} {cell['logits']} {cell['rows']}"
        operations = cell["rows"] * WIDTH * WORDS / 1e9
        alone = cell["variants"].get("product", {}).get("ms")
        for name, found in cell["variants"].items():
            if "skipped" in found:
                lines.append(f"{case:<24}{name:<30}{found['skipped']}")
                continue
            done = NEEDED[cell["pass"]] * operations / found["ms"]
            of_peak = f"{done / peak:.0%}" if peak else ""
            of_product = f"{alone / found['ms']:.0%}" if alone else ""
            error = found.get("error", {}).get("largest", float("nan"))
            lines.append(
                f"{case:<24}{name:<30}{found['ms']:>9.2f}{done:>9.0f}{of_peak:>9}{of_product:>10}"
                f"{found['extra_bytes'] / 1e9:>10.2f}{error:>10.1e}"
            )
    lines += [f"not run, the time was up: {case}" for case in report["not_run"]]
    lines.append(
        "TFLOP/s count what the answer needs: 2, 4 and 6 RDV. With a trainable head linear_logprob "
        "computes 8 RDV."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="start no case after this long")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<device>.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print FILE and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    path = arguments.json or default_path()
    before = json.loads(path.read_text()) if path.exists() else {}
    report: dict = before | {"device": device(), "head": [], "not_run": []}
    for rows, (logits, pass_name) in itertools.product(ROWS, itertools.product(LOGITS_STD, NEEDED)):
        if time.monotonic() > deadline:
            report["not_run"].append(f"{pass_name} {logits} {rows}")
        else:
            variants = time_case(rows, logits, pass_name)
            cell = {"rows": rows, "logits": logits, "pass": pass_name, "variants": variants}
            report["head"].append(cell)
            print(f"done: {pass_name} {logits} {rows}", flush=True)
        write_json(path, report)
    print(table(report))


if __name__ == "__main__":
    main()
