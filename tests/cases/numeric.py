"""Univariate maps whose inverse is a root, and their flows."""

from __future__ import annotations

from tests.cases.table import Case

CASES: list[Case] = []
ELSEWHERE: dict[str, str] = {}
