"""A decoder-only transformer in Flax: Llama, SmolLM2, Qwen 2.5, Qwen 3 and Gemma 3 text.

References:
  Grattafiori et al., The Llama 3 Herd of Models, arXiv 2407.21783; Yang et al., Qwen2.5 Technical
  Report, arXiv 2412.15115, and Qwen3 Technical Report, arXiv 2505.09388; Gemma Team, Gemma 3 Technical
  Report, arXiv 2503.19786.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.spmd import with_logical_constraint

from dst_optax.finetuning.models.decoder.config import DecoderConfig, Rope

_init = nn.initializers.normal(0.02)


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians a position by which each pair of a head's entries is turned.

    Args:
      rope: base and scaling.
      head_dim: width of a head.

    Returns:
      float32, ``(head_dim // 2,)``, rounded where ``transformers`` rounds.

    Example:
      >>> from dst_optax.finetuning.models.decoder.config import Rope
      >>> from dst_optax.finetuning.models.decoder.network import frequencies
      >>> frequencies(Rope(10_000.0, "linear", factor=2.0), 4).tolist()
      [0.5, 0.004999999888241291]
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.scaling == "default":
        return plain
    scaled = plain / np.float32(rope.factor)
    if rope.scaling == "linear":
        return scaled
    turns = rope.original_length * plain / np.float32(2 * math.pi)  # in the context of the pre-training
    low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * scaled + kept * plain


class View(NamedTuple):
    """What a kind of layer sees of the positions: with one more axis in front, of all kinds."""

    cos: jax.Array  # float32, (batch or 1, length, 1, head_dim // 2)
    sin: jax.Array  # likewise
    mask: jax.Array  # bool, (batch or 1, length, keys)


def _view(config: DecoderConfig, rope: Rope, window: int | None, positions: jax.Array, keys: int) -> View:
    """``positions`` are ``(batch or 1, length)``; a query sees keys up to its own position."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies(rope, config.head_dim)
    behind = positions[:, :, None] - jnp.arange(keys)
    mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return View(jnp.cos(angles), jnp.sin(angles), mask)


def _rotate(x: jax.Array, view: View) -> jax.Array:
    """Turns ``(batch, length, heads, head_dim)``, its first half paired with its second."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [a * view.cos - b * view.sin, b * view.cos + a * view.sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Norm(nn.Module):
    """Root mean square normalisation of the last axis, computed in float32."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(..., width)`` to the same shape."""
        cfg, offset = self.config, float(self.config.traits.unit_offset)
        scale = self.param("scale", nn.initializers.constant(1 - offset), (x.shape[-1],))
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + cfg.norm_eps)
        return (x * (scale.astype(jnp.float32) + offset)).astype(cfg.dtype)


class Attention(nn.Module):
    """Attention with rotary positions and grouped keys and values.

    Attributes:
      config: the model's shape.
      cache_length: keys and values to remember from call to call; None remembers none.
    """

    config: DecoderConfig
    cache_length: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, view: View, positions: jax.Array) -> jax.Array:
        """Maps ``(batch, length, emb_dim)`` to the same shape."""
        cfg, traits = self.config, self.config.traits

        def project(name: str, heads: int, axis: str) -> jax.Array:
            y = _dense(heads * cfg.head_dim, cfg, name, traits.qkv_bias)(x)
            y = with_logical_constraint(y, ("batch", "length", axis))
            return y.reshape(*y.shape[:-1], heads, cfg.head_dim)

        query = project("q_proj", cfg.num_heads, "heads")
        key = project("k_proj", cfg.num_kv_heads, "kv_heads")
        value = project("v_proj", cfg.num_kv_heads, "kv_heads")
        if traits.qk_norm:
            query, key = Norm(cfg, name="q_norm")(query), Norm(cfg, name="k_norm")(key)
        query, key = _rotate(query, view), _rotate(key, view)
        if self.cache_length is not None:
            key, value = self._recall("key", key, positions), self._recall("value", value, positions)

        query = query.reshape(*query.shape[:2], cfg.num_kv_heads, -1, cfg.head_dim)
        logits = jnp.einsum("bqhgd,bkhd->bhgqk", query, key, preferred_element_type=jnp.float32)
        logits *= (cfg.query_pre_attn_scalar or cfg.head_dim) ** -0.5
        logits = jnp.where(view.mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
        weights = nn.softmax(logits).astype(cfg.dtype)
        mixed = jnp.einsum("bhgqk,bkhd->bqhgd", weights, value)
        return _dense(cfg.emb_dim, cfg, "o_proj")(mixed.reshape(*x.shape[:2], -1))

    def _recall(self, name: str, new: jax.Array, positions: jax.Array) -> jax.Array:
        """All that there are, ``(batch, cache_length, heads, head_dim)``, new ones in their places."""
        shape = (new.shape[0], self.cache_length, *new.shape[2:])
        cache = self.variable("cache", name, jnp.zeros, shape, new.dtype)
        cache.value = cache.value.at[jnp.arange(new.shape[0])[:, None], positions].set(new)
        return cache.value


class Mlp(nn.Module):
    """The position-wise feed-forward network, gated."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, length, emb_dim)`` to the same shape."""
        cfg = self.config
        gate = getattr(jax.nn, cfg.traits.activation)(_dense(cfg.mlp_dim, cfg, "gate_proj")(x))
        y = gate * _dense(cfg.mlp_dim, cfg, "up_proj")(x)
        y = with_logical_constraint(y, ("batch", "length", "mlp"))
        return _dense(cfg.emb_dim, cfg, "down_proj")(y)


class Layer(nn.Module):
    """Attention and a feed-forward network, each normalised and added to its input."""

    config: DecoderConfig
    cache_length: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, kind: Any, views: View, positions: jax.Array) -> tuple[jax.Array, None]:
        """Maps ``(batch, length, emb_dim)`` to the same shape, and None, as ``nn.scan`` wants it."""
        cfg = self.config

        def norm(name: str, x: jax.Array) -> jax.Array:
            return Norm(cfg, name=name)(x)

        view = View(*(of_kind[kind] for of_kind in views))
        y = norm("input_layernorm", x)
        y = Attention(cfg, self.cache_length, name="self_attn")(y, view, positions)
        if cfg.traits.sandwich_norms:
            x = _residual(x, norm("post_attention_layernorm", y))
            y = Mlp(cfg, name="mlp")(norm("pre_feedforward_layernorm", x))
            return _residual(x, norm("post_feedforward_layernorm", y)), None
        x = _residual(x, y)
        return _residual(x, Mlp(cfg, name="mlp")(norm("post_attention_layernorm", x))), None


class Decoder(nn.Module):
    """A decoder-only language model.

    Every token is real; what comes after a row's last token changes nothing before it. If the parameters
    hold a ``prompt``, ``(prompt length, emb_dim)``, each row begins with these embeddings.

    Attributes:
      config: the model's shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dst_optax.finetuning.models import decoder
      >>> config = decoder.DecoderConfig("qwen3", 32, 16, 2, 4, 2, 8, 24, tie_embeddings=True)
      >>> model, tokens = decoder.Decoder(config), jnp.ones((2, 5), int)
      >>> params = model.init(jax.random.key(0), tokens)["params"]
      >>> model.apply({"params": params}, tokens, at=jnp.array([[4], [2]])).shape
      (2, 1, 32)
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        at: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache_length: int | None = None,
    ) -> jax.Array:
        """Logits of what follows each token, or some of them.

        Args:
          tokens: int, ``(batch, length)``.
          at: int, ``(batch, n)``: after which tokens logits are wanted; None wants all. Others are not
            computed, which saves most of the time and memory where the vocabulary is large.
          positions: int, ``(batch, length)``: where the tokens stand when they continue what the collection
            ``cache`` remembers, the soft prompt counted; None begins at the beginning.
          cache_length: keys and values to remember in ``cache``, the soft prompt's included; None
            remembers none.

        Returns:
          float32, ``(batch, length or n, vocab_size)``.
        """
        cfg = self.config
        embedder = nn.Embed(
            cfg.vocab_size, cfg.emb_dim, dtype=cfg.dtype, embedding_init=_init, name="embed_tokens"
        )
        x = embedder(tokens)
        if positions is None:
            x, prompt_length = self._prompted(x)
            positions = jnp.arange(x.shape[1])[None]
            at = prompt_length + (jnp.arange(tokens.shape[1])[None] if at is None else at)
        if cfg.traits.scaled_embeddings:
            x *= jnp.asarray(math.sqrt(cfg.emb_dim), cfg.dtype)
        x = with_logical_constraint(x, ("batch", "length", "embed"))

        views = [_view(cfg, cfg.rope, None, positions, cache_length or x.shape[1])]
        if cfg.local_rope is not None:
            views.append(
                _view(cfg, cfg.local_rope, cfg.sliding_window, positions, cache_length or x.shape[1])
            )
        x = _stack(cfg, cache_length)(x, View(*map(jnp.stack, zip(*views, strict=True))), positions)
        if at is not None:
            x = jnp.take_along_axis(x, at[:, :, None], axis=1)
        x = Norm(cfg, name="norm")(x)
        if cfg.tie_embeddings:
            table = embedder.embedding.astype(cfg.dtype)
            return jnp.einsum("ble,ve->blv", x, table, preferred_element_type=jnp.float32)
        return _dense(cfg.vocab_size, cfg, "lm_head", dot_general=_dot_to_float32)(x)

    def _prompted(self, x: jax.Array) -> tuple[jax.Array, int]:
        """Embeddings after those of the soft prompt, if the parameters hold one, and its length."""
        if not self.has_variable("params", "prompt"):
            return x, 0
        prompt = self.get_variable("params", "prompt").astype(x.dtype)
        prompts = jnp.broadcast_to(prompt, (x.shape[0], *prompt.shape))
        return jnp.concatenate([prompts, x], axis=1), prompt.shape[0]


def _stack(config: DecoderConfig, cache_length: int | None) -> Callable[..., jax.Array]:
    """The layers one after the other, or one stacked layer that is scanned."""
    kinds = np.array(config.sliding_layers or (False,) * config.num_layers, np.int32)
    layer: Any = nn.remat(Layer, prevent_cse=not config.scan_layers) if config.remat else Layer
    if config.scan_layers:
        scanned = nn.scan(
            layer,
            variable_axes={"params": 1, "cache": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]: declared as int
            length=config.num_layers,
        )
        layers, kinds = [scanned(config, cache_length, name="layers")], [kinds]
    else:
        layers = [layer(config, cache_length, name=f"layers_{i}") for i in range(config.num_layers)]

    def apply(x: jax.Array, views: View, positions: jax.Array) -> jax.Array:
        for layer, kind in zip(layers, kinds, strict=True):
            x, _ = layer(x, kind, views, positions)
        return x

    return apply


def _residual(x: jax.Array, y: jax.Array) -> jax.Array:
    return with_logical_constraint(x + y, ("batch", "length", "embed"))


def _dense(
    features: int, config: DecoderConfig, name: str, use_bias: bool = False, **attributes: Any
) -> nn.Dense:
    return nn.Dense(
        features, use_bias=use_bias, dtype=config.dtype, kernel_init=_init, name=name, **attributes
    )


_dot_to_float32 = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
