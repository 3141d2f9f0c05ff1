"""Builds the operators with CMake and ships what it built. Sources, flags and targets are listed in CMakeLists.txt."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 13)


def check_torch() -> None:
    install = "pip install torch==2.13.0"
    try:
        import torch
    except ImportError:
        sys.exit(
            f"loop-singular-bit needs PyTorch to build: run `{install}`, "
            "then `pip install --no-build-isolation -e .` (without that flag pip hides the installed torch)."
        )
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MINIMUM_TORCH:
        sys.exit(f"loop-singular-bit needs PyTorch 2.13 or newer and found {torch.__version__}: run `{install}`.")


class CMakeBuild(build_ext):
    """`_C.so` (the operators) and `_runtime.so` (the native runtime): plain shared libraries without a Python ABI tag,
    which torch.ops.load_library and ctypes open."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        check_torch()
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                sys.exit(f"loop-singular-bit needs {tool} to build: run `pip install {tool}`.")
        build = ROOT / "build" / "release"
        subprocess.run(
            [
                "cmake",
                "-S",
                str(ROOT),
                "-B",
                str(build),
                "-G",
                "Ninja",
                f"-DPython3_EXECUTABLE={sys.executable}",
                "-DLOOP_SINGULAR_BIT_EXTENSION=ON",
            ],
            check=True,
        )
        targets = ["loop_singular_bit_C", "loop_singular_bit_runtime_C"]
        subprocess.run(["cmake", "--build", str(build), "--target", *targets], check=True)
        package = Path(self.get_ext_fullpath(ext.name)).parent
        package.mkdir(parents=True, exist_ok=True)
        for library in ("_C.so", "_runtime.so"):
            # A new file, not new bytes in the old one: a running process may have the old one mapped.
            fresh = package / f"{library}.new"
            shutil.copyfile(build / library, fresh)
            os.replace(fresh, package / library)


check_torch()
setup(ext_modules=[Extension("loop_singular_bit._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
