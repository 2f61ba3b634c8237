"""Memory is what is in flight: parameters once when loading, a slice when converting."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runs import TIMEOUT_S

MEMORY = Path(__file__).parents[2] / "benchmarks" / "memory.py"
MB = 10**6


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the benchmark says of a checkpoint of 300 MB, whose largest tensor has 66 MB."""
    command = [sys.executable, MEMORY, "--bytes", "300e6", "--folder", tmp_path_factory.mktemp("memory")]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=TIMEOUT_S).stdout)


def test_loading_in_the_files_dtype_holds_the_model_once(report: dict):
    size = report["checkpoint"]["bytes"]
    assert 250 * MB < size < 350 * MB
    assert report["load"]["bytes"] == size
    assert size < report["load"]["peak_bytes"] < size + 500 * MB
    # Narrower, because a second copy of so small a model would go unseen in 500 MB.
    assert report["load"]["peak_bytes"] - report["load"]["imports_bytes"] < size + 150 * MB


def test_converting_with_a_cast_holds_no_tensor_whole(report: dict):
    assert report["convert"]["bytes"] > 2 * report["checkpoint"]["bytes"]
    assert report["convert"]["peak_bytes"] < 500 * MB
    # Four slices of 8 MiB are in flight; the largest tensor has 131 MB in float32.
    assert report["convert"]["peak_bytes"] - report["convert"]["imports_bytes"] < 120 * MB
