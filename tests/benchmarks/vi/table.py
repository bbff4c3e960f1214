"""All posteriors of the benchmark, by name."""

from __future__ import annotations

from tests.benchmarks.vi import asides, models, nasty

TABLES = {
    "posteriordb": models.POSTERIORS,
    "asides": asides.POSTERIORS,
    "nasty": nasty.POSTERIORS,
}
GROUPS = {group: [posterior.name for posterior in table] for group, table in TABLES.items()}
POSTERIORS = {posterior.name: posterior for table in TABLES.values() for posterior in table}
