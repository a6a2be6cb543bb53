"""T5 in Flax, with the parameter names and shapes of T5X's minimal T5.

Parameters that are stacked (``T5Config.scan_layers``) lie at ``encoder/encoder`` and
``decoder/decoder`` with the layer as their axis 1; everything else keeps its place.

One file, so that it can be read beside T5X's ``network.py`` from top to bottom.

References:
  Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer,
  arXiv 1910.10683.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.spmd import with_logical_constraint
from jax import lax

from dst_optax.finetuning.models.t5.config import T5Config

_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_truncated_normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def relative_position_bucket(
    distance: Any, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Any:
    """The bucket of a relative position: exact when near, logarithmic when far.

    Args:
      distance: key position minus query position, integers of any shape.
      bidirectional: whether keys after the query have buckets of their own (in the encoder).
      num_buckets: buckets.
      max_distance: relative positions from here on share a bucket.

    Returns:
      Buckets in ``[0, num_buckets)``, same shape.

    Example:
      >>> import numpy as np
      >>> from dst_optax.finetuning.models.t5.network import relative_position_bucket
      >>> relative_position_bucket(np.array([1, 0, -1, -20, -1000]), bidirectional=False).tolist()
      [0, 0, 1, 17, 31]
    """
    buckets = num_buckets // 2 if bidirectional else num_buckets
    exact = buckets // 2
    # the least distance of each far bucket, as an integer: no logarithm to be rounded at run time
    far = np.arange(1, buckets - exact) / (buckets - exact)
    starts = np.ceil(exact * (max_distance / exact) ** far - 1e-6).astype(np.int32)
    behind = abs(distance) if bidirectional else (-distance).clip(0)
    bucket = behind.clip(None, exact) + (behind[..., None] >= starts).sum(-1)
    return bucket + (distance > 0) * buckets if bidirectional else bucket


class RelativePositionBias(nn.Module):
    """A learned bias for each head and each bucket of relative positions."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """The bias of attention logits, ``(1, num_heads, queries, keys)``."""
        cfg = self.config
        table = self.param(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (cfg.num_heads, cfg.relpos_buckets),
        )
        distance = key_positions[None, :] - query_positions[:, None]
        bucket = relative_position_bucket(
            distance, self.bidirectional, cfg.relpos_buckets, cfg.relpos_max_distance
        )
        return table.astype(cfg.dtype)[None, :, bucket]


class Attention(nn.Module):
    """Multi-head attention; its logits are not scaled, the query's initialisation is.

    When decoding, self-attention appends a key and a value to the collection ``cache`` at each step,
    and cross-attention computes those of the encoder once, into the collection ``memory``.
    """

    config: T5Config
    deterministic: bool
    decode_length: int | None = None

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        attended: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None = None,
        position: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from ``inputs`` to ``attended``.

        Args:
          inputs: queries, ``(batch, queries, emb_dim)``.
          attended: keys and values, ``(batch, keys, emb_dim)``.
          mask: bool, true where a query may see a key, broadcast to ``(batch, heads, queries, keys)``.
          bias: added to the logits, broadcast likewise.
          position: when decoding self-attention, where the one key of ``attended`` stands.

        Returns:
          ``(batch, queries, emb_dim)``.
        """
        cfg = self.config

        def project(name: str, x: jax.Array, init: nn.initializers.Initializer = _normal) -> jax.Array:
            y = _dense(cfg.num_heads * cfg.head_dim, cfg, init, name)(x)
            y = y.reshape(*y.shape[:-1], cfg.num_heads, cfg.head_dim)
            return with_logical_constraint(y, ("batch", "length", "heads", "kv"))

        def recall(name: str) -> jax.Array:
            if self.decode_length is None:
                return project(name, attended)
            if position is None:
                return self.variable("memory", f"cached_{name}", project, name, attended).value
            new = project(name, attended)
            shape = (new.shape[0], self.decode_length, *new.shape[2:])
            cache = self.variable("cache", f"cached_{name}", jnp.zeros, shape, new.dtype)
            cache.value = lax.dynamic_update_slice_in_dim(cache.value, new, position, axis=1)
            return cache.value

        query = project("query", inputs, _scaled(_normal, cfg.head_dim**-0.5))
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, recall("key"), preferred_element_type=jnp.float32)
        if bias is not None:
            logits += bias
        weights = nn.softmax(jnp.where(mask, logits, -1e10)).astype(cfg.dtype)
        weights = _dropout(cfg, self.deterministic)(weights)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, recall("value"))
        return _dense(cfg.emb_dim, cfg, _normal, "out")(mixed.reshape(*inputs.shape[:-1], -1))


class Mlp(nn.Module):
    """The position-wise feed-forward network, gated when there are several activations."""

    config: T5Config
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, length, emb_dim)`` to the same shape."""
        cfg = self.config
        hidden = []
        for i, activation in enumerate(cfg.mlp_activations):
            name = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{i}"
            y = _dense(cfg.mlp_dim, cfg, _truncated_normal, name)(x)
            hidden.append(y if activation == "linear" else getattr(nn, activation)(y))
        y = _dropout(cfg, self.deterministic)(math.prod(hidden[1:], start=hidden[0]))
        y = with_logical_constraint(y, ("batch", "length", "mlp"))
        return _dense(cfg.emb_dim, cfg, _truncated_normal, "wo")(y)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each normalised before and added to its input."""

    config: T5Config
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        """Maps ``(batch, length, emb_dim)`` to the same shape, and None, as ``nn.scan`` wants it."""
        cfg, deterministic = self.config, self.deterministic
        y = _norm(cfg, "pre_attention_layer_norm")(x)
        y = Attention(cfg, deterministic, name="attention")(y, y, mask, bias)
        x = _residual(cfg, deterministic, x, y)
        y = Mlp(cfg, deterministic, name="mlp")(_norm(cfg, "pre_mlp_layer_norm")(x))
        return _residual(cfg, deterministic, x, y), None


class DecoderLayer(nn.Module):
    """An encoder layer with attention to what was encoded in its middle."""

    config: T5Config
    deterministic: bool
    decode_length: int | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        cross_mask: jax.Array,
        bias: jax.Array,
        position: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """Maps ``(batch, length, emb_dim)`` to the same shape, and None, as ``nn.scan`` wants it."""
        cfg, deterministic = self.config, self.deterministic
        attention = (cfg, deterministic, self.decode_length)
        y = _norm(cfg, "pre_self_attention_layer_norm")(x)
        y = Attention(*attention, name="self_attention")(y, y, mask, bias, position)
        x = _residual(cfg, deterministic, x, y)
        y = _norm(cfg, "pre_cross_attention_layer_norm")(x)
        y = Attention(*attention, name="encoder_decoder_attention")(y, encoded, cross_mask)
        x = _residual(cfg, deterministic, x, y)
        y = Mlp(cfg, deterministic, name="mlp")(_norm(cfg, "pre_mlp_layer_norm")(x))
        return _residual(cfg, deterministic, x, y), None


class Encoder(nn.Module):
    """A stack of encoder layers."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, deterministic: bool) -> jax.Array:
        """Maps embedded tokens ``(batch, length, emb_dim)`` to the same shape."""
        cfg = self.config
        positions = jnp.arange(x.shape[1])
        bias = RelativePositionBias(cfg, bidirectional=True, name="relpos_bias")(positions, positions)
        x = _dropout(cfg, deterministic)(x)
        layers = _stack(EncoderLayer, cfg, cfg.num_encoder_layers, "encoder", deterministic=deterministic)
        x = _norm(cfg, "encoder_norm")(layers(x, mask, bias))
        return _dropout(cfg, deterministic)(x)


class Decoder(nn.Module):
    """A stack of decoder layers, and the logits."""

    config: T5Config
    token_embedder: nn.Embed

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        cross_mask: jax.Array,
        position: jax.Array | None = None,
        *,
        deterministic: bool,
        decode_length: int | None = None,
    ) -> jax.Array:
        """Maps embedded tokens ``(batch, length, emb_dim)`` to logits ``(batch, length, vocab_size)``."""
        cfg = self.config
        queries = jnp.arange(x.shape[1]) if position is None else position[None]
        keys = queries if decode_length is None else jnp.arange(decode_length)
        bias = RelativePositionBias(cfg, bidirectional=False, name="relpos_bias")(queries, keys)
        x = _dropout(cfg, deterministic)(x)
        layers = _stack(
            DecoderLayer,
            cfg,
            cfg.num_decoder_layers,
            "decoder",
            deterministic=deterministic,
            decode_length=decode_length,
        )
        x = _norm(cfg, "decoder_norm")(layers(x, encoded, mask, cross_mask, bias, position))
        x = _dropout(cfg, deterministic)(x).astype(jnp.float32)
        if cfg.logits_via_embedding:
            table = self.token_embedder.embedding.astype(jnp.float32)
            logits = x @ table.T / math.sqrt(cfg.emb_dim)
        else:
            dense = nn.Dense(
                cfg.vocab_size,
                use_bias=False,
                dtype=jnp.float32,
                kernel_init=_truncated_normal,
                name="logits_dense",
            )
            logits = dense(x)
        return with_logical_constraint(logits, ("batch", "length", "vocab"))


class Transformer(nn.Module):
    """T5, an encoder-decoder transformer.

    Token 0 is padding. Packed examples are told apart by their segment ids; relative positions
    within a segment are those within the row, so that positions are taken, for seqio's sake, and
    not needed.

    Attributes:
      config: the model's shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dst_optax.finetuning.models import t5
      >>> model = t5.Transformer(t5.CONFIGS["tiny"])
      >>> inputs, targets = jnp.ones((2, 5), int), jnp.ones((2, 3), int)
      >>> params = model.init(jax.random.key(0), inputs, targets, targets)["params"]
      >>> model.apply({"params": params}, inputs, targets, targets, enable_dropout=False).shape
      (2, 3, 384)
    """

    config: T5Config

    def setup(self):
        """Makes the embedding, which inputs, targets and perhaps logits share."""
        cfg = self.config
        self.token_embedder = nn.Embed(
            cfg.vocab_size, cfg.emb_dim, dtype=cfg.dtype, embedding_init=nn.initializers.normal(1.0)
        )
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg, self.token_embedder)

    def __call__(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        encoder_positions: jax.Array | None = None,
        decoder_positions: jax.Array | None = None,
        *,
        enable_dropout: bool = True,
    ) -> jax.Array:
        """Logits of the targets, given the inputs and the targets before.

        Args:
          encoder_input_tokens: int, ``(batch, inputs)``.
          decoder_input_tokens: int, ``(batch, targets)``: the targets, one to the right.
          decoder_target_tokens: int, ``(batch, targets)``; only tells what is padding.
          encoder_segment_ids: int, ``(batch, inputs)``, for packed examples.
          decoder_segment_ids: int, ``(batch, targets)``, for packed examples.
          encoder_positions: not needed.
          decoder_positions: not needed.
          enable_dropout: whether to drop activations, with the random key ``dropout``.

        Returns:
          float32, ``(batch, targets, vocab_size)``.
        """
        del encoder_positions, decoder_positions
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout=enable_dropout)
        targets, inputs = decoder_target_tokens > 0, self._attended(encoder_input_tokens)
        mask = _pairs(targets, targets, decoder_segment_ids, decoder_segment_ids)
        return self.decoder(
            self._embed(decoder_input_tokens),
            encoded,
            mask & jnp.tri(targets.shape[1], dtype=bool),
            _pairs(targets, inputs, decoder_segment_ids, encoder_segment_ids),
            deterministic=not enable_dropout,
        )

    def encode(
        self,
        encoder_input_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        *,
        enable_dropout: bool = False,
    ) -> jax.Array:
        """Encodes tokens ``(batch, inputs)`` as ``(batch, inputs, emb_dim)``.

        If the parameters hold a ``prompt``, ``(length, emb_dim)``, the inputs begin with it.
        """
        x, prompt = self._embed(encoder_input_tokens), self._prompt()
        if prompt.shape[0] and encoder_segment_ids is not None:
            raise ValueError("a soft prompt belongs to one example; packed inputs cannot have one.")
        x = jnp.concatenate([jnp.broadcast_to(prompt, (x.shape[0], *prompt.shape)), x], axis=1)
        real = self._attended(encoder_input_tokens)
        mask = _pairs(real, real, encoder_segment_ids, encoder_segment_ids)
        return self.encoder(x, mask, deterministic=not enable_dropout)

    def decode_step(
        self,
        encoded: jax.Array,
        encoder_input_tokens: jax.Array,
        tokens: jax.Array,
        position: jax.Array,
        decode_length: int,
    ) -> jax.Array:
        """Logits of the next token; the collections ``cache`` and ``memory`` remember the ones before.

        Args:
          encoded: what :meth:`encode` returned.
          encoder_input_tokens: int, ``(batch, inputs)``; only tells what is padding.
          tokens: int, ``(batch,)``: the last tokens.
          position: int, ``()``: where they stand.
          decode_length: positions that there will be.

        Returns:
          float32, ``(batch, vocab_size)``.
        """
        logits = self.decoder(
            self._embed(tokens[:, None]),
            encoded,
            jnp.arange(decode_length) <= position,
            self._attended(encoder_input_tokens)[:, None, None, :],
            position,
            deterministic=True,
            decode_length=decode_length,
        )
        return logits[:, 0]

    def _prompt(self) -> jax.Array:
        """The soft prompt, ``(length, emb_dim)``: empty, unless the parameters hold one."""
        if not self.has_variable("params", "prompt"):
            return jnp.zeros((0, self.config.emb_dim), self.config.dtype)
        return self.get_variable("params", "prompt").astype(self.config.dtype)

    def _attended(self, encoder_input_tokens: jax.Array) -> jax.Array:
        """What there is to attend to, ``(batch, prompt + inputs)``: all but padding."""
        real = encoder_input_tokens > 0
        prompt = jnp.ones((real.shape[0], self._prompt().shape[0]), bool)
        return jnp.concatenate([prompt, real], axis=1)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return with_logical_constraint(self.token_embedder(tokens), ("batch", "length", "embed"))


def _pairs(
    queries: jax.Array, keys: jax.Array, query_ids: jax.Array | None, key_ids: jax.Array | None
) -> jax.Array:
    """Mask ``(batch, 1, queries, keys)`` of the pairs that are real and of the same segment."""
    mask = queries[:, :, None] & keys[:, None, :]
    if query_ids is not None and key_ids is not None:
        mask &= query_ids[:, :, None] == key_ids[:, None, :]
    return mask[:, None]


def _stack(
    layer: Any, config: T5Config, length: int, name: str, **attributes: Any
) -> Callable[..., jax.Array]:
    """``length`` layers that follow each other, or one stacked layer that is scanned."""
    if config.remat:
        layer = nn.remat(layer, prevent_cse=not config.scan_layers)
    if config.scan_layers:
        scanned = nn.scan(
            layer,
            variable_axes={"params": 1, "cache": 0, "memory": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]: flax declares it as int
            length=length,
        )
        layers = [scanned(config, name=name, **attributes)]
    else:
        layers = [layer(config, name=f"layers_{i}", **attributes) for i in range(length)]

    def apply(x: jax.Array, *args: Any) -> jax.Array:
        for layer in layers:
            x, _ = layer(x, *args)
        return x

    return apply


def _residual(config: T5Config, deterministic: bool, x: jax.Array, y: jax.Array) -> jax.Array:
    x = x + _dropout(config, deterministic)(y)
    return with_logical_constraint(x, ("batch", "length", "embed"))


def _dense(features: int, config: T5Config, init: nn.initializers.Initializer, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=config.dtype, kernel_init=init, name=name)


def _norm(config: T5Config, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=config.dtype, name=name)


def _dropout(config: T5Config, deterministic: bool) -> nn.Dropout:
    """Dropout with one mask for all positions, as T5 has it."""
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,), deterministic=deterministic)


def _scaled(init: nn.initializers.Initializer, factor: float) -> nn.initializers.Initializer:
    return lambda *args, **kwargs: init(*args, **kwargs) * factor
