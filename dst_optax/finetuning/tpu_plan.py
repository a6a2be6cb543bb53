"""What a fine-tuning step would cost on a TPU: compiled ahead of time, on a machine without one.

    dst-optax plan --model t5_1_1_xxl --topology v5e:16x16 --fraction 0.01

Three programs are compiled, each in a process of its own: the trainer's step of a T5 or a decoder without
DST, the same with DST, and DST's update alone, of which every collective is DST's. The extra ``tpu``
(libtpu) compiles; no TPU is needed.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import dst_optax
from dst_optax.finetuning import compiled_program
from dst_optax.finetuning.models.base import LanguageModel, dividing
from dst_optax.finetuning.models.named import language_model
from dst_optax.tree import map_named, named_leaves

GIB = 2**30
MEMORY = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}  # bytes a chip
ONE_DEVICE = {"v4": {"chip_config_name": "megacore"}}  # a chip of two cores, as JAX runs it
TOPOLOGY = re.compile(r"(v4|v5e|v5p|v6e):(\d+(?:x\d+){1,2})")
OPTIMIZERS = ("adafactor", "adamw")
PROGRAMS = ("full", "dst", "update")
SILENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile for.

    Attributes:
      model: what :func:`~dst_optax.finetuning.models.named.language_model` takes by name.
      topology: generation and shape, for example "v5e:16x16".
      fraction: of the parameters that may differ from the seed.
      optimizer: "adafactor" or "adamw".
      batch_size: examples a step, on all chips together.
      inputs: tokens of an input.
      targets: tokens of a target.
      mesh: chips along data and model; None takes all but the topology's last dimension for data.
    """

    model: str
    topology: str
    fraction: float = 0.01
    optimizer: str = "adafactor"
    batch_size: int = 128
    inputs: int = 512
    targets: int = 62
    mesh: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        language_model(self.model)
        if not TOPOLOGY.fullmatch(self.topology):
            raise ValueError(
                f"topology {self.topology!r}: give a generation ({', '.join(MEMORY)}) and its shape, for "
                "example v5e:16x16 or v5p:2x2x2."
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r}: choose one of {', '.join(OPTIMIZERS)}.")
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction {self.fraction}: it must lie between 0 and 1.")
        if math.prod(self.mesh_shape) != self.chips:
            mesh = "x".join(map(str, self.mesh_shape))
            raise ValueError(f"mesh {mesh}: {self.topology} has {self.chips} chips.")
        if self.batch_size % self.mesh_shape[0]:
            raise ValueError(
                f"batch size {self.batch_size} is no multiple of the {self.mesh_shape[0]} chips along data."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The topology's."""
        return tuple(int(n) for n in self.topology.split(":")[1].split("x"))

    @property
    def chips(self) -> int:
        """Of the topology."""
        return math.prod(self.shape)

    @property
    def mesh_shape(self) -> tuple[int, int]:
        """Chips along data and model."""
        return self.mesh or (math.prod(self.shape[:-1]), self.shape[-1])

    @property
    def memory(self) -> int:
        """Bytes of a chip."""
        return MEMORY[self.topology.split(":")[0]]


def plan(job: Job) -> dict[str, Any]:
    """Compiles the three programs, one after another, each in its own process.

    Args:
      job: model, topology and settings.

    Returns:
      ``{"job": ..., "full": facts, "dst": facts, "update": facts, "verdict": {...}}``, see
      :func:`~dst_optax.finetuning.compiled_program.facts` and :func:`verdict`; a program that the compiler
      refuses for want of memory has
      ``refused`` with its words instead.

    Raises:
      ValueError: libtpu is missing, or the topology is none that it knows.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "no libtpu: pip install 'dst-optax[tpu,finetuning]' gets the TPU compiler; no TPU needed."
        )
    facts = {program: _compile_apart(job, program) for program in PROGRAMS}
    return {"job": dataclasses.asdict(job), **facts, "verdict": verdict(job, facts)}


def verdict(job: Job, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether training fits, by how much, and what DST adds.

    Args:
      job: what was compiled for.
      facts: of each program, by its name.

    Returns:
      ``fits`` and ``left`` (bytes a chip, negative if it does not fit; None if the compiler refused),
      ``added`` (bytes that DST adds to the peak), ``seed`` (bytes of the seed's shard) and
      ``pass_bytes`` (bytes that DST moves between chips in a counting pass).
    """
    update, full, dst = facts["update"], facts["full"], facts["dst"]
    refused = "refused" in dst
    comparable = "refused" not in full and not refused
    return {
        "fits": not refused and dst["peak"] <= job.memory,
        "left": None if refused else job.memory - dst["peak"],
        "added": dst["peak"] - full["peak"] if comparable else None,
        "seed": update.get("seed"),
        "pass_bytes": update.get("pass_bytes"),
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as text.

    Args:
      report: what :func:`plan` returned.

    Returns:
      Lines of a table, and the verdict.
    """
    job, summary = Job(**report["job"]), report["verdict"]
    lines = [
        f"{job.model} on {job.topology}: {job.chips} chips ({job.mesh_shape[0]} data x {job.mesh_shape[1]} "
        f"model), {job.optimizer}, batch {job.batch_size} x ({job.inputs} + {job.targets}) tokens",
        "",
        f"{'per chip':24}{'step':>14}{'step with DST':>16}{'DST alone':>14}",
    ]
    for name, label in ROWS.items():
        values = [_shown(report[program].get(name), name) for program in PROGRAMS]
        lines.append(f"{label:24}{values[0]:>14}{values[1]:>16}{values[2]:>14}")
    lines += [
        f"{program}: the compiler refuses: {report[program]['refused']}"
        for program in PROGRAMS
        if "refused" in report[program]
    ]
    lines += ["", "collectives (calls; bytes a chip and step, a loop of unknown length counted once):"]
    for program in PROGRAMS:
        for kind, (calls, size, largest) in report[program].get("collectives", {}).items():
            label = f"  {program:8}{kind:20}"
            lines.append(f"{label}{calls:8}{_bytes(size):>14}, the largest {_bytes(largest)}")
    lines.append("")
    if summary["left"] is None:
        lines.append(f"does not fit into {_bytes(job.memory)} a chip.")
    else:
        fits = "fits" if summary["fits"] else "does not fit"
        more = "left" if summary["fits"] else "too much"
        lines.append(f"{fits}: {_bytes(abs(summary['left']))} of {_bytes(job.memory)} a chip {more}.")
    if summary["added"] is not None:
        share = summary["added"] / summary["seed"] - 1
        lines.append(
            f"DST adds {_bytes(summary['added'])} to the peak, the seed's shard ({_bytes(summary['seed'])}) "
            f"{share:+.1%}; it moves {_bytes(summary['pass_bytes'])} between chips in a counting pass."
        )
    return "\n".join(lines)


ROWS = {
    "arguments": "arguments",
    "temp": "temporaries",
    "peak": "peak",
    "seed": "seed",
    "flops": "flops (loop body once)",
    "sorts": "sorts",
    "compile_seconds": "compile time",
}


def _shown(value: Any, name: str) -> str:
    if value is None:
        return "-"
    if name == "flops":
        return f"{value:.3g}"
    if name == "compile_seconds":
        return f"{value:.0f} s"
    return str(value) if name == "sorts" else _bytes(value)


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def _compile_apart(job: Job, program: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "dst_optax.finetuning.tpu_plan", json.dumps(dataclasses.asdict(job)), program],
        env={**os.environ, **SILENT},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    words = done.stderr.strip().splitlines() or ["no message"]
    for line in words:
        if "RESOURCE_EXHAUSTED" in line:
            return {"refused": line[line.index("RESOURCE_EXHAUSTED") :][:300]}
    raise ValueError(f"{program} for {job.topology} cannot be compiled: {words[-1][:500]}")


def compile_program(job: Job, program: str) -> dict[str, Any]:
    """Compiles one program in this process, whose environment must be that of SILENT.

    Args:
      job: model, topology and settings.
      program: "full", "dst" or "update".

    Returns:
      See :func:`~dst_optax.finetuning.compiled_program.facts`; and ``seed``, the bytes of a chip's shard of
      the seed.
    """
    from flax.linen import logical_axis_rules

    cores = ONE_DEVICE.get(job.topology.split(":")[0], {})
    devices = topologies.get_topology_desc(platform="tpu", topology_name=job.topology, **cores).devices
    mesh = Mesh(np.array(devices).reshape(job.mesh_shape), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    model = language_model(job.model).configured(dtype="bfloat16", scan_layers=True, remat=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rules = tuple((name, "data" if name == "embed" else axis) for name, axis in model.axis_rules)
    params = jax.tree.map(_placed, shapes, model.shardings(shapes, mesh, rules))
    if program == "update":
        step, arguments = _update(job, params, mesh)
    else:
        step, arguments = _step(job, program, model, params, mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh), logical_axis_rules(rules):
        compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    facts = compiled_program.facts(compiled) | {"compile_seconds": time.perf_counter() - start}
    if program != "full":
        shards = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(params)]
        facts["seed"] = sum(math.prod(shape) * size for shape, size in shards)
    return facts


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=dividing(sharding, x.shape))


def _state(transform: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """What has a parameter's shape lies where it does, all else everywhere."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x: Any, sharding: NamedSharding = everywhere) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return optax.tree.map_params(
        transform,
        lambda x, p: place(x, p.sharding if x.shape == p.shape else everywhere),
        jax.eval_shape(transform.init, params),
        params,
        transform_non_params=place,
    )


def _update(job: Job, params: Any, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    from dst_optax.finetuning.methods.dst import BY_LAYER

    transform = dst_optax.dynamic_subset_tuning(job.fraction, silos=BY_LAYER)

    def update(carry: tuple[Any, Any], updates: Any) -> tuple[Any, Any]:
        params, state = carry
        updates, state = transform.update(updates, state, params)
        return dst_optax.apply_updates(params, updates, state), state

    return update, ((params, _state(transform, params, mesh)), params)


def _step(
    job: Job, program: str, model: LanguageModel, params: Any, mesh: Mesh
) -> tuple[Any, tuple[Any, ...]]:
    from dst_optax.finetuning.methods.dst import DST, DSTState
    from dst_optax.finetuning.methods.full import Full
    from dst_optax.finetuning.steps import TrainState, make_step

    optimizer = getattr(optax, job.optimizer)(1e-3)
    method = Full(optimizer) if program == "full" else DST(optimizer, job.fraction)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    lengths = model.feature_converter().get_model_feature_lengths(
        {"inputs": job.inputs, "targets": job.targets}
    )
    batch = {
        name: jax.ShapeDtypeStruct((job.batch_size, n), jnp.int32, sharding=rows)
        for name, n in lengths.items()
    }
    key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=NamedSharding(mesh, PartitionSpec()))
    slots = _state(optimizer, params, mesh)
    if isinstance(method, DST):
        dst = jax.eval_shape(method.rule.init, params)
        shardings = {path: p.sharding for path, p in named_leaves(params)}
        seed = map_named(lambda path, x: _placed(x, shardings[path]), dst.seed)
        everywhere = NamedSharding(mesh, PartitionSpec())
        rest = jax.tree.map(lambda x: _placed(x, everywhere), dst._replace(seed=None))
        slots = DSTState(slots, rest._replace(seed=seed))
    state = TrainState({}, params, slots)
    return make_step(model, method), (state, batch, key)


def parse_mesh(text: str) -> tuple[int, int]:
    """Chips along data and model.

    Args:
      text: for example "32x8".

    Raises:
      ValueError: it is no such shape.

    Example:
      >>> parse_mesh("32x8")
      (32, 8)
    """
    if not re.fullmatch(r"\d+x\d+", text):
        raise ValueError(f"mesh {text!r}: give chips along data and model, for example 32x8.")
    data, model = text.split("x")
    return int(data), int(model)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    settings["mesh"] = settings["mesh"] and tuple(settings["mesh"])
    print(json.dumps(compile_program(Job(**settings), sys.argv[2])))
