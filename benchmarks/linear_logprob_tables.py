"""The tables of benchmarks/linear_logprob.py, from its JSON."""

from benchmarks.heads import OURS

TARGETS = {"forward": 1.1, "frozen": 1.0, "trainable": 1.0, "memory": 10.0}
NEEDED = {"forward": 2, "frozen": 4, "trainable": 6}  # x RDV operations that the answer needs


def tables(report: dict) -> str:
    """Times with the verdict per case, then memory and errors, in Markdown."""
    cells = report["cases"]
    names = [OURS]
    for cell in cells:
        names += [name for name in cell.get("variants", {}) if name not in names]
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    times = [_times(cell, names) for cell in cells if "variants" in cell]
    memory = [_memory(cell, names) for cell in cells if "extra_bytes" in cell]
    forward = [cell for cell in cells if cell["case"]["pass_name"] == "forward"]  # as in any pass
    errors = [_errors(cell, names) for cell in forward if "variants" in cell]
    return "\n\n".join(
        [
            about,
            "Milliseconds (the floor divided by them). Floor: the operations that the answer needs "
            "at the speed of a square float32 product, timed in the same rounds.",
            _table(["case", "floor", *names, "best peer / ours", "target"], times),
            "Extra megabytes of one step, returned gradients included.",
            _table(["case", *names, "plain / ours", "target"], memory),
            "Largest error of a row's log-probability in nats, against float64.",
            _table(["case", *names], errors),
        ]
    )


def floor_ms(cell: dict) -> float:
    case = cell["case"]
    operations = NEEDED[case["pass_name"]] * case["rows"] * case["width"] * case["words"]
    return operations / cell["gflops"] / 1e6


def verdict(cell: dict) -> tuple[float, bool]:
    """(time of the fastest peer over ours, is the target met)."""
    ms = {name: found["ms"] for name, found in cell["variants"].items()}
    ratio = min(value for name, value in ms.items() if name != OURS) / ms[OURS]
    return ratio, ratio >= TARGETS[cell["case"]["pass_name"]]


def _times(cell: dict, names: list[str]) -> list[str]:
    floor, variants = floor_ms(cell), cell["variants"]
    columns = [_label(cell), f"{floor:.0f}"]
    for name in names:
        ms = variants.get(name, {}).get("ms")
        columns.append("not run" if ms is None else f"{ms:.0f} ({floor / ms:.0%})")
    ratio, met = verdict(cell)
    return [*columns, f"{ratio:.2f}", "met" if met else "missed"]


def _memory(cell: dict, names: list[str]) -> list[str]:
    found = cell["extra_bytes"]
    columns = [f"{found[name] / 1e6:.0f}" if name in found else "not run" for name in names]
    if "plain" not in found:
        return [_label(cell), *columns, "", ""]
    ratio = found["plain"] / found[OURS]
    met = "met" if ratio >= TARGETS["memory"] else "missed"
    return [_label(cell), *columns, f"{ratio:.1f}", met]


def _errors(cell: dict, names: list[str]) -> list[str]:
    found = [cell["variants"].get(name, {}).get("error", {}).get("largest") for name in names]
    return [_label(cell), *("" if error is None else f"{error:.1e}" for error in found)]


def _label(cell: dict) -> str:
    c = cell["case"]
    return f"{c['pass_name']} {c['dtype']} R={c['rows']} D={c['width']} V={c['words']}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
