"""The command line: what it says, how it ends, what the doctor finds."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from warploom import __version__, cli
from warploom.kernels import peers
from warploom.recipes import doctor
from warploom.recipes.errors import UserError
from warploom.recipes.runner import environment


def _run(*words):
    command = [sys.executable, "-m", "warploom.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_does_not_import_torch():
    done = _run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.COMMANDS)
    probe = (
        "import sys; from warploom import cli; cli.main(['--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("words", [["bench"], ["bench", "--help"], ["bench", "-h"]])
def test_the_first_word_alone_lists_its_second_words(words, capsys):
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    assert not shown.err
    for name in ("bench train", "bench kernels"):
        assert f"  {name} {cli.COMMANDS[name].words}" in shown.out
        assert cli.COMMANDS[name].summary in shown.out
    assert "doctor" not in shown.out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"warploom {__version__}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["docter"], "got 'docter': did you mean doctor?"),
        (["train"], "train needs the run first, as recipe/name"),
        (["train", "--steps"], "got --steps"),
        (
            ["bench", "kernel"],
            "bench must be followed by one of train, generate, mup, kernels, got 'kernel': did",
        ),
        (["train", "stdlib"], "a run is recipe/name, such as pretrain/stdlib; got 'stdlib'"),
        (["train", "pretrian/stdlib"], "got 'pretrian': did you mean pretrain?"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(words, sentence, capsys):
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert sentence in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["convert"], "SOURCE TARGET"),
        (["generate"], "FOLDER"),
        (["serve"], "FOLDER"),
        *((["tokens", name], "FOLDER") for name in ("train", "build", "show")),
    ],
)
def test_usage_names_what_stands_at_a_place(words, names, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--help"])
    assert stopped.value.code == 0
    usage = next(line for line in capsys.readouterr().out.splitlines() if "usage:" in line)
    assert re.sub(r" \[[^]]*\]", "", usage) == f"usage: warploom {' '.join(words)} {names}"


def test_train_hands_the_name_and_the_rest_to_the_recipe(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "RECIPES", {"pretrain": lambda argv: seen.append(argv) or 0})
    assert cli.main(["train", "pretrain/stdlib", "--steps", "3"]) == 0
    assert seen == [["stdlib", "--steps", "3"]]


def test_what_is_no_mistake_of_the_user_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise ValueError("ours")

    def mistaken(argv):
        raise UserError("theirs")

    monkeypatch.setattr(cli, "RECIPES", {"broken": broken, "mistaken": mistaken})
    assert cli.main(["train", "mistaken/x"]) == 2
    with pytest.raises(ValueError, match="ours"):
        cli.main(["train", "broken/x"])


def test_doctor_prints_what_is_here_and_what_is_not(capsys, monkeypatch):
    monkeypatch.setattr(environment, "_version", lambda optional: None)
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert "rms_norm" in shown
    for optional in environment.OPTIONAL:
        assert optional.package in shown


def test_doctor_prints_brackets_as_they_are(capsys, monkeypatch):
    """Text in brackets is markup to rich: `warploom[te]` lost its extra."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.compilers, "warnings", lambda: ["a [bold]b[/bold] :bug:"])
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "pip install warploom[te]" in shown
    assert "warning: a [bold]b[/bold] :bug:" in shown


def test_doctor_says_what_a_backend_that_serves_is_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for package, backend in (
        ("liger-kernel", "liger"),
        ("transformer-engine", "te"),
        ("apex",) * 2,
    ):
        row = next(line for line in lines if f" {package} " in line)
        assert f'backend="{backend}" of some operators, when named' in row, row
        assert "not used" not in row


_WHERE = ("kernels", "parallel", "models", "recipes", "benchmarks", "src", "tests")


def test_a_package_is_used_if_and_only_if_code_names_it():
    root = environment.Path(__file__).parents[1]
    files = [file for folder in _WHERE for file in (root / folder).rglob("*.py")]
    text = "\n".join(file.read_text() for file in files if "research" not in file.parts)
    for optional in environment.OPTIONAL:
        if optional.module == "material":  # of mkdocs.yml
            continue
        module = re.escape(optional.module)
        named = re.search(
            rf'^ *(import|from) {module}\b|(import_module|importorskip)\(f?"{module}\b'
            rf'|_?find_spec\("{module}\b|\("{module}", "',
            text,
            re.M,
        )
        assert bool(named) == optional.used, optional.package


def test_doctor_prints_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"]["version"] == torch.__version__
    assert found["packages"]["triton"] == environment.environment()["packages"]["triton"]
    assert found["cpu"]["memory_gib"] > 0.5
    assert found["warnings"] == []


def test_every_extra_that_enables_something_is_declared():
    import tomllib

    project = tomllib.loads((environment.Path(__file__).parents[1] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    for optional in environment.OPTIONAL:
        if optional.extra:
            assert any(n.startswith(optional.package) for n in extras[optional.extra]), optional
    listed = {optional.extra for optional in environment.OPTIONAL} | {"dev"}
    assert set(extras) <= listed


def test_another_project_named_apex_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert "must be NVIDIA's" in (environment.apex_warning() or "")
    (tmp_path / "apex" / "normalization").mkdir()
    assert environment.apex_warning() is None


def test_a_gpu_has_its_nvml_figures(monkeypatch):
    class NotSupported(Exception):
        pass

    def refuse(*words):
        raise NotSupported

    nvml = SimpleNamespace(
        NVMLError_NotSupported=NotSupported,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 700_000,
        nvmlDeviceGetClockInfo=lambda handle, kind: 345,
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: {1: 1980, 2: 3201}[kind],
        nvmlDeviceGetTemperature=refuse,
    )
    device = SimpleNamespace(
        name="H200", major=9, minor=0, total_memory=141 * 2**30, multi_processor_count=132, uuid="a"
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    (gpu,) = environment.gpus()
    assert gpu["power_limit_w"] == 700
    assert (gpu["clock_mhz"], gpu["max_clock_mhz"], gpu["memory_clock_mhz"]) == (345, 1980, 3201)
    assert gpu["temperature_c"] is None
    assert "power limit 700.0 W, clock 345 of 1980 MHz" in doctor._gpu(gpu)


def test_the_cpu_is_read_from_the_kernel(monkeypatch):
    text = "model name\t: AMD EPYC\ncore id\t: 0\nphysical id\t: 0\nflags\t: avx2 amx_bf16\n"
    monkeypatch.setattr(environment, "_read", lambda path: text)
    cpu = environment._cpu()
    assert (cpu["model"], cpu["cores"]) == ("AMD EPYC", 1)
    assert cpu["instructions"] == ["avx2", "amx_bf16"]
