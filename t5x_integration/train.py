"""``python -m t5x_integration.train`` is ``python -m t5x.train`` with today's packages."""

from t5x_integration.compat import run

if __name__ == "__main__":
    run("train")
