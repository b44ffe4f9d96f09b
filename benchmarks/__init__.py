"""Measurements of qat_compat against other ways to the same state, each a ratio within one run."""
