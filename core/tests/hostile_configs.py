"""Configs made to hurt whoever reads them, and a program that reads them all in one process.

``python hostile_configs.py FOLDER [pure]`` prints one JSON object per config: how long it took, and
what was said. With ``pure``, PyYAML's own parser takes the place of libyaml's.
"""

from __future__ import annotations

import base64
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BIG = 400_000
"""Bytes of a large text, which is below the limit of a config file."""

MEMORY = 200 << 20


def json_texts() -> dict[str, str]:
    """JSON that is deep, long, full of quotes or commas, or says what no number or text is."""
    nine = "9" * 5_000
    return {
        "depth of lists": "[" * 900 + "]" * 900,
        "depth of objects": '{"a":' * 900 + "1" + "}" * 900,
        "depth without end": '{"a":' * (BIG // 5),
        "depth of lists without end": "[" * BIG,
        "depth in a section": '{"optimizer": {"params": ' + "[" * 500 + "]" * 500 + "}}",
        "depth just allowed": '{"a":' * 62 + "1" + "}" * 62,
        "many integer digits": f'{{"train_batch_size": {nine}}}',
        "many negative digits": f'{{"train_batch_size": -{nine}}}',
        "an integer as long as the file": f'{{"train_batch_size": {"7" * BIG}}}',
        "a fraction as long as the file": f'{{"gradient_clipping": 0.{"3" * BIG}}}',
        "an exponent as long as the file": f'{{"gradient_clipping": 1e{"3" * BIG}}}',
        "the exponent 999": '{"gradient_clipping": 1e999}',
        "the exponent -999 of many": '{"train_batch_size": -1e999}',
        "a number as a key": '{"train_batch_size": {1: 2}}',
        "NaN": '{"gradient_clipping": NaN}',
        "Infinity": '{"gradient_clipping": Infinity}',
        "minus Infinity": '{"gradient_clipping": -Infinity}',
        "29 digits": f'{{"train_batch_size": {10**29}}}',
        "1e29": '{"train_batch_size": 1e29}',
        "1e300": '{"train_micro_batch_size_per_gpu": 1e300}',
        "2 to the 63": f'{{"train_batch_size": {2**63}}}',
        "quotes": '"' * BIG,
        "escaped quotes": '"' + '\\"' * (BIG // 2),
        "lines of open quotes": '"\n' * (BIG // 2),
        "backslashes": "\\" * BIG,
        "strings that do not close": '{"a": "' + "x" * BIG,
        "open comments": "/*" * (BIG // 2),
        "half closed comments": "/*" + "*" * BIG,
        "stars and slashes": "/* */" * (BIG // 5),
        "line comments": "#\n" * (BIG // 2),
        "slashes": "/" * BIG,
        "commas": "[" + "," * BIG + "]",
        "commas and blanks": "[" + ",  " * (BIG // 3) + "]",
        "blanks": " " * BIG,
        "newlines": "\n" * BIG,
        "a comma and blanks": '{"a": 1,' + " " * BIG + "x",
        "trailing commas": '{"a": [' + "1,]," * 2 + "}",
        "one key very often": "{" + '"a": 1,' * (BIG // 8) + '"a": 1}',
        "one key very often, on lines": "{" + '"a": 1,\n' * (BIG // 9) + '"a": 1}',
        "two keys twice": '{"a": 1, "b": 1, "b": 2, "a": 2}',
        "a key twice below": '{"fp16": {"enabled": true, "enabled": false}}',
        "a key twice by an escape": '{"fp16": {}, "fp\\u00316": {}}',
        "many unknown keys": json.dumps({f"key{i}": 1 for i in range(9_000)}),
        "many unknown keys in a section": json.dumps({"fp16": {f"k{i}": 1 for i in range(9_000)}}),
        "many unknown params": json.dumps(
            {"optimizer": {"type": "AdamW", "params": {f"lr{i}": 1 for i in range(9_000)}}}
        ),
        "many values": '{"a": [' + "1," * (BIG // 2 - 10) + "1]}",
        "many empty objects": '{"a": [' + "{}," * (BIG // 4) + "{}]}",
        "a very long key": f'{{"{"k" * BIG}": 1}}',
        "a very long value": f'{{"gradient_allreduce_op": "{"v" * BIG}"}}',
        "a very long type": f'{{"optimizer": {{"type": "{"v" * BIG}"}}}}',
        "a very long dtype": f'{{"communication_data_type": "{"b" * BIG}"}}',
        "escape codes in a key": '{"\\u001b[31mred\\u001b[0m": 1}',
        "escape codes in a value": '{"log_level": "\\u001b]0;title\\u0007\\u009b31m"}',
        "escape codes as they are": '{"\x1b[2Jlog_level": 1}',
        "escape codes at a wrong place": '{"a": 1 \x1b[2J\x9b31m 2}',
        "a carriage return in a key": '{"a\\r\\n  - fp16: fine": 1}',
        "a text from right to left": '{"\\u202eelbane": {"\\u2066x": 1}}',
        "half of a pair": '{"log_level": "\\ud800"}',
        "half of a pair as a key": '{"\\udfff": 1}',
        "NUL in a text": '{"optimizer": {"type": "Adam\\u0000W"}}',
        "NUL in a key": '{"fp16\\u0000": {}}',
        "a list": "[1, 2]",
        "a text": '"fp16"',
        "a number": "12",
        "nothing": "",
        "null": "null",
        "two objects": "{}{}",
        "words": "true false null " * 1_000,
        "Python": "{'train_batch_size': 8}",
        "a class": '{"__class__": "os.system", "__reduce__": ["rm", "-rf"]}',
        "wrong types everywhere": json.dumps(
            {key: [[[]]] for key in ("fp16", "bf16", "optimizer", "seed", "plugins", "checkpoint")}
        ),
        "plugins of no name": json.dumps({"plugins": {f"p{i}": True for i in range(300)}}),
        "every key is auto": json.dumps({f"key{i}": "auto" for i in range(2_000)}),
        "dots": '{"..": 1, "zero_optimization.": {"": {"": 1}}}',
    }


def yaml_texts() -> dict[str, str]:
    """YAML that multiplies, contains itself, or asks for objects of Python."""
    doubled = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)
    )
    objects = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{l: *a{i - 1}, r: *a{i - 1}}}\n" for i in range(1, 60)
    )
    merges = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], k{i}: 1}}\n" for i in range(1, 60)
    )
    wide = "a: &a {" + ", ".join(f"k{i}: 1" for i in range(5_000)) + "}\n"
    tags = (
        *("!!int abc", "!!float abc", "!!bool abc", "!!null abc", "!!timestamp abc"),
        *("!!binary '***'", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!seq {a: 1}"),
        *("!!map [1]", "!!int [1]", "!!str {a: 1}", "!!python/object/apply:os.system [ls]"),
        *("!!python/name:os.system ''", "!!python/tuple [1]", "!own {a: 1}", "!<!x> y"),
        *("!!merge x", "!!value =", "!!int 1_000", "!!int 0x10", "!!float .inf", "!!bool 1"),
    )
    return {
        "aliases of lists that double": doubled,
        "aliases of objects that double": objects,
        "merges that double": merges,
        "a wide merge very often": wide + "".join(f"b{i}: {{<<: *a}}\n" for i in range(3_000)),
        "a wide alias very often": wide + "".join(f"b{i}: *a\n" for i in range(3_000)),
        "a top-level list that doubles": "- &a [x, x]\n"
        + "".join(f"- &{chr(97 + i)} [*{chr(96 + i)}, *{chr(96 + i)}]\n" for i in range(1, 26)),
        "a list in itself": "a: &a [*a]",
        "an object in itself": "&a {b: *a}",
        "an object in a merge of itself": "a: &a {<<: *a}",
        "an alias of nothing": "a: *b",
        "an alias as a key": "a: &a {b: 1}\n*a : 2",
        "a merge with a number": "a: {<<: 1}",
        "a merge with a list of numbers": "a: {<<: [1, 2]}",
        "depth of flow lists": "a: " + "[" * 3_000 + "]" * 3_000,
        "depth of flow objects": "a: " + "{b: " * 3_000 + "}" * 3_000,
        "depth of flow lists without end": "[" * BIG,
        "depth of block lists": "- " * 3_000 + "x",
        "depth of block objects": "".join(f"{' ' * i}a:\n" for i in range(600)),
        "depth of keys": "? " * 3_000 + "x",
        "many integer digits": f"train_batch_size: {'9' * 5_000}",
        "an integer as long as the file": f"train_batch_size: {'9' * BIG}",
        "the exponent 999": "gradient_clipping: 1e999",
        "an infinity": "gradient_clipping: .inf",
        "no number": "gradient_clipping: .nan",
        "binary": "train_batch_size: 0b1111",
        "base sixty": "train_batch_size: 190:20:30",
        "a key twice": "fp16: {enabled: true}\nfp16: {enabled: false}",
        "a merge key twice": "a: &a {b: 1}\nc: {<<: *a, <<: *a}",
        "one key very often": "a: 1\n" * (BIG // 5),
        "a list as a key": "? [a, b]\n: 1",
        "a number as a key": "1: 2",
        "null as a key": "~: 2",
        "an empty key": ": 2",
        "two documents": "a: 1\n---\nb: 2",
        "no document": "...\n...\n",
        "a foreign version": "%YAML 9.9\n---\na: 1",
        "tabs": "a:\n\t- b",
        "quotes": '"' * BIG,
        "single quotes": "'" * BIG,
        "an open quote": 'a: "' + "x" * BIG,
        "colons": ": " * (BIG // 2),
        "dashes": "- " * (BIG // 2),
        "question marks": "? \n" * (BIG // 3),
        "anchors": "".join(f"- &a{i} x\n" for i in range(BIG // 12)),
        "percents": "%" * BIG,
        "a long plain text": "a: " + "word " * (BIG // 5),
        "a folded text": "a: >\n" + "  word\n" * (BIG // 7),
        "escape codes in a key": '"\\e[31mred": 1',
        "escape codes in a value": 'log_level: "\\e]0;title\\a"',
        "a line separator in a key": '"a\\Lb": 1',
        "an anchor with escape codes": "a: *\u202ebc",
        "a text": "fp16",
        "nothing": "# nothing",
        **{f"the tag {tag}": f"log_level: {tag}" for tag in tags},
    }


def byte_texts() -> dict[str, bytes]:
    """Files in other encodings, or of no encoding; the end of the name says how they are read."""
    good = '{"train_batch_size": 8}'
    noise = random.Random(5).randbytes(100_000)
    return {
        "utf-16.json": good.encode("utf-16"),
        "utf-16 without mark.json": good.encode("utf-16-le"),
        "utf-32.json": good.encode("utf-32"),
        "utf-16.yaml": good.encode("utf-16"),
        "utf-16 without mark.yaml": good.encode("utf-16-be"),
        "latin-1.json": '{"größe": 1}'.encode("latin-1"),
        "noise.json": noise,
        "noise.yaml": noise,
        "NUL.json": b"{}" + b"\0" * 1_000,
        "NUL.yaml": b"a: \0",
        "two marks.json": b"\xef\xbb\xbf\xef\xbb\xbf{}",
        "control characters.yaml": b"a: \x01\x02\x1b[31m",
        "too large.json": b'{"a": 1}' + b" " * (2 << 20),
        "too large.yaml": b"#" * (2 << 20),
        "an overlong form.json": b'{"a": "\xc0\xaf"}',
        "half of a character.json": b'{"a": "\xe2\x82',
    }


def dicts() -> dict[str, Any]:
    """Configs that are no text."""
    endless: dict[str, Any] = {}
    endless["a"] = endless
    deep: Any = 1
    for _ in range(5_000):
        deep = {"a": deep}
    doubled: Any = 1
    for _ in range(60):
        doubled = [doubled, doubled]
    long = base64.urlsafe_b64encode(b'{"a":' * 10_000).decode()
    return {
        "a dict in itself": endless,
        "a deep dict": deep,
        "a list that doubles": {"a": doubled},
        "a huge integer": {"train_batch_size": 10**6_000},
        "no number": {"gradient_clipping": float("nan")},
        "keys that are no text": {("a", 1): 2},
        "base64 that is deep": long,
        "base64 without end": "A" * 5_000_000,
        "a NUL in a path": "a\0b.json",
        "escape codes in a path": "\x1b[31mno\nfile.json",
        "JSON in place of a path": json.dumps({"a": "b" * 10_000}),
        "a user that is none": "~no-such-user-here/c.json",
        "a device": "/dev/zero",
        "a file of the system": "/proc/self/mem",
    }


def write(folder: Path) -> dict[str, Any]:
    """Name -> config, as a path where it is a file."""
    found: dict[str, Any] = {}
    contents = {f"{name}.json": text.encode() for name, text in json_texts().items()}
    contents |= {f"{name}.yaml": text.encode() for name, text in yaml_texts().items()}
    contents |= byte_texts()
    for at, (name, content) in enumerate(contents.items()):
        path = folder / f"{at}{Path(name).suffix}"
        path.write_bytes(content)
        found[name] = str(path)
    pipe = folder / "pipe.json"
    os.mkfifo(pipe)
    overlays = {
        "a deep overlay": ".".join("a" * 5_000) + "=1",
        "a long overlay": "a=" + "[" * 9_999,
    }
    return {**found, **dicts(), "a pipe": str(pipe), "a folder": str(folder), **overlays}


def read_all(folder: Path) -> None:
    """Read each, with so much memory as all of them may have."""
    from drivetrain.errors import DrivetrainError
    from drivetrain.plan.plan import Plan

    build: Callable[..., Any] = Plan.build
    build(
        {"train_batch_size": 1, "optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    )
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    configs = write(folder)
    for name, config in configs.items():
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        start, begun = time.process_time(), time.perf_counter()
        try:
            if "overlay" in name:
                build({"train_batch_size": 1}, overlays=[config])
            else:
                build(config)
        except DrivetrainError as error:
            said = str(error)
        except BaseException as error:  # noqa: BLE001 - what the test looks for
            said = f"NOT OURS: {type(error).__name__}: {str(error)[:200]}"
        else:
            said = "NOT REFUSED"
        took = {"cpu": time.process_time() - start, "wall": time.perf_counter() - begun}
        print(json.dumps({"name": name, "seconds": took, "said": said}), flush=True)  # noqa: T201 - to the test


if __name__ == "__main__":
    if sys.argv[2:] == ["pure"]:
        import yaml

        vars(yaml).pop("CSafeLoader", None)
    read_all(Path(sys.argv[1]))
