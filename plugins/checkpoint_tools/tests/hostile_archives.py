"""Hostile files of ``torch.save``, laid out as DeepSpeed does."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from drivetrain_checkpoint_tools import import_deepspeed
from hostile_cases import Case, doubled, mutants

FILES = Path(__file__).parent / "deepspeed_files"
TAG = "global_step3"
MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
STEP = "zero/back.weight/exp_avg.pt"


def stand_in(module: str, name: str) -> None:
    """A class for pickles to name where the real one would be."""
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        path = ".".join(parts[:number])
        sys.modules.setdefault(path, types.ModuleType(path))
    made = type(name, (int,) if name.endswith("Enum") else (), {"__module__": module})
    setattr(sys.modules[module], name, made)


def read(folder: Path, out: Path) -> None:
    import_deepspeed(str(folder), str(out))


def cases(base: Path, outside: Path) -> Iterator[Case]:
    for module, name in (
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ):
        stand_in(module, name)
    for name in ("z1", "z3", "u1"):
        shutil.copytree(FILES / name, base / name)
        read(base / name, base / f"out-{name}")
    draw = random.Random(13)
    for stage in ("z1", "z3"):
        for pattern in ("*model_states.pt", "*_pp_rank_1*optim_states.pt"):
            path = next((base / stage / TAG).glob(pattern)).relative_to(base / stage)
            content = torch.load(base / stage / path, weights_only=False)
            for name, changed in draw.sample(list(mutants(content)), 25):
                yield Case(
                    f"import: {stage} {pattern} {name}",
                    base / stage,
                    lambda f, p=path, c=changed: torch.save(c, f / p),
                    read,
                )
    for number in range(25):
        yield Case(f"import: flipped bit {number}", base / "z1", flip(draw.random()), read)
    for name, change in {**_pickles(), **_tensors(), **_archives(), **_folders(outside)}.items():
        yield Case(f"import: {name}", base / "z1", change, read, must_fail=True)
    for name, change in _universal(outside).items():
        yield Case(f"import: universal: {name}", base / "u1", change, read, must_fail=True)
    for name, value in {
        "doubled lists": doubled(),
        "a long text many times": ["x" * 9999] * 9999,
    }.items():
        # What is not the run's own is left out, with a reason.
        yield Case(f"import: {name}", base / "z1", with_client_state(value), read)


def flip(at: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / TAG / MODEL
        data = bytearray(path.read_bytes())
        data[int(at * len(data))] ^= 1
        path.write_bytes(data)

    return change


def with_client_state(value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = torch.load(folder / TAG / MODEL, weights_only=False)
        # Pickled by hand: torch.save would take as long as what is tested.
        torch.save({**content, "client": value}, folder / TAG / MODEL)

    return change


# -- pickles ---------------------------------------------------------------------------------------


def archive(data: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A sound archive around a pickle."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("a/data.pkl", data)
        file.writestr("a/byteorder", b"little")
        for key, content in (storages or {}).items():
            file.writestr(f"a/data/{key}", content)
    return made.getvalue()


def placed(data: bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / TAG / MODEL).write_bytes(data))


def void(_: object) -> None:
    return None


def _pickles() -> dict[str, Callable[[Path], None]]:
    twice = b"".join(
        b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60)
    )
    tuples = b"\x80\x02K\x01\x85q\x00" + twice
    programs = {
        "a command": b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
        "a command by instance": b"(X\x04\x00\x00\x00trueios\nsystem\n.",
        "a command by extension": b"\x80\x02\x82\x01.",
        "a command in torch": b"ctorch\nload\n(X\x01\x00\x00\x00xtR.",
        "an attribute of a class": b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.",
        "great memory asked for": b"\x80\x02cbuiltins\nbytearray\n(\x8a\x05\x00\x00\x00\x00\x10tR.",
        "a memo of 2 billion": b"\x80\x02}r\xff\xff\xff\x7f.",
        "tuples in tuples as a key": b"\x80\x02}" + tuples + b"K\x01s.",
        "tuples in tuples in a set": b"\x80\x04\x8f(" + tuples[2:] + b"\x90.",
        "a text of 2^63": b"\x80\x04\x8d" + struct.pack("<Q", (1 << 63) - 1) + b"x.",
        "a frame of 2^63": b"\x80\x04\x95" + struct.pack("<Q", (1 << 63) - 1) + b"N.",
        "a number of 5,000 digits": b"I" + b"9" * 5000 + b"\n.",
        "an empty stack": b"\x80\x02R.",
        "a stack of marks": b"((((((((u.",
        "no end": b"\x80\x02}",
        "an instruction that is none": b"\x80\x02\xff.",
        "state of a dict that is none": b"\x80\x02}K\x01b.",
        "nothing": b"",
        "a list": pickle.dumps([1], protocol=2),
        "a storage that is not there": _storage("9", 4) + b".",
        "a storage that is larger than it is": _storage("0", 1 << 40) + b".",
        "a storage of negative size": _storage("0", -4) + b".",
        "a tensor of another storage": b"\x80\x02ctorch._utils\n_rebuild_tensor\n(K\x01K\x00))tR.",
        "a tensor on no device": b"\x80\x02ctorch._utils\n_rebuild_meta_tensor_no_storage\n).",
    }
    return {f"pickle: {name}": placed(archive(p, {"0": bytes(64)})) for name, p in programs.items()}


def _storage(key: str, count: int) -> bytes:
    """The instructions that put a storage of floats on the stack."""
    number = pickle.dumps(count, protocol=2)[2:-1]
    name = f"X{chr(len(key))}\0\0\0{key}".encode()
    return (
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + name
        + b"X\x03\x00\x00\x00cpu" + number + b"tQ"
    )  # fmt: skip


# -- tensors that claim more than there is ---------------------------------------------------------


def _tensors() -> dict[str, Callable[[Path], None]]:
    large = torch.zeros(1).expand(1 << 15, 1 << 15)
    mib = torch.arange(1 << 18, dtype=torch.float32)
    views = {f"v{n}": mib[n:].view(-1) for n in range(500)}
    same = {f"v{n}.weight": mib.t() for n in range(3000)}
    return {
        "an expanded parameter": edited(MODEL, lambda c: c["module"].update(x=large)),
        "many expanded parameters": edited(
            MODEL,
            lambda c: c["module"].update(
                {f"x{n}": torch.ones(1).expand(3 << 20) for n in range(500)}
            ),
        ),
        "many views of one storage": edited(MODEL, lambda c: c["module"].update(views)),
        "one tensor as many states": edited(
            OPTIMIZER,
            lambda c: states(c)["state"].update({0: {**states(c)["state"][0], **same}}),
        ),
        "expanded states": edited(OPTIMIZER, lambda c: states(c)["state"][0].update(exp_avg=large)),
        "expanded masters": edited(
            OPTIMIZER,
            lambda c: c["optimizer_state_dict"].update(single_partition_of_fp32_groups=[large] * 2),
        ),
        "a parameter of no kind": edited(MODEL, lambda c: c["module"].update(x="text")),
        "a name with commands for a terminal": edited(
            MODEL,
            lambda c: c["module"].update({"\x1b[31m\nx": torch.zeros(9, dtype=torch.complex128)}),
        ),
        "steps of 400 digits": edited(MODEL, lambda c: c.update(global_steps=10**400)),
        "steps below nothing": edited(MODEL, lambda c: c.update(global_steps=-1)),
        "ranks without end": edited(MODEL, lambda c: c.update(dp_world_size=1 << 40)),
        "shapes of great numbers": edited(
            MODEL, lambda c: c["param_shapes"][0].update({"back.weight": [1 << 60] * 3000})
        ),
    }


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = torch.load(folder / TAG / name, weights_only=False)
        change(content)
        torch.save(content, folder / TAG / name)

    return edit


def states(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["optimizer_state_dict"]["base_optimizer_state"]
    return found


# -- archives --------------------------------------------------------------------------------------


def rezipped(
    change: Callable[[dict[str, bytes]], object], **options: Any
) -> Callable[[Path], None]:
    """Packed again after a change of its records."""

    def edit(folder: Path) -> None:
        path = folder / TAG / MODEL
        with zipfile.ZipFile(path) as file:
            records = {entry.filename: file.read(entry) for entry in file.infolist()}
        change(records)
        with zipfile.ZipFile(path, "w", **options) as file:
            for name, data in records.items():
                file.writestr(name, data)

    return edit


def directory(change: Callable[[bytearray, int], object]) -> Callable[[Path], None]:
    """A change of the first record in the archive's directory; called with its offset."""

    def edit(folder: Path) -> None:
        data = bytearray((folder / TAG / MODEL).read_bytes())
        change(data, data.index(b"PK\x01\x02"))
        (folder / TAG / MODEL).write_bytes(data)

    return edit


def field(at: int, code: str, value: int) -> Callable[[Path], None]:
    return directory(lambda data, start: struct.pack_into(code, data, start + at, value))


def content_changed(folder: Path) -> None:
    """A number of a tensor is another; all is as it was but for that."""
    path = folder / TAG / MODEL
    with zipfile.ZipFile(path) as file:
        entry = next(e for e in file.infolist() if "/data/" in e.filename and e.file_size > 8)
    data = bytearray(path.read_bytes())
    start = (
        entry.header_offset + 30 + sum(struct.unpack_from("<HH", data, entry.header_offset + 26))
    )
    data[start + 3] ^= 0x40
    path.write_bytes(data)


def doubled_records(folder: Path) -> None:
    path = folder / TAG / MODEL
    with zipfile.ZipFile(path) as file:
        records = {entry.filename: file.read(entry) for entry in file.infolist()}
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
        warnings.simplefilter("ignore")
        for name, data in [*records.items(), *records.items()]:
            file.writestr(name, data)


def _archives() -> dict[str, Callable[[Path], None]]:
    def first(records: dict[str, bytes], end: str) -> str:
        return next(name for name in records if name.endswith(end))

    return {
        "archive: compressed": rezipped(lambda _: None, compression=zipfile.ZIP_DEFLATED),
        "archive: a bomb": rezipped(
            lambda records: records.update({"x/data/99": bytes(64 << 20)}),
            compression=zipfile.ZIP_DEFLATED,
        ),
        "archive: another number in a tensor": content_changed,
        "archive: doubled records": doubled_records,
        "archive: no pickle": rezipped(lambda r: r.pop(first(r, "data.pkl"))),
        "archive: two pickles": rezipped(lambda r: r.update({"other/data.pkl": b"."})),
        "archive: another byte order": rezipped(
            lambda r: r.update({first(r, "byteorder"): b"big"})
        ),
        "archive: a storage is missing": rezipped(lambda r: r.pop(first(r, "data/0"))),
        "archive: encrypted": field(8, "<H", 1),
        "archive: another method": field(10, "<H", 99),
        "archive: another checksum": field(16, "<I", 1),
        "archive: a size of 4 GiB": field(24, "<I", 0xFFFFFFF0),
        "archive: sizes of 4 GiB": directory(
            lambda data, at: struct.pack_into("<II", data, at + 20, 0xFFFFFFF0, 0xFFFFFFF0)
        ),
        "archive: an offset elsewhere": field(42, "<I", 0xFFFFFF00),
        "archive: an offset in the middle": field(42, "<I", 7),
        "archive: a long name": field(28, "<H", 0xFFFF),
        "archive: a version to come": field(6, "<H", 200),
        "archive: cut off": lambda f: os.truncate(f / TAG / MODEL, 900),
        "archive: an old pickle": placed(pickle.dumps({"module": {}})),
        "archive: nothing": placed(b""),
    }


def _folders(outside: Path) -> dict[str, Callable[[Path], None]]:
    def pointer(content: str) -> Callable[[Path], None]:
        return lambda folder: void((folder / "latest").write_text(content))

    def link(name: str, target: Path) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / name).unlink()
            (folder / name).symlink_to(target)

        return change

    def pipe(name: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / name).unlink()
            os.mkfifo(folder / name)

        return change

    def elsewhere(name: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            number = len(list(outside.iterdir()))
            (folder / name).rename(outside / f"moved{number}")
            (folder / name).symlink_to(outside / f"moved{number}")

        return change

    def sparse(folder: Path) -> None:
        os.truncate(folder / TAG / MODEL, 8 << 30)

    def folder_instead(folder: Path) -> None:
        (folder / TAG / MODEL).unlink()
        (folder / TAG / MODEL).mkdir()

    return {
        "latest leads up": pointer("../outside"),
        "latest is a path": pointer("/etc"),
        "latest commands a terminal": pointer("\x1b[31m\n"),
        "latest is long": pointer("x" * 100_000),
        "latest is a pipe": pipe("latest"),
        "latest is /dev/zero": link("latest", Path("/dev/zero")),
        "latest is a secret": link("latest", outside / "secret"),
        "the checkpoint is elsewhere": elsewhere(TAG),
        "a file is elsewhere": elsewhere(f"{TAG}/{MODEL}"),
        "a file is a pipe": pipe(f"{TAG}/{MODEL}"),
        "a file is a folder": folder_instead,
        "a file is /dev/zero": link(f"{TAG}/{MODEL}", Path("/dev/zero")),
        "a file is a secret": link(f"{TAG}/{OPTIMIZER}", outside / "secret"),
        "a file of 8 GiB of holes": sparse,
    }


def _universal(outside: Path) -> dict[str, Callable[[Path], None]]:
    def saved(value: Any) -> Callable[[Path], None]:
        return lambda folder: torch.save(value, folder / TAG / STEP)

    def elsewhere(folder: Path) -> None:
        number = len(list(outside.iterdir()))
        (folder / TAG / "zero").rename(outside / f"moved{number}")
        (folder / TAG / "zero").symlink_to(outside / f"moved{number}")

    def pipe(folder: Path) -> None:
        (folder / TAG / STEP).unlink()
        os.mkfifo(folder / TAG / STEP)

    return {
        "an expanded state": saved(torch.zeros(1).expand(1 << 32)),
        "states of an expanded tensor": saved({"param": torch.zeros(1).expand(1 << 14, 1 << 14)}),
        "no tensor": saved({"param": "text"}),
        "a list": saved([1, 2]),
        "its states are elsewhere": elsewhere,
        "a state is a pipe": pipe,
    }
