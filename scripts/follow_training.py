r"""Follows a training run with a server, from step to step: only what changed is sent.

The trainer's side reads the snapshots of a run, in the order of their steps, and writes what changed from
one to the next, in the checkpoint's coordinates. The server's side knows the seed and the steps alone: it
works out each version, checks that none is missing, and switches to it.

    dst-optax finetune ... --gin.CHECKPOINT=\"smollm2\" --gin.SNAPSHOT_EVERY=1 --gin.RUN_DIR=\"runs/cb\"
    python scripts/follow_training.py runs/cb/dst/rng_0/snapshots --checkpoint smollm2 --steps steps

The server is a PyTorch model of transformers in this process, or vLLM's, started as docs/serving.md says,
whose DST_SUBSET_ROOT is given:

    python scripts/follow_training.py runs/cb/dst/rng_0/snapshots --checkpoint smollm2 --steps steps \
        --url http://localhost:8000 --root /subsets --api-key KEY
"""

import argparse
import dataclasses
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dst_optax.finetuning.models import huggingface
from dst_optax.subset import Entries, Subset, fingerprint, models, versions

Serve = Callable[[str, Subset], Any]


def main() -> None:
    """Prints a line for each version."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("snapshots", help="a run's directory of snapshots")
    parser.add_argument("--checkpoint", required=True, help="the seed, as Hugging Face ships it")
    parser.add_argument("--steps", required=True, help="directory for what changed")
    parser.add_argument("--url", help="of vLLM's server; without it a PyTorch model serves")
    parser.add_argument("--root", help="the server's DST_SUBSET_ROOT")
    parser.add_argument("--api-key", default="", help="the server's")
    arguments = parser.parse_args()
    if arguments.url and not arguments.root:
        parser.error("--url needs --root, the directory that the server has as DST_SUBSET_ROOT.")
    if arguments.url:
        serve = vllm_server(arguments.url, Path(arguments.root), arguments.api_key)
    else:
        serve = torch_server(arguments.checkpoint)
    for step in changes(Path(arguments.snapshots), arguments.checkpoint, Path(arguments.steps)):
        print(step)
    for line in follow(Path(arguments.steps), arguments.checkpoint, serve):
        print(line)


def changes(snapshots: Path, checkpoint: str, steps: Path) -> Iterator[str]:
    """The trainer's side: writes a step for each snapshot, the first of them from the seed."""
    seed = models.open_model(checkpoint)
    before = unchanged(seed)
    for snapshot in sorted(p for p in snapshots.iterdir() if p.name.isdigit()):
        huggingface.export_subset(snapshot, Path(checkpoint))
        after = with_seed_values(Subset.load(snapshot / "subset_hf"), seed)
        step = versions.between(before, after)
        step.save(steps / snapshot.name)
        size = sum(file.stat().st_size for file in (steps / snapshot.name).iterdir())
        yield f"{snapshot.name}: {after.count:,} entries, {step.count:,} changed, {size / 1e6:.2f} MB"
        before = after


def follow(steps: Path, checkpoint: str, serve: Serve) -> Iterator[str]:
    """The server's side: from the seed through all steps."""
    version = unchanged(models.open_model(checkpoint))
    for directory in sorted(steps.iterdir()):
        start = time.perf_counter()
        version = versions.then(version, Subset.load(directory))
        computed = time.perf_counter()
        serve(f"step{directory.name}", version)
        milliseconds = 1e3 * (computed - start), 1e3 * (time.perf_counter() - computed)
        yield "{}: known after {:.0f} ms, served after {:.0f} ms".format(directory.name, *milliseconds)


def unchanged(seed: dict[str, Any]) -> Subset:
    """The seed as a version: nothing differs."""
    none = {name: np.zeros(0, x.dtype) for name, x in seed.items()}
    return Subset(
        {
            name: Entries(
                tuple(x.shape), np.zeros(0, np.int64), none[name], none[name], fingerprint(np.asarray(x))
            )
            for name, x in seed.items()
        }
    )


def with_seed_values(subset: Subset, seed: dict[str, Any]) -> Subset:
    """A subset that remembers what the seed has where it differs."""
    leaves = {
        name: dataclasses.replace(e, seed_values=np.asarray(seed[name]).reshape(-1)[e.positions])
        for name, e in subset.items()
    }
    return Subset(leaves, subset.metadata)


def torch_server(checkpoint: str) -> Serve:
    """A PyTorch model that becomes each version in place."""
    import transformers  # pyright: ignore[reportMissingImports]

    from dst_optax.serving.torch import SubsetStore

    store = SubsetStore(transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto"))

    def serve(name: str, version: Subset) -> Any:
        before = store.active
        store.add(name, version)
        model = store.activate(name)
        if before is not None:
            store.unload(before)
        return model

    return serve


def vllm_server(url: str, root: Path, key: str) -> Serve:
    """A server of vLLM that becomes each version between requests."""
    served: list[str] = []

    def post(verb: str, name: str) -> None:
        body, headers = json.dumps({"name": name}).encode(), {"Authorization": f"Bearer {key}"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/v1/subsets/{verb}", body, headers)
        ) as reply:
            reply.read()

    def serve(name: str, version: Subset) -> None:
        version.save(root / name)
        post("load", name)
        post("activate", name)
        if served:
            post("unload", served.pop())
        served.append(name)

    return serve


if __name__ == "__main__":
    main()
