"""The guard in conftest.py does fail the tests that it should."""

from pathlib import Path

import pytest
import torch

pytest_plugins = "pytester"

CULPRITS = [
    "torch.set_default_dtype(torch.float64)",
    "torch.set_default_device('meta')",
    "torch.set_grad_enabled(False)",
    "torch.distributions.Distribution.set_default_validate_args(False)",
    "pyro.settings.set(validate_infer=False)",
]


@pytest.mark.parametrize("culprit", CULPRITS)
def test_guard_fails_the_culprit_and_protects_the_next(
    pytester: pytest.Pytester, culprit: str
) -> None:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(
        f"""
        import pyro, torch
        def test_culprit():
            {culprit}
        def test_next():
            assert pyro.get_param_store().keys() == set()
            assert torch.randn(1).dtype == torch.float32
        """
    )
    pytester.runpytest_inprocess().assert_outcomes(passed=2, errors=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    done = pytester.runpytest_inprocess("--device", "cuda")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines("*--device: torch sees no GPU*")
