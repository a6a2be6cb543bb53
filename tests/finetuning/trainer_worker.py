"""Trains with DST on a mesh of four devices, in one process or two; test_processes.py compares them.

python trainer_worker.py <run_dir> <step to stop at, or 0> <processes> <port> <index>
"""

import json
import os
import signal
import sys

import jax
import optax
import seqio
from few import Few

from dst_optax.finetuning import inputs, trainer
from dst_optax.finetuning.methods.dst import DST
from dst_optax.finetuning.models import t5
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue

MODEL = t5.T5Config(
    vocab_size=384,
    emb_dim=16,
    num_heads=4,
    head_dim=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_dim=16,
    dropout_rate=0.1,
)
RECIPE = trainer.Recipe(
    steps=4,
    batch_size=16,
    lengths={"inputs": 48, "targets": 16},
    eval_every=2,
    log_every=1,
    eval_batch_size=32,
)
DATA = SuperGlue(Few(), seqio.ByteVocabulary(), ("rte",))


def stopped_at(step, batches):
    """The batches; with the one of that step this process alone is asked to stop."""
    for i, batch in enumerate(batches, 1):
        if i == step:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def main(directory, stop):
    if stop and jax.process_index() == jax.process_count() - 1:
        read = inputs.train_batches
        inputs.train_batches = lambda *where: stopped_at(stop, read(*where))
    methods = {"dst": DST(optax.adam(1e-2), 0.05)}
    try:
        return trainer.finetune(directory, DATA, MODEL, methods, RECIPE, mesh_shape=(2, 2))
    except trainer.Interrupted as e:
        return str(e)


if __name__ == "__main__":
    directory, stop, count, port, index = sys.argv[1:]
    # one process, too, has a coordinator: so both add floats across devices in the same order
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=int(count), process_id=int(index))
    rows = main(directory, int(stop))
    print(json.dumps({"devices": jax.device_count(), "processes": jax.process_count(), "rows": rows}))
