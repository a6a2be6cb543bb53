"""The application's tests need the extra ``finetuning``: seqio, TensorFlow, gin."""

import importlib.util

NEEDED = ("clu", "flax", "gin", "seqio", "tensorflow")
missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
collect_ignore_glob = ["*"] if missing else []


def pytest_report_header():
    return f"tests/finetuning passed over: {', '.join(missing)} missing" if missing else None
