"""Optimizers that gin can spell."""

import math

import optax


def clipped(optimizer: optax.GradientTransformation, max_norm: float = 1.0) -> optax.GradientTransformation:
    """An optimizer that sees gradients of bounded global norm.

    Args:
      optimizer: any optax optimizer.
      max_norm: bound.

    Returns:
      ``optax.chain(optax.clip_by_global_norm(max_norm), optimizer)``.

    Example:
      >>> import optax
      >>> tx = clipped(optax.sgd(1.0), max_norm=0.5)
    """
    return optax.chain(optax.clip_by_global_norm(max_norm), optimizer)


def warmup_constant(peak: float, warmup: int) -> optax.Schedule:
    """A learning rate that rises linearly and then stays.

    Args:
      peak: where it stays.
      warmup: steps until then; with 0 it is the peak from the first step on.

    Raises:
      ValueError: a negative number of steps, or a peak that is not finite and positive.

    Example:
      >>> [float(warmup_constant(1.0, warmup)(0)) for warmup in (0, 4)]
      [1.0, 0.0]
    """
    _check(peak, warmup)
    if not warmup:  # optax's schedule would stay at its initial value for ever
        return optax.constant_schedule(peak)
    return optax.warmup_constant_schedule(0.0, peak, warmup)


def decayed(
    learning_rate: float,
    steps: int,
    warmup: int = 50,
    direction: optax.GradientTransformation | None = None,
    weight_decay: float = 0.0,
    delay: int = 0,
) -> optax.GradientTransformation:
    """A clipped optimizer whose learning rate warms up, then falls like a cosine; what sweeps compare with.

    The learning rate is part of the state, so that the programs of a grid are the same: where jax keeps
    compiled programs (``jax_compilation_cache_dir``), the first one compiles for all.

    Args:
      learning_rate: its peak.
      steps: until it is 0.
      warmup: steps until its peak.
      direction: what the learning rate scales, e.g. ``optax.scale_by_lion()``; None is Adam with a ``b2`` of
        0.98.
      weight_decay: share of every parameter that a step at a learning rate of 1 takes off.
      delay: steps before the warm-up in which ``direction`` collects its moments and nothing moves.

    Raises:
      ValueError: the delay or the warm-up is negative, both together are no shorter than the run, or the
        learning rate is not finite and positive.

    Example:
      >>> tx = decayed(1e-3, steps=300)
    """
    _check(learning_rate, warmup)
    _check(learning_rate, delay, "delay")
    if delay + warmup >= steps:
        names, before = ("delay and warmup", f"{delay} and {warmup}") if delay else ("warmup", warmup)
        raise ValueError(f"{names}: {before} steps, but the run has only {steps}; make it shorter.")
    moving = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps - delay)
    shape = optax.join_schedules([optax.constant_schedule(0.0), moving], [delay])
    peak = optax.inject_hyperparams(optax.scale)(step_size=-learning_rate)
    return clipped(
        optax.chain(
            direction or optax.scale_by_adam(b2=0.98),
            optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
            optax.scale_by_schedule(shape),
            peak,
        )
    )


def _check(peak: float | None, steps: int | None, name: str = "warmup") -> None:
    if steps is None or steps < 0:
        raise ValueError(f"{name}: got {steps} steps; it must be 0 or more.")
    if peak is None or not 0 < peak < math.inf:
        raise ValueError(f"the learning rate is {peak}; it must be finite and above 0.")
