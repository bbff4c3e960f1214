"""flowjax, which lives in an environment of its own, timed in turn with the others."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.speed.architecture import BINS, BOUND, Architecture

#: The interpreter of an environment with flowjax, and flags that keep JAX to one thread.
FLOWJAX = Path(os.environ.get("FLOWJAX_PYTHON", "build/flowjax/bin/python"))
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class Worker:
    """A process with one flow at a time; it does nothing unless asked.

    With more threads than one it takes as many as there are cores.

    Attributes
    ----------
    parameters
        How many the flow has.
    gap
        How far its scores are from those that its draws were drawn with.
    seconds
        What building and compiling took.
    """

    def __init__(self, threads: int) -> None:
        flags = ONE_THREAD if threads == 1 else ""
        script = Path(__file__).with_name("flowjax_worker.py")
        self.process = subprocess.Popen(
            [str(FLOWJAX), "-W", "ignore", str(script)],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def build(self, a: Architecture, work: str, number: int, trained: bool) -> None:
        spec = {**asdict(a), "bins": BINS, "bound": BOUND}
        answer = self._ask(build={**spec, "work": work, "number": number, "trained": trained})
        self.parameters, self.gap = answer["parameters"], answer["gap"]
        self.seconds = answer["seconds"]

    def clock(self, repeats: int) -> tuple[float, float]:
        """Call so often; seconds of CPU and wall time a call."""
        cpu, wall = self._ask(time=repeats)
        return cpu, wall

    def close(self) -> None:
        self.process.communicate()

    def _ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"flowjax's process ended with {self.process.wait()}")
        return json.loads(line)
