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


# Extension -> CMake target. Both are plain shared libraries without a Python ABI tag, which torch.ops.load_library and
# ctypes open: the operators, and the native runtime.
TARGETS = {"loop_singular_bit._C": "loop_singular_bit_C", "loop_singular_bit._runtime": "loop_singular_bit_runtime_C"}


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        check_torch()
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                sys.exit(f"loop-singular-bit needs {tool} to build: run `pip install {tool}`.")
        self.build_folder = ROOT / "build" / "release"
        configure = ["cmake", "-S", str(ROOT), "-B", str(self.build_folder), "-G", "Ninja"]
        options = [f"-DPython3_EXECUTABLE={sys.executable}", "-DLOOP_SINGULAR_BIT_EXTENSION=ON"]
        subprocess.run([*configure, *options], check=True)
        subprocess.run(["cmake", "--build", str(self.build_folder), "--target", *TARGETS.values()], check=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.build_folder / target.name, target)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            replace_file(
                self.build_folder / f"{ext.name.rpartition('.')[2]}.so", ROOT / self.get_ext_filename(ext.name)
            )


def replace_file(source: Path, target: Path) -> None:
    """A new file, not new bytes in the old one: a running process may have the old one mapped."""
    fresh = target.with_name(f"{target.name}.new")
    shutil.copyfile(source, fresh)
    os.replace(fresh, target)


check_torch()
setup(ext_modules=[Extension(name, sources=[]) for name in TARGETS], cmdclass={"build_ext": CMakeBuild})
