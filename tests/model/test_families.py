"""Every decoder family of transformers: its own log-probs, or a refusal before the first step.

    PYTHONPATH=. python tests/model/test_families.py > docs/families.md

writes the table of all families in the documentation.
"""

import json
import re
import sys
from datetime import date

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from iopo import agreement
from iopo.data.example import Example
from iopo.model.attention import SHARED

FAMILIES = dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))
PAGE = """# Model families

Before a run loads weights, a small random model of its config is scored twice: through the
project's path in the run's layout and, one member at a time, through the model's own forward with
eager attention in fp32. A difference above {tolerance:g} nats in any response refuses the
model: exit code 2, nothing written. The first {layers} layers of the real weights are then compared
in the same way, on tokens of the data modulo 8,192, before any step. No list of families decides
([iopo/agreement.py](../iopo/agreement.py)).

The table is the first check of every decoder family of transformers, shared layout, default
config, each scale that is 1 by default set to 0.7 so that it shows. Nats: the largest difference
of a response. A model of a supported family can still be refused for what its own config asks for
(quantised weights, a sliding window shorter than the rows). *not small*: no small model could be
made of the default config; such a model is checked at start, with its weights.

{supported} supported, {refused} refused, {unchecked} not small. Written by
`PYTHONPATH=. python tests/model/test_families.py > docs/families.md` on {today}, transformers
{version}, torch {torch}.

| model type | class | result | nats, or reason |
|---|---|---|---|
{rows}
"""


# what default configs leave open and every real one has
HEAD, EXPERTS = {"head_dim": 128}, {"n_routed_experts": 8, "num_experts_per_tok": 2}
OPEN = {
    "ministral": HEAD, "hunyuan_v1_dense": HEAD, "hunyuan_v1_moe": HEAD,
    "nemotron": HEAD | {"num_key_value_heads": 8},
    "dots1": EXPERTS | {"n_shared_experts": 1}, "deepseek_v2": EXPERTS,
}  # fmt: skip


def config_of(family: str, **changes):
    """The default config, in which every scale that is 1 becomes 0.7."""
    fields = AutoConfig.for_model(family).to_dict()
    scales = {
        k: 0.7 for k, v in fields.items()
        if type(v) in (int, float) and v == 1 and re.search("scal|multiplier", k)
    }  # fmt: skip
    return AutoConfig.for_model(family, **scales | OPEN.get(family, {}) | changes)


def result_of(family: str) -> tuple[str, str]:
    """(supported, refused or not small; the difference in nats or the reason)."""
    try:
        config = config_of(family)
    except Exception as error:
        return "not small", f"no default config: {type(error).__name__}"
    try:
        agreement.check_family(config, where=family)
    except ValueError as error:
        reason = str(error).partition("is not supported: ")[2] or str(error)
        return "refused", reason.partition("\n")[0]
    fields = json.dumps({"model_type": config.model_type, **config.to_dict()})
    found, _ = agreement.family_difference(fields, SHARED)
    return ("not small", "") if found is None else ("supported", f"{found:.1e}")


def table() -> str:
    rows, results = [], []
    for family, name in FAMILIES.items():
        result, detail = result_of(family)
        results.append(result)
        rows.append(f"| {family} | {name} | {result} | {detail.replace('|', '/')} |")
        print(rows[-1], file=sys.stderr, flush=True)
    supported, refused, unchecked = map(results.count, ("supported", "refused", "not small"))
    return PAGE.format(
        tolerance=agreement.TOLERANCE, layers=agreement.LAYERS, supported=supported,
        refused=refused, unchecked=unchecked, today=date.today(), version=transformers.__version__,
        torch=torch.__version__, rows="\n".join(rows),
    )  # fmt: skip


WINDOWS = "sliding_window|attention_chunk_size|window_size"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_or_is_refused(family):
    """What passes the check agrees on other weights and longer rows, and no window is ignored."""
    try:
        config = config_of(family)
    except Exception:
        pytest.skip("no default config")
    try:
        agreement.check_family(config, where=family)
    except ValueError:
        return  # refused by name
    try:
        model = agreement.small_model(config)
        agreement.own_log_probs(model, agreement.random_quads(agreement.VOCABULARY))
    except Exception:
        pytest.skip("no small model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    draw = np.random.default_rng(1)
    x1, x2, y1, y2 = (draw.integers(agreement.VOCABULARY, size=n) for n in (41, 35, 23, 17))
    quads = [Example("long", (x1, x2), ((y1, y2), (y2, y1)))]
    assert agreement.difference(model, quads, SHARED) <= agreement.TOLERANCE
    keys = [k for k in config.to_dict() if re.fullmatch(WINDOWS, k)]
    for key in keys:
        switch = {k: True for k in config.to_dict() if k == "use_sliding_window"}
        short = agreement.small_model(config_of(family, **{key: 8}, **switch))
        try:
            found = agreement.difference(short, quads, SHARED)
        except ValueError as error:
            assert "window of 8 tokens" in str(error)
        else:
            assert found <= agreement.TOLERANCE, f"{key} is ignored"


if __name__ == "__main__":
    print(table(), end="")
