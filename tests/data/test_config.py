import subprocess
import sys
from pathlib import Path

import pytest

from camelid.data.config import DataConfig
from camelid.errors import UserError

GOOD = {"train": ("a.txt",), "sequence_length": 8, "batch_size": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ()}, "train names no file"),
        ({"validation": ("b.txt",), "validation_fraction": 0.1}, "both validation files and validation_fraction = 0.1"),
        ({"validation_fraction": 1.0}, "validation_fraction = 1.0"),
        ({"validation_fraction": -0.1}, "validation_fraction = -0.1"),
        ({"sequence_length": 0}, "sequence_length = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
    ],
)
def test_an_impossible_configuration_is_refused(change: dict, message: str):
    DataConfig(**GOOD)
    with pytest.raises(UserError, match=message):
        DataConfig(**GOOD | change)


def test_declaring_a_configuration_loads_no_numpy():
    code = "import sys, camelid.data.config; sys.exit('numpy' in sys.modules)"
    source = str(Path(__file__).parents[2] / "src")
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}, check=False).returncode == 0
