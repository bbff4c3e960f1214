"""Who is compared."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from tests.benchmarks.speed.architecture import Architecture, Contender
from tests.benchmarks.speed.ours import Floor, compiled, ours, recipe
from tests.benchmarks.speed.peers import nflows, normflows, pyro_alone, torchflows, zuko
from tests.benchmarks.speed.worker import FLOWJAX

#: All others are compared with this one.
REFERENCE = "zuko"
#: Those that are built in this process.
CONTENDERS: dict[str, Callable[[Architecture], Contender]] = {
    "pyroflows": ours,
    "pyroflows compiled": compiled,
    "pyroflows recipe": recipe,
    "zuko": zuko,
    "Pyro": pyro_alone,
    "nflows": nflows,
    "normflows": normflows,
    "torchflows": torchflows,
    "floor": Floor,
}
#: In the order of the table's columns; flowjax has a process of its own.
NAMES = [*list(CONTENDERS)[:-1], "flowjax (jit)", "floor"]
#: What is compared on a GPU, where nothing but zuko has been built for.
ON_GPU = ["pyroflows", "pyroflows compiled", "pyroflows recipe", "zuko", "floor"]
#: Whose flows are distributions of Pyro.
OF_PYRO = ("pyroflows", "pyroflows compiled", "pyroflows recipe", "zuko", "Pyro", "flowjax (jit)")


def is_installed(name: str) -> bool:
    if name == "flowjax (jit)":
        return FLOWJAX.exists()
    is_package = name in ("zuko", "nflows", "normflows", "torchflows")
    return not is_package or importlib.util.find_spec(name) is not None
