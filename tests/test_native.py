"""The library as a C program sees it: under sanitizers, under emulation, and what it links to.

`tests/native/fuzz.c` draws random shapes and values, and compares every path with sums in double precision.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ternarize.kernels import cpu

HERE = Path(__file__).parent
SOURCES = HERE.parent / "ternarize" / "kernels" / "csrc"
FUZZ = HERE / "native" / "fuzz.c"
EMULATED = HERE / "native" / "emulated"
COMMON: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("decoder.c", "dispatch.c", "pack.c", "prompt.c", "threads.c"), ()),
    "scalar.c": ("-fno-inline",),  # takes a sixth of the time to compile under sanitizers, and runs as fast
}
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c")
X86 = {
    "avx2.c": ("-mavx2", "-mfma", "-mf16c"),
    "avx512vnni.c": AVX512,
    "avx512vbmi.c": (*AVX512, "-mavx512vbmi"),
    "amx.c": (*AVX512, "-mamx-tile", "-mamx-bf16"),
}
NEON = {"neon.c": ("-march=armv8.2-a+dotprod",)}
# One function for all numbers of tokens: the same loads and stores, and a fifth of the time to compile.
FLAGS = ("-O1", "-g", "-std=gnu11", "-ffp-contract=off", "-Wall", "-Werror", "-DANY_COUNT")


def build(
    compiler: str, folder: Path, special: dict[str, tuple[str, ...]], *flags: str, cpu: Path = SOURCES / "cpu.c"
) -> Path:
    """The fuzzer as a program; `special` is {file of one instruction set: its flags}, `cpu` tells what there is."""
    objects = []
    for source, own in {cpu: (), **{SOURCES / name: own for name, own in (COMMON | special).items()}}.items():
        objects.append(str(folder / f"{source.name}.o"))
        subprocess.run([compiler, *FLAGS, *flags, *own, "-c", str(source), "-o", objects[-1]], check=True)
    program = folder / "fuzz"
    subprocess.run([compiler, *FLAGS, *flags, str(FUZZ), *objects, "-o", str(program), "-lpthread", "-lm"], check=True)
    return program


def test_no_byte_too_far_and_no_undefined_behaviour(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    if not {"avx2", "avx512vnni"} & cpu.paths().keys():
        pytest.skip("built for x86 processors only")
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    (tmp_path / "probe.c").write_text("int main(void) { return 0; }\n")
    probe = [compiler, *sanitize, str(tmp_path / "probe.c"), "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip(f"{compiler} has no sanitizers here")
    program = build(compiler, tmp_path, X86, "-DTZ_X86", *sanitize)
    done = subprocess.run([str(program), "60", "7"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name, supported in cpu.paths().items() if supported)


def test_x86_paths_under_emulation(tmp_path: Path) -> None:
    """On any processor: those that lack AVX-512 are many, and CI's may be one."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    (tmp_path / "probe.c").write_text("#include <simde/x86/avx512.h>\n")
    if subprocess.run([compiler, "-fsyntax-only", str(tmp_path / "probe.c")], capture_output=True).returncode:
        pytest.skip("no SIMDe (Debian: libsimde-dev)")
    flags = ("-DTZ_X86", "-Wno-psabi", "-I", str(EMULATED))
    program = build(compiler, tmp_path, dict.fromkeys(X86, ()), *flags, cpu=EMULATED / "cpu.c")
    done = subprocess.run([str(program), "60", "7"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("on: scalar avx2 avx512vbmi avx512vnni amx\n")


def test_neon_under_emulation(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no cross compiler or no emulator (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)")
    program = build(compiler, tmp_path, NEON, "-DTZ_NEON", "-static")
    command = [emulator, "-cpu", "max", str(program), "40", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("on: scalar neon\n")


def test_the_library_needs_the_c_library_and_nothing_else() -> None:
    library, tool = cpu.find_library(), shutil.which("nm")
    if library is None or tool is None:
        pytest.skip("no library, or no nm")
    listed = subprocess.run([tool, "-D", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    needed = {line.split()[-1].split("@")[0] for line in listed if " U " in line}
    offered = {line.split()[-1].split("@")[0] for line in listed if " T " in line}
    foreign = [name for name in needed if name.startswith(("GOMP", "omp_", "Py", "_Py", "_Z", "at_", "aoti", "__kmp"))]
    assert not foreign
    assert offered == set(cpu._SIGNATURES) | {"tz_free_shape"}


def test_every_function_of_the_header_is_declared_alike() -> None:
    header = (SOURCES / "ternarize.h").read_text(encoding="utf-8")
    assert f"#define TZ_ABI {cpu.ABI}\n" in header
    for name, (_, arguments) in cpu._SIGNATURES.items():
        declared = header.split(f"{name}(", 1)[1].split(")", 1)[0]
        assert len(arguments) == (0 if declared == "void" else declared.count(",") + 1), name
