"""Dynamic Subset Tuning inside T5X: the only package here that imports t5x.

T5X names packages that are not on PyPI, or that have moved; importing this package puts what T5X needs
of them in their places.
"""

from t5x_integration.compat import make_importable

make_importable()
