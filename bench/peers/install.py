"""The peers' own software, below `.cache/bench/peers`: nothing of it goes into the project's environment."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from bench.report import ROOT
from examples.fetch import CACHE

INSTALLED = CACHE.parent / "bench" / "peers"
LLAMA = "llama_cpp_python-0.3.36"
"""The registry's package that brings llama.cpp's source."""
LLAMA_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_OPENMP=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip
"""Without what a server on the loopback does not need."""
LLAMA_NATIVE = ("-DGGML_NATIVE=ON",)
"""For this machine's processor, as its own guide says."""
LLAMA_WITHOUT_AMX = (
    "-DGGML_NATIVE=OFF", "-DGGML_SSE42=ON", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_BMI2=ON", "-DGGML_FMA=ON",
    "-DGGML_F16C=ON", "-DGGML_AVX512=ON", "-DGGML_AVX512_VBMI=ON", "-DGGML_AVX512_VNNI=ON", "-DGGML_AVX512_BF16=ON",
)  # fmt: skip
"""For processors with AMX: what this version packs for that crashes at its first step. All else that they have."""
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def environment() -> Path:
    """The Python of the peers' virtual environment, which is made if it is not there (1.2 GB, minutes)."""
    folder = INSTALLED / "venv"
    python, stamp = folder / "bin" / "python", folder / ".stamp"
    wanted = REQUIREMENTS.read_text(encoding="utf-8") + (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted):
        print(f"installing the peers into {folder.relative_to(ROOT)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", "-r", REQUIREMENTS]
        subprocess.run(list(map(str, pip)), check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def llama_source(python: Path) -> Path:
    """The unpacked source of llama.cpp."""
    folder = INSTALLED / LLAMA
    if not (folder / ".stamp").is_file():
        name, version = LLAMA.rsplit("-", 1)
        print(f"downloading {LLAMA}", file=sys.stderr)
        wanted = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", f"{name}=={version}"]
        subprocess.run([python, "-m", "pip", "download", "--quiet", "-d", INSTALLED, *wanted], check=True)
        with tarfile.open(INSTALLED / f"{LLAMA}.tar.gz") as archive:
            archive.extractall(INSTALLED, filter="data")
        (folder / ".stamp").touch()
    return folder / "vendor" / "llama.cpp"


def llama_server(python: Path) -> Path:
    """llama.cpp's server, which is built if it is not there (about ten minutes on two cores).

    Raises:
        subprocess.CalledProcessError: it does not compile here.
        OSError: there is no compiler.
    """
    known = Path("/proc/cpuinfo")
    has_amx = known.is_file() and "amx_int8" in known.read_text(encoding="utf-8")
    source, build = llama_source(python), INSTALLED / LLAMA / ("build-without-amx" if has_amx else "build")
    server = build / "bin" / "llama-server"
    if not server.is_file():
        print("building llama.cpp", file=sys.stderr)
        tools = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
        configure = ["cmake", "-G", "Ninja", "-S", source, "-B", build, *LLAMA_FLAGS]
        configure += LLAMA_WITHOUT_AMX if has_amx else LLAMA_NATIVE
        for command in (configure, ["cmake", "--build", build, "--target", "llama-server"]):
            subprocess.run([str(part) for part in command], check=True, env=tools, stdout=sys.stderr)
    return server


def llama_adapter(python: Path, base: Path, adapter: Path) -> Path:
    """An adapter in llama.cpp's format, beside the folder of PEFT's; made if it is older than that."""
    file, weights = adapter.with_name(f"{adapter.name}.gguf"), adapter / "adapter_model.safetensors"
    if not file.is_file() or file.stat().st_mtime < weights.stat().st_mtime:
        scratch = file.with_suffix(".part")
        script = llama_source(python) / "convert_lora_to_gguf.py"
        command = [python, script, "--base", base.resolve(), "--outtype", "f16", "--outfile", scratch, adapter]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        scratch.replace(file)
    return file
