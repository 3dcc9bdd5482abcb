"""Every way to install, and none, finds the patches and the bundled checkpoint; imports point one way."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = (
    "import qwen_longctx.patches.qwen2, qwen_longctx.cli as c; "
    "print(c.BUNDLED.joinpath('model.safetensors').exists(), qwen_longctx.patches.__file__)"
)
slow = pytest.mark.slow


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_ci_runs_the_oldest_releases_of_setup_cfg(name):
    """Those of `.ci/oldest.txt` are the floors of setup.cfg, up to the last number."""
    (floor,) = re.findall(rf"^ +{name} >=([\d.]+)", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    (oldest,) = re.findall(rf"^{name}==([\d.]+)", (ROOT / ".ci" / "oldest.txt").read_text(), re.MULTILINE)
    assert oldest.rpartition(".")[0] == floor


LAYERS = (
    {"errors", "files"},
    {"checkpoint", "config", "shapes", "sizes"},
    {"geometry", "ops"},
    {"sparsity", "kv"},
    {"attention"},
    {"prefill"},
    {"patches", "vllm"},
    {"evaluation", "memory", "serving", "training"},
    {"bench", "cli"},
)


def modules() -> dict[str, Path]:
    """All modules by their dotted names below the package; ``__init__`` has the name of its folder."""
    found = {}
    for top in (ROOT / "qwen_longctx", ROOT / "patches"):
        for file in top.rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(part for part in parts if part not in ("__init__", "qwen_longctx"))
            found[name] = file
    return found


def imported(file: Path, known: set[str], nested: bool) -> set[str]:
    """Modules of ours that a file imports: at its top, or with `nested` also inside of functions."""
    tree = ast.parse(file.read_text())
    names = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("qwen_longctx.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.removeprefix("qwen_longctx").removeprefix(".")
            parts = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names}
            names |= parts & known or {module}  # from a package either modules or what its own file defines
    return names & known - {""}


def test_imports_point_one_way():
    """Down the list of `LAYERS`, as docs/development.md has it, also for imports inside of functions."""
    found = modules()
    height = {package: level for level, layer in enumerate(LAYERS) for package in layer}
    for name, file in found.items():
        if not name:  # the public names
            continue
        for target in imported(file, set(found), nested=True):
            here, there = (height[module.partition(".")[0]] for module in (name, target))
            assert there <= here, f"{name} imports {target}, which stands above it"


def test_no_module_imports_itself_by_a_circle():
    found = modules()
    graph = {name: imported(file, set(found), nested=False) - {name} for name, file in found.items()}
    while free := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"these import each other: {sorted(graph)}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, as a fresh clone has them."""
    target = tmp_path_factory.mktemp("clone") / "repo"
    skip = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "benchmarks")
    shutil.copytree(ROOT, target, ignore=skip)
    return target


@pytest.fixture
def python(tmp_path):
    """A bare environment that sees this one's torch and transformers, but not this project."""
    venv.create(tmp_path / "env", with_pip=True)
    path = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    kept = [p for p in sys.path if p.endswith("site-packages")]
    (site / "parent.pth").write_text("\n".join(kept) + "\n")
    return path


def call(python, *arguments, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def probe(python, cwd):
    """Without the .pth of an editable install of the tests' own environment in the way."""
    found, place = call(python, "-c", PROBE, cwd=cwd).split()
    assert found == "True"
    return Path(place)


def install(python, *arguments, cwd):
    return call(python, "-m", "pip", "install", "-q", "--no-deps", *arguments, cwd=cwd)


@slow
def test_wheel_and_from_inside_the_checkout(python, checkout, tmp_path):
    install(python, "--force-reinstall", str(checkout), cwd=tmp_path)
    assert tmp_path in probe(python, tmp_path).parents
    assert probe(python, checkout) == checkout / "patches" / "__init__.py"


@slow
def test_sdist(python, checkout, tmp_path):
    call(sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    install(python, "--force-reinstall", str(archive), cwd=tmp_path)
    assert tmp_path in probe(python, tmp_path).parents


@slow
def test_editable(python, checkout, tmp_path):
    install(python, "--force-reinstall", "-e", str(checkout), cwd=tmp_path)
    assert probe(python, tmp_path) == checkout / "patches" / "__init__.py"


@slow
def test_old_pip_editable(python, checkout, tmp_path):
    """pip 23.2.1 with `wheel` present: without pyproject.toml it would lose the patches."""
    call(python, "-m", "pip", "install", "-q", "pip==23.2.1", "wheel", "setuptools", cwd=tmp_path)
    install(python, "--force-reinstall", "-e", str(checkout), cwd=tmp_path)
    assert probe(python, tmp_path) == checkout / "patches" / "__init__.py"


@slow
def test_uninstalled_checkout(python, checkout):
    assert probe(python, checkout) == checkout / "patches" / "__init__.py"
