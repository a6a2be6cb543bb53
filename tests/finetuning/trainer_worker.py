"""Trains with DST on a mesh of four devices, in one process or two; test_processes.py compares them.

python trainer_worker.py <run_dir> <step to be stopped at and go on from, or 0> <processes> <port> <index>
"""

import json
import os
import signal
import sys

import jax
import optax
import pytest
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


def train(directory):
    methods = {"dst": DST(optax.adam(1e-2), 0.05)}
    return trainer.finetune(directory, DATA, MODEL, methods, RECIPE, mesh_shape=(2, 2))


def stopped(directory, step):
    """What is said when the last process is asked to stop in a step."""
    with pytest.MonkeyPatch.context() as patch:
        if jax.process_index() == jax.process_count() - 1:
            read = inputs.train_batches
            patch.setattr(inputs, "train_batches", lambda *where: stopped_at(step, read(*where)))
        with pytest.raises(trainer.Interrupted) as told:
            train(directory)
    return str(told.value)


if __name__ == "__main__":
    directory, stop, count, port, index = sys.argv[1:]
    # one process, too, has a coordinator: so both add floats across devices in the same order
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=int(count), process_id=int(index))
    told = {"stopped": stopped(directory, int(stop))} if int(stop) else {}
    told |= {"devices": jax.device_count(), "processes": jax.process_count(), "rows": train(directory)}
    print(json.dumps(told))
