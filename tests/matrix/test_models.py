"""The compatibility matrix over our own models: `make test` runs the small one, `make matrix` the full one."""

from __future__ import annotations

from declared import DECLARED

MODELS = list(DECLARED.values())
