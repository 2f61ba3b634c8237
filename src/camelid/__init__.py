"""camelid: the Llama family end to end in JAX."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from camelid.api import Completion, Model, load
    from camelid.errors import UserError
    from camelid.model.config import Compute, ModelConfig
    from camelid.parallel.mesh import MeshConfig

__all__ = ["Completion", "Compute", "MeshConfig", "Model", "ModelConfig", "UserError", "load"]

_WHERE = {
    "Completion": "api",
    "Compute": "model.config",
    "MeshConfig": "parallel.mesh",
    "Model": "api",
    "ModelConfig": "model.config",
    "UserError": "errors",
    "load": "api",
}


# PEP 562: `import camelid` must not pay for JAX; `camelid --help` answers at once.
def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("camelid")
    if name not in _WHERE:
        raise AttributeError(f"module 'camelid' has no attribute {name!r}")
    return getattr(import_module(f"camelid.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
