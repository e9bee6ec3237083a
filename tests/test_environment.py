"""Importing the package: what the VITKD_ variables change, what it says of values that mean nothing, and that CUDA is
left alone."""

import os
import subprocess
import sys

import pytest
from testing_rules import needs_cuda_build, needs_native


def run(code, **environ):
    environ = {key: value for key, value in os.environ.items() if not key.startswith("VITKD_")} | environ
    return subprocess.run([sys.executable, "-W", "always", "-c", code], env=environ, capture_output=True, text=True)


def test_importing_leaves_cuda_alone():
    done = run(
        "import torch, vitkd_fast; vitkd_fast.ops.attention(torch.zeros(1, 2, 3, 1, 8));"
        "assert not torch.cuda.is_initialized()"
    )
    assert done.returncode == 0, done.stderr


def test_classification_needs_none_of_the_extras():
    done = run(
        "import sys\n"
        "extras = 'transformers', 'torchmetrics', 'pycocotools', 'pytest', 'matplotlib'\n"
        "sys.modules.update(dict.fromkeys(extras))  # None: an import of it fails\n"
        "import torch, vitkd_fast\n"
        "from timm.models.vision_transformer import VisionTransformer\n"
        "teacher, student = (VisionTransformer(8, 4, 1, 3, embed_dim=8, depth=1, num_heads=2) for _ in range(2))\n"
        "held = [(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))]\n"
        "result = vitkd_fast.distill(teacher, student, steps=2, batch_size=4, evaluate=held, device='cpu')\n"
        "assert result.report.student_accuracy is not None\n"
        "vitkd_fast.decelerate(result.student)\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_wish_that_means_nothing_is_named():
    done = run("import vitkd_fast", VITKD_CUDA_BACKEND="cudnn")
    assert done.returncode == 0
    assert "VITKD_CUDA_BACKEND=cudnn is ignored; accepted: native, triton, sdpa." in done.stderr


@needs_cuda_build
def test_a_wish_that_cannot_be_had_is_named():
    done = run("import vitkd_fast", VITKD_CUDA_BACKEND="native", VITKD_NO_NATIVE="1")
    assert done.returncode == 0
    assert "VITKD_CUDA_BACKEND=native cannot be had: VITKD_NO_NATIVE is set." in done.stderr


@needs_native
def test_an_instruction_set_that_there_is_not_is_named():
    done = run("import vitkd_fast", VITKD_CPU_ISA="sse4")
    assert done.returncode == 0
    assert "VITKD_CPU_ISA=sse4 is ignored; accepted: portable, avx2, avx512, avx512_bf16, amx." in done.stderr


@needs_native
@pytest.mark.parametrize("value", ["", "0", "1"])
def test_plain_torch_on_demand(value):
    code = "from vitkd_fast.backends import implementation; print(implementation('attention', 'cpu').name)"
    done = run(code, VITKD_NO_NATIVE=value)
    assert done.stdout.strip() == ("formula" if value == "1" else "native"), done.stderr
