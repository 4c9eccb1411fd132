"""Builds the null GPU (null_cuda.c) and starts Python with it: python tests/nullgpu/device.py [arguments of python].

The interpreter must have a CUDA build of torch and CUDA's headers (the nvidia-cuda-runtime package that torch installs).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = (
    "libtorch_cuda.so",
    "libc10_cuda.so",
    "libtorch_cuda_linalg.so",
    "libtorch_python.so",
    "libtorch_nvshmem.so",
)
REPLACED = re.compile(r"^(cuda[A-Z]|__cuda|cublas|nccl)\w+$")  # the functions that must not reach a real library


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin, f"{sys.executable} has no torch"
    return Path(spec.origin).parent


def imported_functions() -> set[str]:
    """Functions of CUDA, cuBLAS and NCCL that torch's libraries import."""
    found: set[str] = set()
    for name in LIBRARIES:
        library = torch_folder() / "lib" / name
        if library.is_file():
            text = subprocess.run(
                ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
            ).stdout
            found |= {line.split()[-1].split("@")[0] for line in text.splitlines()}
    assert found, f"no CUDA build of torch in {torch_folder()}"
    return {name for name in found if REPLACED.match(name)}


def build(folder: Path) -> Path:
    """The library in ``folder``, built if it is missing or older than its source."""
    library, source = folder / "libcuda.so.1", HERE / "null_cuda.c"
    if library.is_file() and library.stat().st_mtime > source.stat().st_mtime:
        return library
    folder.mkdir(parents=True, exist_ok=True)
    defined = set(re.findall(r"\b(\w+)\(", source.read_text()))
    stubs = sorted(imported_functions() - defined)
    (folder / "stubs.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in stubs))
    include = torch_folder().parent / "nvidia" / "cu13" / "include"
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        out = Path(partial) / library.name
        command = ["gcc", "-O1", "-w", "-fPIC", "-shared", "-I", include, f"-Wl,-soname,{library.name}", "-o", out]
        subprocess.run([*command, source, folder / "stubs.c", "-ldl", "-lpthread"], check=True)
        out.rename(library)
    link = folder / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library.name)
    return library


def environment(folder: Path | None = None) -> dict[str, str]:
    """The variables with which a Python process finds the null GPU."""
    folder = (
        folder
        or Path(tempfile.gettempdir()) / f"nullgpu-{os.getuid()}-{torch_folder().parent.parent.parent.parent.name}"
    )
    library = build(folder)
    path = [str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "NULLGPU": "1", "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": "0",  # tests/conftest.py sets it to nothing
    }  # fmt: skip


if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {**os.environ, **environment()})
