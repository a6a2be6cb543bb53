"""SuperGLUE for T5X's gin files."""

from collections.abc import Sequence

import seqio

from dst_optax.finetuning.tasks.superglue.benchmark import MAIN
from dst_optax.finetuning.tasks.superglue.sources import Source
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue


def superglue(source: Source, vocabulary: seqio.Vocabulary, names: Sequence[str] = MAIN) -> str:
    """Registers tasks and says what to bind MIXTURE_OR_TASK_NAME to.

    Args:
      source: where the rows come from.
      vocabulary: the model's.
      names: tasks, mixed in proportion to their sizes.

    Returns:
      Name of the seqio mixture.
    """
    return SuperGlue(source, vocabulary, tuple(names)).register()
