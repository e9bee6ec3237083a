"""The native libraries as a ninja build: what is compiled, with which flags, into what."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from shlex import quote, split

from environment import find_torch

# The Stable ABI of torch 2.10: later versions load what is built here, whichever of them it is built against.
TORCH_TARGET = "0x020a000000000000"

# Every CPU kernel is compiled once per instruction set, into a namespace of that name; dispatch.cpp chooses. The sets
# of BFLOAT16 have instructions for bfloat16 products, and compile only what uses them. EMULATED names the parts of a
# set that tests/kernels/cpu has in plain C++, for a CPU that ends at AVX2.
INSTRUCTION_SETS = {"portable": ""}
BFLOAT16 = {}
EMULATED: dict[str, tuple[str, ...]] = {}
if platform.machine() in ("x86_64", "AMD64"):
    avx512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    INSTRUCTION_SETS |= {"avx2": "-mavx2 -mfma -mf16c", "avx512": avx512}
    avx512_bf16 = f"{avx512} -mavx512bf16"
    BFLOAT16 |= {"avx512_bf16": avx512_bf16, "amx": f"{avx512_bf16} -mamx-tile -mamx-bf16"}
    EMULATED |= {"avx512": ("avx512",), "avx512_bf16": ("avx512", "bf16"), "amx": ("avx512", "bf16", "amx")}
ONCE = ("dispatch.cpp", "isa.cpp")
FOR_BFLOAT16 = ("attention.cpp", "gelu.cpp")
CXX_FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi"
    " -fno-math-errno -fno-trapping-math -ffp-contract=fast"
)

# Ampere, Ada (which runs code for 8.6), Hopper, Blackwell; PTX for what comes after.
CUDA_ARCHITECTURES = "8.0 8.6 9.0 10.0 12.0+PTX"
GENERATIONS = {  # torch's names for some, from Turing on
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0 8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX",
}


class BuildError(SystemExit):
    """Something that the person who builds can mend; pip shows the text."""


@dataclass
class Library:
    link: str  # the linking command without its inputs
    flags: str = ""
    objects: list[tuple[str, Path, str]] = field(default_factory=list)  # ninja rule, source, flags


def library_names() -> list[str]:
    return ["_C_cpu", "_facts", *(["_C_cuda"] if find_nvcc() else [])]


def libraries(root: Path, build: Path) -> dict[str, Library]:
    """The libraries by name, `root` being the checkout and `build` the folder for what is made on the way."""
    torch = find_torch()
    if torch is None:
        raise BuildError("There is no torch >= 2.10 here to build against: install it, or drop --no-build-isolation.")
    cxx = os.environ.get("CXX", "c++")
    if shutil.which(cxx.split()[0]) is None:
        raise BuildError(f"There is no C++ compiler {cxx!r}: install g++ or clang++, or name yours in CXX.")
    nvcc = find_nvcc()
    torch_headers = f"-isystem {quote(f'{torch.root}/include')} -DTORCH_TARGET_VERSION={TORCH_TARGET}"
    torch_library = f"-L{quote(f'{torch.root}/lib')} -ltorch_cpu"
    csrc = [path for path in sorted((root / "csrc").glob("*.cpp")) if path.name != "facts.cpp"]

    cpu = Library(f"{cxx} -shared", torch_library)
    cpu.objects += [("cxx", path, f"{torch_headers} -DVITKD_BACKEND=cpu -DVITKD_KEY=CPU") for path in csrc]
    kernels = cpu_kernels(root, emulated=os.environ.get("VITKD_EMULATED") == "1")
    cpu.objects += [("cxx", path, flags) for path, flags in kernels]
    found = {"_C_cpu": cpu}

    architectures = cuda_architectures(nvcc) if nvcc else []
    if nvcc and not architectures:
        if os.environ.get("VITKD_CUDA") == "1":
            raise BuildError("VITKD_CUDA=1, but every GPU here or in TORCH_CUDA_ARCH_LIST is older than 8.0.")
        print("vitkd_fast: no CUDA library, for the GPUs are older than compute capability 8.0", file=sys.stderr)
    codes = nvcc_codes(architectures)
    if architectures:
        assert nvcc is not None
        # The stub stands for torch's CUDA library, which the torch at hand may lack; the loader finds the real one.
        stub = build / "stub/libtorch_cuda.so"
        cuda = Library(f"{nvcc} -shared -cudart static", f"{torch_library} -L{quote(str(stub.parent))} -ltorch_cuda")
        cuda.objects += [("cxx", path, f"{torch_headers} -DVITKD_BACKEND=cuda -DVITKD_KEY=CUDA") for path in csrc]
        cuda.objects += [("nvcc", path, " ".join(codes)) for path in sorted((root / "kernels/cuda").glob("*.cu"))]
        found["_C_cuda"] = cuda

    pybind = find_spec("pybind11")
    pybind_include = Path(pybind.origin).parent / "include" if pybind and pybind.origin else torch.root / "include"
    facts = Library(f"{cxx} -shared")
    cuda_code = ",".join(code.rpartition("=")[2] for code in codes if code.startswith("-gencode"))
    made = f'-DVITKD_TORCH=\\"{torch.version}\\" -DVITKD_CUDA_CODE=\\"{cuda_code}\\"'
    python_headers = " ".join(
        f"-isystem {quote(str(path))}" for path in (sysconfig.get_path("include"), pybind_include)
    )
    facts.objects += [
        ("cxx", root / "csrc/facts.cpp", f"{python_headers} {made}"),
        *(("cxx", path, flags) for path, flags in kernels if path.name == "isa.cpp"),
    ]
    return found | {"_facts": facts}


def accepts(cxx: str, flags: str) -> bool:
    """Whether the compiler knows these flags: AMX takes gcc 11 or clang 11."""
    command = [*cxx.split(), *flags.split(), "-fsyntax-only", "-xc++", os.devnull]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def cpu_kernels(root: Path, emulated: bool = False) -> list[tuple[Path, str]]:
    """The sources of the CPU kernels, each as often as it is compiled, with its flags.

    `emulated` compiles every set for AVX2 and what it lacks as plain C++; VITKD_EMULATED=1 builds such a library.
    """
    cxx = os.environ.get("CXX", "c++")
    sets = INSTRUCTION_SETS | {name: flags for name, flags in BFLOAT16.items() if accepts(cxx, flags)}
    if emulated:
        folder = root / "tests/kernels/cpu"
        for name, parts in EMULATED.items():
            flags = f"{sets['avx2']} -O1"  # at -O3 gcc takes four times as long, and the tests as long as at -O1
            sets[name] = " -include ".join([flags, *(quote(f"{folder}/{part}_emulated.h") for part in parts)])
    known = " ".join(f"-DVITKD_HAVE_{name.upper()}" for name in BFLOAT16 if name in sets)
    found = []
    for path in sorted((root / "kernels/cpu").glob("*.cpp")):
        if path.name in ONCE:
            found.append((path, f"{known} -DVITKD_EMULATED" if emulated else known))
            continue
        for name, flags in sets.items():
            if name in INSTRUCTION_SETS or path.name in FOR_BFLOAT16:
                found.append((path, f"-DVITKD_ISA={name} {flags}"))
    return found


def compile_program(target: Path, sources: Sequence[tuple[Path, str]], common: str, link: str = "") -> Path:
    """An executable of C++ sources, each with its flags; what it is made from lies beside it."""
    cxx = os.environ.get("CXX", "c++").split()
    objects = [f"{target}.{number}.o" for number in range(len(sources))]
    commands = [
        [*cxx, *common.split(), *split(flags), "-c", str(source), "-o", made]
        for (source, flags), made in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(subprocess.check_call, commands))
    subprocess.check_call([*cxx, *common.split(), *link.split(), *objects, "-o", str(target)])
    return target


def find_nvcc() -> str | None:
    wish = os.environ.get("VITKD_CUDA", "")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None and wish == "1":
        raise BuildError(
            "VITKD_CUDA=1, but there is no nvcc: put it on PATH, or set CUDA_HOME to the toolkit's folder."
        )
    return nvcc


def cuda_architectures(nvcc: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, as torch reads it; without it, or if it says "native", the GPUs at hand; without those the
    default, as far as this nvcc knows it.

    Less those that the kernels are not for, before 8.0.
    """
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ")
    found = " ".join(GENERATIONS.get(word, word) for word in wish.split()).split()
    for word in found:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?|native", word):
            known = ", ".join(GENERATIONS)
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has {word!r}; accepted: numbers such as 9.0 or 9.0+PTX, {known}.")
    if not found or found == ["native"]:
        try:
            query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
            found = sorted(set(subprocess.check_output(query, text=True, stderr=subprocess.DEVNULL).split()))
        except (OSError, subprocess.CalledProcessError):
            known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
            wanted = CUDA_ARCHITECTURES.split()
            found = [architecture for architecture in wanted if f"compute_{digits(architecture)}" in known]
    return [architecture for architecture in found if _number(architecture) >= 8]


def nvcc_codes(architectures: Sequence[str]) -> list[str]:
    """What nvcc is told about the GPUs that it compiles for.

    '9.0' is machine code; '9.0+PTX' adds what later GPUs compile for themselves. Of 9.0 it is the code for just that
    architecture, which alone has instructions for four warps at once. The sources know no other difference than before
    and after it, so the GPUs on either side share the intermediate code of the oldest among them: making that is more
    than half of nvcc's time.
    """
    oldest: dict[bool, str] = {}  # after Hopper or before it
    codes = []
    for architecture in sorted(architectures, key=_number):
        n = digits(architecture)
        alone = n == "90" or not n.isdigit()  # a letter: only that GPU, or only its family, runs it
        code = "90a" if n == "90" else n
        shared = code if alone else oldest.setdefault(int(n) > 90, n)
        codes.append(f"-gencode=arch=compute_{shared},code=sm_{code}")
        if architecture.endswith("+PTX"):
            portable = n if alone else shared
            codes.append(f"-gencode=arch=compute_{portable},code=compute_{portable}")
        if n in ("90", "90a"):
            codes.append("-DVITKD_SM90A")
    return codes


def _number(architecture: str) -> float:
    return float(architecture.removesuffix("+PTX").rstrip("af"))


def digits(architecture: str) -> str:
    return architecture.removesuffix("+PTX").replace(".", "")


def in_ninja(path: Path) -> str:
    """As ninja writes a path; to the shell it hands it with quotes."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build(targets: dict[str, Path], found: dict[str, Library], folder: Path, verbose: bool) -> None:
    """Compile and link each library to its target; ninja redoes only what changed."""
    folder.mkdir(parents=True, exist_ok=True)
    cxx, nvcc = os.environ.get("CXX", "c++"), find_nvcc() or "nvcc"
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not jobs.isdecimal():
        raise BuildError(f"MAX_JOBS is {jobs!r}; it is to be a number.")
    lines = [
        f"rule cxx\n  command = {cxx} {CXX_FLAGS} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d",
        f"rule nvcc\n  command = {nvcc} -std=c++17 -O3 --threads {jobs} -Xcompiler -fPIC,-fvisibility=hidden"
        " -MD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d",
        "rule link\n  command = $link -o $out $in $flags",
        f"rule stub\n  command = echo 'extern \"C\" void aoti_torch_get_current_cuda_stream() {{}}' |"
        f" {cxx} -xc++ -shared -fPIC -Wl,-soname,libtorch_cuda.so - -o $out",
        "build stub/libtorch_cuda.so: stub",
    ]
    for name, library in found.items():
        objects = []
        for number, (rule, source, flags) in enumerate(library.objects):
            objects.append(f"{name}/{source.stem}.{number}.o")
            lines.append(f"build {objects[-1]}: {rule} {in_ninja(source)}\n  flags = {flags.replace('$', '$$')}")
        needs = " | stub/libtorch_cuda.so" if name == "_C_cuda" else ""
        lines.append(f"build {in_ninja(targets[name])}: link {' '.join(objects)}{needs}")
        lines.append(f"  link = {library.link}\n  flags = {library.flags.replace('$', '$$')}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")

    runner = [sys.executable, "-m", "ninja"] if find_spec("ninja") else [shutil.which("ninja") or "ninja"]
    try:
        subprocess.check_call([*runner, "-C", str(folder), "-j", jobs, *(["-v"] if verbose else [])])
    except FileNotFoundError:
        raise BuildError("There is no ninja: pip install ninja.") from None
    except subprocess.CalledProcessError:
        raise BuildError("The native libraries did not compile; the compiler's message is above.") from None
