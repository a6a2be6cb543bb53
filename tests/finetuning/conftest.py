"""The application's tests, but those of T5, need the extra ``finetuning``: seqio, TensorFlow, gin."""

import importlib.util

NEEDED = ("clu", "flax", "gin", "seqio", "tensorflow")
missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
collect_ignore_glob = ["superglue", "test_*.py"] if missing else []


def pytest_report_header():
    return f"tests/finetuning passed over but for t5: {', '.join(missing)} missing" if missing else None
