"""What an installation holds: the code of every layer, its data files, and the command."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "parallel", "models", "recipes", "benchmarks")
DATA = (".json", ".csv", ".typed")
NVCC = runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]() is not None
PROBE = """
import importlib, importlib.resources, json, sys
modules, data = json.loads(sys.argv[1])
for module in modules:
    importlib.import_module(module)
found = [d for d in data if importlib.resources.files("warploom").joinpath(d).is_file()]
print(json.dumps({"home": sys.modules["warploom"].__file__, "data": found}))
"""


def _run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The sources in a folder of their own, so that a build leaves nothing in this one."""
    folder = tmp_path_factory.mktemp("packaging") / "warploom"
    skip = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "dist", "*.egg-info", ".*_cache", "*.so"
    )
    shutil.copytree(ROOT, folder, symlinks=True, ignore=skip)
    return folder


def _build(clone, kind):
    out = clone.parent / kind
    _run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, clone)
    (built,) = out.iterdir()
    return built


def _below(folder, suffixes):
    """Paths of a layer's files, as a package has them."""
    files = [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes and p.is_file()]
    return {f"warploom/{p.relative_to(ROOT)}" for p in files if "results" not in p.parts}


@pytest.fixture(scope="module")
def sdist(clone):
    return _build(clone, "sdist")


def test_the_sdist_holds_what_a_build_and_a_reader_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for layer in LAYERS:
        missing = {f"src/{name}" for name in _below(layer, (".py", *DATA))} - names
        assert not missing, f"{layer}: name them in pyproject.toml or MANIFEST.in: {missing}"
    assert {"src/warploom/py.typed", "LICENSE", "README.md", "constraints.txt"} <= names
    assert {"csrc/README.md", "tests/conftest.py", "tests/test_house.py"} <= names
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


@pytest.mark.slow
def test_the_wheel_holds_every_layer_and_nothing_else(clone):
    with zipfile.ZipFile(_build(clone, "wheel")) as archive:
        names = set(archive.namelist())
    for layer in LAYERS:
        assert not _below(layer, (".py", *DATA)) - names
    assert "warploom/py.typed" in names
    modules = [name for name in names if name.startswith("warploom/_csrc.") and ".so" in name]
    assert len(modules) == NVCC
    assert {name.split("/")[0].split("-")[0] for name in names} == {"warploom"}


def _environment(folder):
    """A fresh environment that sees this one's packages, but not what is installed here as `-e`."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(
        _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("way", ["editable", "wheel", "sdist", "git"])
def test_an_installation_has_working_front_doors(way, clone, sdist, tmp_path):
    python = _environment(tmp_path / "env")
    if way == "git":
        git = ("git", "-C", clone, "-c", "user.name=test", "-c", "user.email=test@example.org")
        for words in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "test")):
            _run(*git, *words)
    what = {
        "editable": ("--editable", clone),
        "wheel": (clone,),
        "sdist": (sdist,),
        "git": (f"git+file://{clone}",),
    }[way]
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    _run(*pip, "--no-deps", "--no-build-isolation", *what, env=os.environ | {"PIP_NO_INPUT": "1"})

    doors = [
        "warploom.kernels.norm",
        "warploom.parallel.mesh",
        "warploom.models.hf",
        "warploom.cli",
        *(["warploom._csrc"] if NVCC else []),
    ]
    data = {name.removeprefix("warploom/") for layer in LAYERS for name in _below(layer, DATA)}
    words = json.dumps([doors, sorted({"py.typed", *data})])
    found = json.loads(_run(python, "-I", "-c", PROBE, words, cwd=tmp_path))
    assert (Path(found["home"]).is_relative_to(clone)) == (way == "editable")
    assert set(found["data"]) == {"py.typed", *data}
    assert _run(python.with_name("warploom"), "--version", cwd=tmp_path).startswith("warploom 0.")
