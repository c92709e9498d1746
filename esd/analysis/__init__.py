"""Analyses of a model, and of an erased one beside its base."""
