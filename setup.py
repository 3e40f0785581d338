"""Builds csrc: the C++ always, the CUDA files when nvcc is there. It needs pybind11 and never imports torch.

FLEX_CUDA=0 leaves CUDA out, FLEX_CUDA=1 makes a missing or failing nvcc an error; FLEX_CUDA_ARCHS="80;90a" picks chips
(later ones translate the code of the first).
Objects are compiled in parallel (MAX_JOBS) and only when their source or a header changed.
A machine without a C++ compiler still gets a package that works: PyTorch computes instead.
"""

import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError

WANT_CUDA = os.environ.get("FLEX_CUDA", "auto")
CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
NVCC = None if WANT_CUDA == "0" else shutil.which("nvcc") or shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
if WANT_CUDA == "1" and not NVCC:
    sys.exit(f"FLEX_CUDA=1, but there is no nvcc on PATH or in {CUDA_HOME}/bin")
ARCHS = os.environ.get("FLEX_CUDA_ARCHS", "80;90a").split(";")
HEADERS = glob("csrc/**/*.h", recursive=True)
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-lineinfo"]
NVCC_FLAGS += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
NVCC_FLAGS += [f"-gencode=arch=compute_{ARCHS[0]},code=compute_{ARCHS[0]}"]


def needs_recompile(obj: str, source: str) -> bool:
    return not os.path.exists(obj) or os.path.getmtime(obj) < max(map(os.path.getmtime, [source, *HEADERS]))


class Build(build_ext):
    def build_extension(self, ext: Pybind11Extension) -> None:
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        for source in [name for name in ext.sources if name.endswith(".cu")]:
            ext.sources.remove(source)
            ext.extra_objects.append(f"{self.build_temp}/{Path(source).stem}.cu.o")
            command = [NVCC, *NVCC_FLAGS, "-c", source, "-o", ext.extra_objects[-1]]
            if needs_recompile(ext.extra_objects[-1], source) and subprocess.call(command) != 0:
                raise CompileError(f"{NVCC} cannot compile {source}")
        super().build_extension(ext)


ParallelCompile("MAX_JOBS", default=os.cpu_count() or 1, needs_recompile=needs_recompile).install()
FLAGS = {"cxx_std": 17, "include_dirs": ["csrc"], "depends": HEADERS, "extra_compile_args": ["-O3", "-fopenmp", "-g0"]}
CPP = sorted(glob("csrc/*.cpp") + glob("csrc/isa/*.cpp"))
extensions = [Pybind11Extension("flex_kernels._native", CPP, extra_link_args=["-fopenmp"], optional=True, **FLAGS)]
if NVCC and (CU := sorted(glob("csrc/cuda/*.cu"))):
    CU.append("csrc/cuda/bindings_cuda.cpp")
    cuda = Pybind11Extension("flex_kernels._cuda", CU, optional=WANT_CUDA != "1", **FLAGS)
    homes = (Path(CUDA_HOME), Path(os.path.realpath(NVCC)).parents[1])
    cuda.library_dirs += [str(home / lib) for home in homes for lib in ("lib64", "lib") if (home / lib).is_dir()]
    cuda.libraries += ["cudart_static", "rt", "dl", "pthread"]
    extensions.append(cuda)
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
