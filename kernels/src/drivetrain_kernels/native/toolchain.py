"""Finding a compiler and ninja, and running one build."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from drivetrain.errors import BuildError

_FIRST_ERROR = re.compile(r"\berror\b|undefined reference|cannot find|not found", re.IGNORECASE)
_COMPILE_RULE = """\
rule compile
  command = {compiler} {flags} -c $in -o $out
  description = compile $in
rule link
  command = {compiler} -shared $in -o $out {link_flags}
  description = link $out
"""


@dataclass(frozen=True)
class Toolchain:
    """A compiler by role.

    Args:
        role: for messages, e.g. ``"C++"``.
        variable: environment variable that names the command and wins over the search.
        candidates: commands to look for on ``PATH``, best first.
        environment: variables that it is started with.
    """

    role: str
    variable: str
    candidates: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def found(self) -> bool:
        """Whether there is such a compiler."""
        try:
            return bool(self.command())
        except BuildError:
            return False

    def surroundings(self) -> dict[str, str]:
        """The environment to run it in."""
        # Messages are parsed, so the compiler has to speak English.
        return {**os.environ, "LC_ALL": "C", **dict(self.environment)}

    def command(self) -> tuple[str, ...]:
        """The compiler's command line.

        Raises:
            BuildError: there is none; says what was looked for.
        """
        named = os.environ.get(self.variable, "").strip()
        choices = [shlex.split(named)] if named else [[name] for name in self.candidates]
        for choice in choices:
            found = shutil.which(choice[0])
            if found is not None:
                return (found, *choice[1:])
        looked = f"${self.variable}={named!r}" if named else ", ".join(self.candidates)
        raise BuildError(
            f"no {self.role} compiler found (looked for {looked}); install one or set "
            f"${self.variable}"
        )

    def identity(self) -> str:
        """What distinguishes the compiler from others: real path, version, target.

        Raises:
            BuildError: there is no compiler, or it does not run.
        """
        command = self.command()
        try:
            version = subprocess.run(
                [*command, "--version"],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
                env=self.surroundings(),
            ).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise BuildError(
                f"the {self.role} compiler {command[0]} does not run: {error}"
            ) from error
        return f"{os.path.realpath(command[0])} {' '.join(command[1:])}\n{version}"


CXX = Toolchain("C++", "CXX", ("c++", "g++", "clang++"))
"""The host's C++ compiler."""


@dataclass(frozen=True)
class Recipe:
    """One shared library to compile.

    Args:
        name: for messages.
        toolchain: the compiler to use.
        sources: files to compile, each on its own.
        flags: compiler flags.
        link_flags: flags after the objects when linking.
    """

    name: str
    toolchain: Toolchain
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]

    @cached_property
    def _rules(self) -> str:
        return _COMPILE_RULE.format(
            compiler=_ninja_words(self.toolchain.command()),
            flags=_ninja_words(self.flags),
            link_flags=_ninja_words(self.link_flags),
        )

    def build(self, folder: Path, output: str) -> None:
        """Compile into ``folder / output``, using ``folder`` for everything on the way.

        Raises:
            BuildError: names the library, the command that failed and its first error.
        """
        objects = [f"{index}-{source.stem}.o" for index, source in enumerate(self.sources)]
        lines = [
            f"build {obj}: compile {_ninja_path(source)}"
            for obj, source in zip(objects, self.sources, strict=True)
        ]
        lines += [f"build {output}: link {' '.join(objects)}", f"default {output}", ""]
        (folder / "build.ninja").write_text(self._rules + "\n".join(lines))
        environment = {**self.toolchain.surroundings(), "NINJA_STATUS": ""}
        run = subprocess.run(
            [ninja(), "-C", str(folder)],
            capture_output=True,
            text=True,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        if run.returncode != 0:
            raise BuildError(f"cannot build {self.name}: {explain(run.stdout + run.stderr)}")


def ninja() -> str:
    """Path of ninja: the one installed from PyPI, else one on ``PATH``.

    Raises:
        BuildError: there is none.
    """
    try:
        from ninja import BIN_DIR

        found = shutil.which("ninja", path=BIN_DIR)
    except ImportError:
        found = None
    found = found or shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is not installed; run: pip install ninja")
    return found


def explain(output: str) -> str:
    """The failed command and its first error, out of ninja's output."""
    lines = output.splitlines()
    failed = next((at for at, line in enumerate(lines) if line.startswith("FAILED:")), None)
    if failed is None or failed + 1 >= len(lines):
        return output.strip() or "ninja failed without a message"
    command, rest = lines[failed + 1], lines[failed + 2 :]
    first = next((line for line in rest if _FIRST_ERROR.search(line)), None)
    return f"{first or (rest[0] if rest else 'no message')} (command: {command})"


def _ninja_words(words: tuple[str, ...]) -> str:
    return shlex.join(words).replace("$", "$$")


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
