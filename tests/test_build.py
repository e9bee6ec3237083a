"""Installing: what the build finds, what it makes, and that what it makes runs elsewhere."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import environment
import native
import pytest
import torch

import vitkd_fast

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

SMOKE = """
import torch, vitkd_fast
from vitkd_fast.ops.attention import attention_formula
assert vitkd_fast.backends.implementation("attention", "cpu").name == "native", vitkd_fast.backends.libraries()
qkv = torch.randn(2, 17, 3, 2, 32, requires_grad=True)
ours, formula = vitkd_fast.ops.attention(qkv), attention_formula(qkv, 32 ** -0.5)
torch.testing.assert_close(ours, formula)
torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), qkv)[0] for x in (ours, formula)))
student, teacher = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
loss = vitkd_fast.ops.kd_loss(student, teacher, temperature=2.0)
kl = torch.nn.functional.kl_div(
    (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), reduction="batchmean", log_target=True)
torch.testing.assert_close(loss, kl * 4)
torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, kl * 4)))
print("works under torch", torch.__version__)
"""


def run(command, **options) -> str:
    """Run a command; its output, which a failure shows."""
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def copy_package(folder: Path, libraries: bool = True) -> Path:
    """The installed package as plain files in a folder of its own."""
    package = folder / "vitkd_fast"
    ignored = ["__pycache__", *([] if libraries else ["*.so"])]
    shutil.copytree(Path(vitkd_fast.__file__).parent, package, ignore=shutil.ignore_patterns(*ignored))
    shutil.copytree(ROOT / "kernels/triton", package / "triton", dirs_exist_ok=True)
    return package


def smoke(python: str | Path, site: Path, **environ: str) -> str:
    return run([python, "-c", SMOKE], env=os.environ | {"PYTHONPATH": str(site)} | environ, cwd=site)


@pytest.fixture(scope="module")
def older_torch(tmp_path_factory) -> Path:
    """The python of a new environment that holds torch 2.13.0 and nothing of ours."""
    folder = tmp_path_factory.mktemp("older_torch")
    venv.create(folder, with_pip=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "-q", "torch==2.13.0", "numpy", "safetensors", "tqdm"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"torch 2.13.0 cannot be installed here: {done.stderr[-300:]}")
    return folder / "bin/python"


def test_the_library_built_here_runs_under_another_torch(older_torch, tmp_path):
    copy_package(tmp_path)
    assert "works under torch 2.13.0" in smoke(older_torch, tmp_path)


def test_installing_keeps_the_torch_that_is_there(older_torch, tmp_path):
    """Under pip's isolation, compiled against that torch, and without torchvision's torch replacing it."""
    source = tmp_path / "späced source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "build", "*.so", "*.egg-info"))
    run([older_torch, "-m", "pip", "install", "-q", source], env=os.environ | {"VITKD_CUDA": "0"})
    assert "works under torch 2.13.0" in smoke(older_torch, tmp_path)
    facts = run([older_torch, "-c", "from vitkd_fast import _facts; print(_facts.build()['torch'])"], cwd=tmp_path)
    assert facts.startswith("2.13.0")


def test_sdist_builds_and_its_wheel_runs_without_a_compiler(tmp_path):
    backend = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, '_build'); import backend; backend.build_sdist({str(tmp_path)!r})",
    ]
    run(backend, cwd=ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for needed in (
        "csrc/attention.cpp",
        "kernels/kernels.h",
        "kernels/cpu/attention.cpp",
        "kernels/cuda/attention.cu",
        "kernels/triton/attention.py",
        "_build/backend.py",
    ):
        assert (source / needed).is_file()
    pip = [sys.executable, "-m", "pip"]
    environ = os.environ | {"VITKD_CUDA": "0"}
    run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], env=environ)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    run([*pip, "install", "-q", "--no-deps", "--target", site, wheel])
    assert (site / "vitkd_fast/triton/attention.py").is_file()
    assert "works under torch" in smoke(sys.executable, site, PATH="", CXX="")


def test_a_checkout_that_hides_the_installed_package_says_so(tmp_path):
    copy_package(tmp_path, libraries=False)
    (tmp_path / "setup.py").touch()
    told = run([sys.executable, "-c", "import vitkd_fast"], cwd=tmp_path)
    assert "This is the checkout, which hides an installed package: start Python in another folder" in told


def test_a_missing_library_leaves_the_formulas(tmp_path):
    copy_package(tmp_path, libraries=False)
    told = run(
        [
            sys.executable,
            "-c",
            """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, vitkd_fast
    vitkd_fast.ops.attention(torch.randn(1, 5, 3, 2, 8, requires_grad=True)).sum().backward()
    vitkd_fast.ops.kd_loss(torch.randn(2, 3), torch.randn(2, 3))
ours = [str(w.message) for w in caught if "vitkd_fast" in str(w.message)]
assert len(ours) == 1 and "_C_cpu.so was not built" in ours[0], ours
print(vitkd_fast.doctor())
""",
        ],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    assert "formula: plain torch, because _C_cpu.so was not built" in told


def test_a_broken_library_is_named_and_survived(tmp_path):
    package = copy_package(tmp_path)
    (package / "_C_cpu.so").write_bytes(b"not a library")
    told = run(
        [sys.executable, "-c", "import vitkd_fast; print(vitkd_fast.backends.libraries()['_C_cpu'])"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    assert "vitkd_fast runs on plain torch" in told and "_C_cpu.so does not load" in told


def test_nothing_of_ours_imports_timm_or_triton_at_import():
    told = run(
        [sys.executable, "-c", "import sys, vitkd_fast; print([m for m in ('timm', 'triton') if m in sys.modules])"]
    )
    assert told.strip() == "[]"


@pytest.mark.parametrize(
    ("wish", "home", "expected"),
    [("0", "", None), ("", "/nowhere", None), ("1", "/nowhere", native.BuildError)],
)
def test_cuda_is_found_by_its_compiler(monkeypatch, wish, home, expected):
    monkeypatch.setenv("VITKD_CUDA", wish)
    monkeypatch.setenv("CUDA_HOME", home)
    if expected is None:
        assert native.find_nvcc() is None
    else:
        with pytest.raises(expected, match="CUDA_HOME"):
            native.find_nvcc()


def test_cuda_architectures_follow_the_list(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert native.cuda_architectures("nvcc") == ["8.0", "9.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5+PTX 9.0a 12.0")  # none of what the kernels are not for
    assert native.cuda_architectures("nvcc") == ["9.0a", "12.0"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Turing;Ampere;Hopper")  # as torch names them
    assert native.cuda_architectures("nvcc") == ["8.0", "8.6+PTX", "9.0+PTX"]
    for wrong in ("Hoper", "9", "sm_90"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0 {wrong}")
        with pytest.raises(native.BuildError, match=f"has '{wrong}'; accepted: numbers such as 9.0"):
            native.cuda_architectures("nvcc")


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        ("9.0+PTX", "90a:sm_90a 90:compute_90"),
        ("8.6", "86:sm_86"),
        ("9.0a 10.0a 12.0", "90a:sm_90a 100a:sm_100a 120:sm_120"),
        (native.CUDA_ARCHITECTURES, "80:sm_80 80:sm_86 90a:sm_90a 100:sm_100 100:sm_120 100:compute_100"),
        ("12.0+PTX 10.0 8.9 8.0", "80:sm_80 80:sm_89 100:sm_100 100:sm_120 100:compute_100"),
    ],
)
def test_gpus_share_intermediate_code_where_the_sources_are_the_same(architectures, expected):
    codes = native.nvcc_codes(architectures.split())
    assert ("-DVITKD_SM90A" in codes) == ("9.0" in architectures)
    pairs = [code.removeprefix("-gencode=arch=compute_").replace(",code=", ":") for code in codes if "gencode" in code]
    assert pairs == expected.split()


def test_requirements_match_the_torch_that_is_there(monkeypatch, tmp_path):
    def requirements(version: str, cuda: str, *beside: str) -> list[str]:
        site = tmp_path / version.replace("+", "_")
        for folder in ("torch/include/torch/csrc/stable", *beside):
            (site / folder).mkdir(parents=True)
        (site / "torch/__init__.py").touch()
        (site / "torch/include/torch/csrc/stable/library.h").touch()
        (site / "torch/version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda}\n")
        monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(site))
        return environment.runtime_requirements()

    assert "torchvision==0.27.*" in requirements("2.12.1+cu130", "'13.0'", "pip")
    assert not any("timm" in r or "vision" in r for r in requirements("2.13.0+cpu", "None", "pip"))
    assert not any("torchvision" in r for r in requirements("2.14.0", "'13.0'", "pip", "torchvision"))
    assert not any("torchvision" in r for r in requirements("2.14.1", "'13.0'"))  # no pip: a throw-away environment
    assert any("timm" in r for r in requirements("2.9.0", "'12.8'", "pip"))  # too old: pip will bring a new one


def test_torch_version_is_one_the_stable_abi_serves():
    major, minor = torch.__version__.split(".")[:2]
    assert (int(major), int(minor)) >= environment.MINIMUM_TORCH
