"""T5X where it is installed, else a stub of it, for what needs no more."""

import importlib.util
import sys
import warnings
from pathlib import Path

from t5x_integration.compat import make_importable

sys.path.insert(0, str(Path(__file__).parent))

if importlib.util.find_spec("flax") is None:
    pass  # the tests skip
elif importlib.util.find_spec("t5x") is None:
    import t5x_stub

    t5x_stub.install()
else:
    make_importable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # T5X and what it imports speak to other authors
        import t5x  # noqa: F401
