"""Paths of leaves, with and without the variables that frameworks put around them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dst_optax import tree


def test_a_leaf_called_value_keeps_its_name():
    params = {"attn": {"query": 1.0, "value": 2.0}, "value": {"value": 3.0}}
    assert tree.paths(params) == ["attn/query", "attn/value", "value/value"]


def test_the_value_that_nnx_adds_is_dropped():
    nnx = pytest.importorskip("flax.nnx")

    class Attention(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(jnp.ones(3))
            self.query = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    model = Attention()
    expected = ["query/bias", "query/kernel", "value"]
    assert tree.paths(model) == tree.paths(nnx.state(model, nnx.Param)) == expected
    assert tree.paths(nnx.to_pure_dict(nnx.state(model, nnx.Param))) == expected


def test_a_field_called_value_of_another_class_is_kept():
    eqx = pytest.importorskip("equinox")

    class Attention(eqx.Module):
        value: jax.Array

    assert tree.paths({"a": Attention(jnp.ones(2))}) == ["a/value"]


def test_a_partitioning_box_is_dropped():
    nn = pytest.importorskip("flax.linen")
    assert tree.paths({"kernel": nn.Partitioned(jnp.ones(2), ("x",))}) == ["kernel"]


def test_leaves_are_mapped_in_order_and_masked_nodes_stay():
    params = {"a": [np.int32(1), optax.MaskedNode()], "b": np.int32(2), "none": None}
    assert tree.named_leaves(params) == [("a/0", 1), ("a/1", optax.MaskedNode()), ("b", 2)]
    got = tree.map_named(lambda path, x: f"{path}={x}", params)
    assert got == {"a": ["a/0=1", optax.MaskedNode()], "b": "b=2", "none": None}


def test_a_prefix_of_the_tree_is_enough():
    prefix = {"encoder": 0.1, "head": {"bias": 0.5, "kernel": 0.2}}
    assert tree.by_prefix(prefix, "encoder/layer/kernel", "x") == 0.1
    assert tree.by_prefix(prefix, "head/bias", "x") == 0.5
    assert tree.by_prefix(0.3, "anything", "x") == 0.3
    with pytest.raises(ValueError, match=r"fractions.*'decoder/kernel'.*'head/bias'"):
        tree.by_prefix(prefix, "decoder/kernel", "fractions")


def test_of_names_that_begin_alike_the_longer_one_wins():
    """As haiku names modules of modules."""
    values = {"mlp": 0.1, "mlp/~/linear_0": 0.2}
    assert tree.by_prefix(values, "mlp/~/linear_0/w", "fractions") == 0.2
    assert tree.by_prefix(values, "mlp/scale", "fractions") == 0.1


@pytest.mark.parametrize(
    ("value", "are"),
    [([("a", 1)], True), ((("a", 1), ("b", 2)), True), ([], False), ([1, 2], False), ("ab", False)],
)
def test_rules_are_told_from_pytrees(value, are):
    assert tree.are_rules(value) == are
