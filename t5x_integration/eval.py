"""``python -m t5x_integration.eval`` is ``python -m t5x.eval`` with today's packages."""

from t5x_integration.compat import run

if __name__ == "__main__":
    run("eval")
