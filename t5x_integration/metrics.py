"""Numbers about the subset in T5X's logs."""

from typing import Any

import jax
from t5x import metrics, trainer  # pyright: ignore[reportMissingImports]

from dst_optax import diagnostics


class WeightMetricsComputer(trainer.WeightMetricsComputer):
    """Logs ``dst/...`` at every step: subset size, budget, churn, and each silo's threshold.

    Bind it as ``trainer.Trainer.weight_metrics_computer``. The names are those of
    :func:`dst_optax.diagnostics.metrics`; silos are told apart under
    :func:`t5x_integration.optimizers.dynamic_subset_tuning`.
    """

    def compute_metrics(
        self, gradients: Any, old_train_state: Any, new_train_state: Any
    ) -> dict[str, metrics.AveragePerStep]:
        """See the base class, whose own metrics are left out."""
        del gradients
        optimizer = new_train_state._optimizer
        plan_of = getattr(optimizer.optimizer_def, "plan", None)
        values: dict[str, jax.Array] = diagnostics.metrics(
            optimizer.state,
            new_train_state.params,
            previous=old_train_state.params,
            plan=plan_of(new_train_state.params) if plan_of else None,
        )
        return {f"dst/{name}": metrics.AveragePerStep.from_model_output(x) for name, x in values.items()}
