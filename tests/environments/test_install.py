"""What is installed: one version, a wheel that is whole, an environment made by uv."""

import doctest
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import iopo.kernels

ROOT = Path(__file__).resolve().parents[2]
IMPORT_ALL = """
import importlib.util, pathlib, pkgutil, sys
import iopo
assert pathlib.Path(iopo.__file__).is_relative_to(sys.prefix), iopo.__file__
names = [m.name for m in pkgutil.walk_packages(iopo.__path__, "iopo.")]
if importlib.util.find_spec("triton") is None:  # comes with torch for CUDA
    names.remove("iopo.kernels.triton_gemm")
for name in names:
    importlib.import_module(name)
print(len(names), "modules")
"""


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == iopo.__version__
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == iopo.__version__


def test_the_examples_of_the_kernels_hold():
    found = doctest.testmod(iopo.kernels)
    assert found.attempted and not found.failed


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_wheel_works_in_a_clean_environment(tmp_path):
    """Two environments: the wheel by pip, the checkout by uv."""
    copy = tmp_path / "copy"
    kept = shutil.ignore_patterns(".venv", ".git", "runs", "*.egg-info", "__pycache__", "build")
    shutil.copytree(ROOT, copy, ignore=kept)

    def run(*command: object, cwd: Path = tmp_path) -> str:
        done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, copy)
    (wheel,) = tmp_path.glob("iopo-*.whl")
    files = {str(f.relative_to(ROOT)) for f in (ROOT / "iopo").rglob("*") if f.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert files == {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("iopo/")}
    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-c", copy / "constraints.txt", wheel, "uv")
    print(run(python, "-c", IMPORT_ALL))
    assert "0 failed" in run(python, "-m", "iopo.kernels")
    uv = (python, "-m", "uv", "pip", "install", "-q", "--python", python)
    run(*uv, "--no-deps", "-e", copy)
    where = run(python, "-c", "import iopo; print(iopo.__file__)")
    assert where.strip() == str(copy / "iopo" / "__init__.py")
