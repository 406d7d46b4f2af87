"""The page ``docs/moving-from-deepspeed.md``: how to move; what becomes of every key and name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from deepspeed._config.keys import DEFAULTS, paths
from deepspeed._config.status import key_status
from deepspeed._surface import lookup
from deepspeed._training.engine import DeepSpeedEngine
from deepspeed._training.settings import SHARED
from torch import nn

from drivetrain.plan import known
from drivetrain.plan.registry import Registry
from tools import workspace

INTRODUCTION = """\
# Moving from DeepSpeed

There are two ways, and a job may change from the first to the second at any time, since
checkpoints and configs are the same.

1. **Leave the script as it is.** The package `deepspeed` of this repository, in `plugins/compat`,
   makes `import deepspeed` work on top of Drivetrain: it is told from DeepSpeed by its version,
   `0.19.8+drivetrain.0.1.0`. This page says what of DeepSpeed it serves.
2. **Import `drivetrain`.** [Changing the imports](howto/deepspeed.md) says which lines change.

## What to install

Public indexes take no local versions, so `pip install deepspeed` means DeepSpeed itself. Build
the wheels of this repository, or take those of a release, and name the whole version:

```text
pip uninstall deepspeed
pip install --find-links WHEELS "deepspeed==0.19.8+drivetrain.0.1.0"
```

ZeRO, offloading, optimizers, checkpoint tools and commands come with it. Where files of both lie
in one folder, `import deepspeed` is refused; where this package hides another installation, it
warns and names it.

## Differences that matter

- **Config keys that DeepSpeed never looks at** are named in the log, with a guess what was meant.
  In sections in which DeepSpeed refuses unknown keys they are errors here, too.
- **Sections of packages that do not exist yet** are refused by name, unless they are off. So are
  names that need such a package, when they are used: an `AttributeError`, or an `ImportError` in
  `from deepspeed.pipe import PipelineModule`.
- **Optimizers of `deepspeed.ops`** describe an update that the engine carries out. Without an
  engine they step by the same rule, except `OnebitAdam`, `OnebitLamb` and `ZeroOneAdam`, which
  send gradients themselves.
- **Gradients are not in `parameter.grad`** between backward and step;
  `deepspeed.utils.safe_get_full_grad` reads them.
- **Checkpoints** of DeepSpeed load through `engine.load_checkpoint`; at stage 0 with several
  parameter groups only without optimizer states. New ones are Drivetrain's, so `client_state` is
  what `torch.load` reads with `weights_only=True`. They load on any number of ranks, and
  `ds_to_universal` has nothing to do for them.
- **`save_16bit_model`** writes what `torch.save` writes, or safetensors if the file's name ends
  so.
- **Parameters of stage 3** have `ds_id`, `ds_status`, `ds_shape`, `ds_numel`, `ds_persist` and
  `ds_tensor` (this rank's part, for reading), and nothing else of the kind. They show their whole
  shape at all times; `deepspeed.zero.GatheredParameters` makes them whole. In
  `module.state_dict()` they have shapes, but values are refused.
- **`stage3_param_persistence_threshold`** is compared with the size of a unit, which is gathered
  as one, where DeepSpeed compares it with each parameter: a bias beside a large weight does not
  stay whole, and its `ds_persist` is false.
- **`DeepSpeedTransformerLayer`** computes GELU by the error function, as BERT does. What makes its
  sums faster or its seed and batch size fixed in DeepSpeed is accepted without effect.
- **A Trainer of Transformers trains once**, with DeepSpeed and here: its second `train()` uses an
  engine that Accelerate has destroyed. Another Trainer in the same process trains as well.
- **Errors** are `ConfigError`, `TrainingError` and `CheckpointError`, and at the same time of the
  classes by which scripts catch DeepSpeed's: `AssertionError`, `ValueError`, `RuntimeError`;
  sections such as `DeepSpeedFP16Config` raise pydantic's `ValidationError`. Their texts are others.
  With `ignore_unused_parameters: false` the error comes in `step`.
- **On one rank nothing is sharded**: parameters made under `zero.Init` are whole at all times;
  their `ds_status` is `AVAILABLE` inside `GatheredParameters`, so that scripts ask as on many.
- **`GatheredParameters` without `modifier_rank`** is for reading; a change inside it is refused.
- **Schedules**: before the first update `OneCycle` sets the momentum of that update,
  `cycle_max_mom`; DeepSpeed sets `cycle_min_mom` there.
- **`DeepSpeedConfig`** may be changed and completed again by a script; an engine that is built
  follows no change of it. `engine.tput_timer` measures from its first use on.
- **Configs in Hjson** are read where the package `hjson` is installed; comments and trailing commas
  need none.
- **Flat partitions** of DeepSpeed's optimizers (`fp32_partitioned_groups_flat`,
  `single_partition_of_fp32_groups`, `fp32_groups_flat`) are copies, one tensor for each group.
- **Not there**: `deepspeed.launcher.multinode_runner`, `SparseTensor`, hooks of DeepSpeed's
  optimizers, and default leaf modules, since units are whole.
- **`deepspeed SCRIPT`** starts the ranks of this host, or of the hosts in `--hostfile` through
  `drivetrain launch`. Without `--launcher` it uses ssh, not pdsh. `ds_report`, `ds_elastic`,
  `ds_ssh`, `ds_io`, `ds_nvme_tune` and `ds_bench` show what Drivetrain's commands show.
- **`aio_handle`** raises an error where a transfer fails, and copies what is on a device through
  host memory.

"""

UNLIKE_INTRODUCTION = """\
## Tests of DeepSpeed that do not pass

Of DeepSpeed's own unit tests (`plugins/compat/BENCHMARKS.md` counts them), these ask for what is
different here on purpose, or for insides of DeepSpeed that have no counterpart here.

| test | what it asks for |
|---|---|"""

UNLIKE: tuple[tuple[str, str], ...] = (
    (
        "`runtime/test_ds_config_dict`, `test_precision_config_loss_scale`",
        (
            "that summed gradients are refused at stage 3 and with ZenFlow; here they work at "
            "every stage. Texts of errors, such as that of an unknown `gradient_allreduce_op`"
        ),
    ),
    (
        "`runtime/zero/test_zero_context`, `test_zero_context_ancestry`",
        (
            "that parameters have no elements outside of `GatheredParameters`, and half "
            "precision under `zero.Init` without asking; here they show their shape, and keep "
            "their dtype. `MultipleAllGatherHandles`"
        ),
    ),
    (
        "`runtime/zero/test_unwrap_model`",
        "hooks of the optimizer, of which there are none to take away",
    ),
    (
        "`runtime/zero/test_zero_context_return`",
        "`_external_params` of modules; parameters that a forward returns need no list",
    ),
    (
        "`runtime/zero/test_zero_leaf_module`",
        "an error for inputs of leaf modules without gradients; no unit needs them",
    ),
    (
        (
            "`runtime/zero/test_zero_hook_attribute_delegation`, "
            "`test_zero_late_module_attach`, `test_zero_linear_direct_init`"
        ),
        (
            "hooks and dicts that stage 3 puts into modules, and how it replaces torch's linear"
            " function; nothing is put there, and nothing is replaced"
        ),
    ),
    (
        "`v1/zero/test_zero`",
        (
            "`fp32_groups_gradients_flat`, `averaged_gradients` and "
            "`nccl_start_alignment_factor` of DeepSpeed's optimizer; that `ds_status` changes "
            "with every layer, while small layers are gathered together here; parameters that are "
            "frozen for single steps, which needs `engine.rebuild()` here"
        ),
    ),
    (
        "`runtime/test_no_sync_ctxt`",
        "that `no_sync` is refused from stage 2 on; here it works at every stage",
    ),
    (
        "`runtime/half_precision/test_fp16`, `v1/half_precision/test_bf16`",
        "that optimizers which DeepSpeed has not tested are refused; here all are accepted",
    ),
    (
        "`runtime/test_ds_initialize`",
        (
            "that the optimizer which the script passes is returned itself; here it is the "
            "engine's, over the same groups"
        ),
    ),
    (
        "`runtime/test_lr_schedulers`",
        ("the momentum that `OneCycle` has before the first update"),
    ),
    (
        "`runtime/test_runtime_utils`",
        (
            "`CheckOverflow`, `count_used_parameters_in_backward`: insides of the engine, which "
            "has others here"
        ),
    ),
    (
        "`utils/test_groups`, `test_get_optim_files`, `test_byte_cast`",
        (
            "`_get_expert_parallel_ranks`, `get_optim_files`, `cast_to_byte_tensor`: ranks, "
            "files and bytes of DeepSpeed's own layouts"
        ),
    ),
    (
        "`checkpoint/test_zero_optimizer`",
        (
            "`get_model_ckpt_name_for_rank`, `_change_recovery_script_permissions`: names and "
            "rights of files that are not written here"
        ),
    ),
    (
        "`ops/adam/test_cpu_adam`",
        "the kernel's own functions from `CPUAdamBuilder().load()`",
    ),
    (
        "`launcher/test_user_args`",
        "`MultiNodeRunner`; hosts are started by `drivetrain launch`",
    ),
    (
        (
            "`v1/zero/test_overlap_comm_record_stream`, `test_stage2_flatten_on_gpu`, "
            "`test_offload_states`"
        ),
        (
            "buffers and streams inside of DeepSpeed's optimizers: `IPGBucket`, "
            "`grad_partitions_flat_buffer`; the last measures memory of an accelerator"
        ),
    ),
    (
        "`v1/half_precision/test_gradient_clipping_default`, `v1/test_engine_log_level`",
        "methods of the engine called with other objects",
    ),
)
"""Tests of DeepSpeed -> what they ask for that is different here, or not there."""

FRAMEWORKS = """\
## Frameworks

What `tests/frameworks/` trains on two ranks, and compares with the same run on torch's
DistributedDataParallel: losses, gradient norms, weights.

| framework | version | what is tried |
|---|---|---|"""

TRIED: Mapping[str, tuple[str, ...]] = {
    "transformers": (
        "Transformers' Trainer",
        "stages 0 to 3",
        "states and parameters on the host or in files",
        "bf16, fp16",
        "accumulation, clipping, `auto` values",
        "optimizers and schedules of the config and of the Trainer",
        "evaluation, `generate`, `from_pretrained` into shards",
        "`run_clm.py` of its examples, unmodified",
        "gradient checkpointing, `torch_compile`",
        "resuming on another number of ranks, `save_model`",
    ),
    "accelerate": (
        "Accelerate",
        "`prepare`, `accumulate`, `backward`, `clip_grad_norm_` at stages 1 and 3",
        "`save_state`, `load_state`, `save_model`",
        "several models in one script, `accelerate launch` at stages 2 and 3",
    ),
    "peft": (
        "PEFT",
        "LoRA at stage 3, adapters saved whole",
        "LoRA over 4-bit weights of bitsandbytes at stages 2 and 3",
    ),
    "pytorch-lightning": (
        "Lightning's `DeepSpeedStrategy`",
        "stages 1 to 3, offloading to the host, resuming",
        "it insists on CUDA, so the tests leave out that one check",
    ),
    "trl": ("TRL", "`SFTTrainer`, `DPOTrainer` and `GRPOTrainer` at stages 2 and 3"),
}
"""Distribution -> its name, and what of it is tried."""

OTHERS = """

MMEngine, Determined and Composer are not installed with the tests: `plugins/compat/tests` makes the
calls that their sources make. Determined asks whether an engine is a `PipelineEngine`, so it needs
drivetrain-pipeline."""

KEYS = """\
## Config keys

Each key with its default in DeepSpeed; defaults of this package's own are in
[Config keys](reference/config.md).

| key | default | here |
|---|---|---|"""

NAMES = """\
## Public names

Other modules show the same objects, e.g. `deepspeed.runtime.zero.partition_parameters` those of
`deepspeed.zero`.

| module | names | here |
|---|---|---|"""

UNREAD: Mapping[str, str] = {
    "runtime.swap_tensor.MIN_SWAPPABLE_BYTES": "states of every size go to files",
}
"""Names that lead to a value which nothing here reads -> why not."""

ENGINE = """\
## The engine

Methods and attributes beside those of `torch.nn.Module`, and those of DeepSpeed's engine that it
lacks.

| names | here |
|---|---|"""


def moving_page() -> str:
    """The whole page."""
    parts = [
        INTRODUCTION + UNLIKE_INTRODUCTION,
        *(f"| {test} | {text} |" for test, text in UNLIKE),
        "",
        FRAMEWORKS,
        *_frameworks(),
        OTHERS.strip("\n").join(("\n", "")),
        "",
        KEYS,
        *_keys(),
        "",
        NAMES,
        *_names(),
        "",
        ENGINE,
        *_engine(),
        "",
    ]
    return "\n".join(parts)


def _frameworks() -> Iterator[str]:
    files = ("constraints.txt", "tests/frameworks/constraints.txt")
    lines = [line for f in files for line in (workspace.ROOT / f).read_text("utf-8").splitlines()]
    pins = dict(line.split("==") for line in lines if "==" in line)
    for distribution, (name, *tried) in TRIED.items():
        yield f"| {name} | {pins[distribution]} | {'; '.join(tried)} |"


def _keys() -> Iterator[str]:
    registry = Registry.installed()
    for path, default in paths(DEFAULTS):
        kind, text = key_status(path, registry)
        shown = "" if default is None else f"`{_json(default)}`"
        yield f"| `{path}` | {shown} | {_words(kind, text)} |"


def _names() -> Iterator[str]:
    rows = []
    for dotted in lookup.everything():
        kind, text = (
            ("without effect", UNREAD[dotted]) if dotted in UNREAD else lookup.status(dotted)
        )
        module, _, name = dotted.rpartition(".")
        text = f"`{text}`" if kind == "needs" else "" if kind == "works" else text
        if kind == "needs" and text.strip("`") in known.PLANNED:
            text += ", not released yet"
        rows.append((f"deepspeed.{module}".rstrip("."), _words(kind, text), name))
    for (module, words), group in groupby(sorted(rows), key=lambda row: row[:2]):
        yield f"| `{module}` | {_listed(name for _, _, name in group)} | {words} |"


def _engine() -> Iterator[str]:
    own = {name for name in vars(DeepSpeedEngine) if not name.startswith("_")}
    own = (own | {"config", *SHARED}) - {"optimizer_type", *dir(nn.Module)} | {"compile"}
    yield f"| {_listed(sorted(own))} | works |"
    for name, use in sorted(known.ENGINE.items()):
        if name not in own | {"_config"}:
            yield f"| `{name}` | not yet; instead: {use} |"


def _words(kind: str, text: str) -> str:
    """How a status is told."""
    told = {
        "works": "works",
        "without effect": "accepted without effect",
        "needs": "needs",
        "not yet": "not yet; instead",
        "refused": "not yet",
    }[kind]
    joint = " " if kind == "needs" else ": "
    return (f"{told}{joint}{text}" if text else told).replace("|", "\\|")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _json(value: object) -> str:
    return json.dumps(value)
