"""``python -m t5x_integration.infer`` is ``python -m t5x.infer`` with today's packages."""

from t5x_integration.compat import run

if __name__ == "__main__":
    run("infer")
