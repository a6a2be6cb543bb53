"""Pairs for T5X's MultiOptimizer."""

from flax.traverse_util import ModelParamTraversal


def pairs(matrices, rest):
    def is_matrix(path, _):
        return "kernel" in path

    return [
        (ModelParamTraversal(is_matrix), matrices),
        (ModelParamTraversal(lambda path, x: not is_matrix(path, x)), rest),
    ]
