"""CPUs as an accelerator: bound cores, memory statistics, shared memory, native kernels."""

from __future__ import annotations
