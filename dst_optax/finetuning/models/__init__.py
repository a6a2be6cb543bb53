"""Families of models behind one interface."""
