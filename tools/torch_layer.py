"""One installed torch, shared by many virtual environments without sharing anything else.

Torch takes hundreds of megabytes, so test environments do not install it again. A layer is a folder
of links to exactly torch and the distributions that torch declares, as installed next to this
interpreter. A ``.pth`` file puts it on another environment's path: pip then finds torch installed
there, and nothing that torch does not declare leaks in with it.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PTH_NAME = "_shared_torch.pth"


def build(parent: Path) -> Path:
    """Make the layer of this interpreter's torch below ``parent``, once, and return its folder.

    Raises:
        RuntimeError: torch, or something that it declares, is not installed here.
    """
    members = torch_closure()
    links = {top: target for member in members for top, target in _top_level(member).items()}
    content = "\n".join(f"{name}\t{target}" for name, target in sorted(links.items()))
    layer = parent / f"torch-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if layer.is_dir():
        return layer
    parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=parent, prefix=".layer-"))
    aside.chmod(0o755)
    for name, target in links.items():
        (aside / name).symlink_to(target)
    try:
        aside.rename(layer)
    except OSError:  # another process was faster: its layer has the same content
        shutil.rmtree(aside)
    return layer


def attach(layer: Path, site_packages: Path) -> None:
    """Put ``layer`` on the path of the environment that owns ``site_packages``."""
    pth = site_packages / PTH_NAME
    line = f"{layer}\n"
    if not pth.is_file() or pth.read_text("utf-8") != line:
        site_packages.mkdir(parents=True, exist_ok=True)
        pth.write_text(line, "utf-8")


def torch_closure() -> list[Distribution]:
    """The installed torch and everything that it declares, directly or not."""
    queue, found = ["torch"], dict[str, Distribution]()
    while queue:
        name = canonicalize_name(queue.pop())
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError as error:
            raise RuntimeError(
                f"{name} is not installed next to the interpreter that runs tox; run: make setup"
            ) from error
        for text in found[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return list(found.values())


def _top_level(member: Distribution) -> dict[str, Path]:
    """Name in site-packages -> its path, for what ``member`` put there; scripts are left out."""
    base = Path(str(member.locate_file(""))).absolute()
    names = {file.parts[0] for file in member.files or ()}
    skipped = {"..", "__pycache__"}
    return {n: base / n for n in names if n not in skipped and not n.endswith(".pth")}
