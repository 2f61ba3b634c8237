"""camelid: the Llama family end to end in JAX.

The public API: `load` returns a `Model`, which `ComputeConfig`, `MeshConfig` and `ModelConfig` configure.
`Model.generate` returns `Completion`s, by the options of `GenerationConfig`. `Trainer` trains by a recipe and returns a
`TrainResult`; its callbacks receive `TrainEvent`s. Errors that a user can fix are raised as `UserError`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from camelid.api import Model, load
    from camelid.completion import Completion
    from camelid.errors import UserError
    from camelid.generate.config import GenerationConfig
    from camelid.model.config import ComputeConfig, ModelConfig
    from camelid.parallel.mesh import MeshConfig
    from camelid.train.callbacks import TrainEvent
    from camelid.trainer import Trainer, TrainResult

__all__ = [
    "Completion",
    "ComputeConfig",
    "GenerationConfig",
    "MeshConfig",
    "Model",
    "ModelConfig",
    "TrainEvent",
    "TrainResult",
    "Trainer",
    "UserError",
    "load",
]

_MODULES = {
    "Completion": "completion",
    "ComputeConfig": "model.config",
    "GenerationConfig": "generate.config",
    "MeshConfig": "parallel.mesh",
    "Model": "api",
    "ModelConfig": "model.config",
    "TrainEvent": "train.callbacks",
    "TrainResult": "trainer",
    "Trainer": "trainer",
    "UserError": "errors",
    "load": "api",
}


# Public names are imported on first use (PEP 562), so that `camelid --help` does not wait for the import of JAX.
def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("camelid")
    if name not in _MODULES:
        raise AttributeError(f"module 'camelid' has no attribute {name!r}")
    return getattr(import_module(f"camelid.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
