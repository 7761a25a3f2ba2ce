"""The Triton kernels compile for GPUs that are not here, and fit them.

Ahead-of-time compilation needs no GPU: Triton ships ptxas. It proves that the kernels can be built
and what they occupy, not that they are right; test_kernels_interpreted.py is about that.
"""

import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from iopo.kernels import triton_gemm  # noqa: E402

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # per block, CUDA guide table 16
MATRIX_UNIT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {
    "forward": ["top_ptr", "sum_ptr", "target_ptr"],
    "error": ["shift_ptr", "factor_ptr", "miss_ptr"],
}


def compile_for(capability, kernel, dtype, *, error, bias=False, softcap=None):
    """Compile a kernel as `_launch` would call it; return (compiled kernel, its resources)."""
    blocks = triton_gemm.blocks_for(capability, dtype.itemsize, softcap)
    name = NAMES[dtype]
    signature = {
        "hidden": f"*{name}",
        "weight": f"*{name}",
        "bias_ptr": f"*{name}" if bias else "constexpr",
        "targets_ptr": "*i64",
        **{pointer: "*fp32" for pointer in POINTERS[kernel]},
        "error_ptr": f"*{name}" if error else "constexpr",
        **dict.fromkeys(("R", "V", "D", "error_stride"), "i32"),
        **dict.fromkeys(("SOFTCAP", "ROWS", "VOCAB", "WIDTH", "GROUP", "DESCRIPTORS"), "constexpr"),
    }
    if blocks.descriptors:
        signature["hidden"] = f"tensordesc<{name}[{blocks.rows}, {blocks.width}]>"
        signature["weight"] = f"tensordesc<{name}[{blocks.vocab}, {blocks.width}]>"
    constants = {
        "SOFTCAP": softcap,
        "ROWS": blocks.rows,
        "VOCAB": blocks.vocab,
        "WIDTH": blocks.width,
        "GROUP": blocks.group,
        "DESCRIPTORS": blocks.descriptors,
    }
    constants |= {key: None for key in ("bias_ptr", "error_ptr") if signature[key] == "constexpr"}
    function = {"forward": triton_gemm.forward_kernel, "error": triton_gemm.error_kernel}[kernel]
    order = list(signature)
    pointers = [key for key in order if signature[key].startswith("*")]
    aligned = [*pointers, "D", "error_stride"]
    attributes = {(order.index(key),): [["tt.divisibility", 16]] for key in aligned}
    compiled = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": blocks.warps, "num_stages": blocks.stages},
    )
    return compiled, resources(compiled.asm["cubin"])


def resources(cubin):
    """What cuobjdump says: REG and STACK per thread (registers spill to the stack), and more."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = re.findall(r"Function \w+_kernel:\n(.*)", report)
    return {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}


VARIANTS = {
    "forward": {"kernel": "forward", "error": False},
    "forward_with_gradient": {"kernel": "forward", "error": True},
    "backward": {"kernel": "error", "error": True},
    "forward_softcap_bias": {"kernel": "forward", "error": False, "bias": True, "softcap": 30.0},
    "backward_softcap_bias": {"kernel": "error", "error": True, "bias": True, "softcap": 30.0},
}


SLOW = [pytest.param(capability, marks=pytest.mark.slow) for capability in (80, 100)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("capability", [90, *SLOW])
def test_compiles_without_spills_within_shared_memory(capability, variant):
    compiled, report = compile_for(capability, dtype=torch.bfloat16, **VARIANTS[variant])
    print(f"sm_{capability} {variant}: {report}, shared {compiled.metadata.shared}")
    assert report["STACK"] == report["LOCAL"] == 0, report
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    assert MATRIX_UNIT[capability] in compiled.asm["ptx"]


def test_interpreted_kernels_in_a_process_of_their_own():
    """Triton decides when it is imported whether it interprets."""
    tests = __file__.replace("test_kernels_triton", "test_kernels_interpreted")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:] + done.stderr
