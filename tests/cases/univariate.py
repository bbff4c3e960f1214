"""Univariate maps with an inverse in closed form, and their flows."""

from __future__ import annotations

from tests.cases.table import Case

CASES: list[Case] = []
ELSEWHERE: dict[str, str] = {}
