"""Dynamic Subset Tuning inside T5X: the only package here that imports t5x."""
