"""Building native kernels: plain C ABI, ninja, a per-user cache that nothing can block."""

from drivetrain_kernels.native.library import NativeLibrary
from drivetrain_kernels.native.toolchain import CXX, Toolchain

__all__ = ["CXX", "NativeLibrary", "Toolchain"]
