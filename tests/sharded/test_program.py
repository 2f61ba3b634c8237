"""What the compiler makes of the rules: parameters are gathered layer by layer, tokens stay where they are."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from camelid.model.config import ComputeConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import abstract
from camelid.parallel.mesh import MeshConfig, make_mesh
from camelid.parallel.rules import COMPUTE, partition
from camelid.train.objective import NextTokenLoss
from camelid.train.optimizer import make_optimizer
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.schedules import learning_rate
from camelid.train.state import abstract_state
from camelid.train.step import TrainStep
from tiny import tiny_config

ROWS, LENGTH = 16, 64


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_no_device_gathers_the_activations_of_others(sizes):
    config = tiny_config(vocab_size=96, embed_dim=48, mlp_dim=80, num_heads=6, num_kv_heads=2, head_dim=10)
    mesh, specs, optimizer = make_mesh(MeshConfig(**sizes)), declare_decoder(config), OptimizerConfig()
    adam = make_optimizer(optimizer, 10, specs)
    step = TrainStep(
        NextTokenLoss(config=config, compute=ComputeConfig(dtype="bfloat16")), adam, learning_rate(optimizer, 10), 1.0
    )
    cut = NamedSharding(mesh, partition(("batch", "seq"), COMPUTE))
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32) | {"weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=cut) for name, dtype in dtypes.items()}
    with jax.set_mesh(mesh):
        state = abstract_state(abstract(specs, "float32", mesh), adam)
        program = jax.jit(step).lower(state, batch).compile()
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", program.as_text())
    assert gathered, "parameters are cut over fsdp, so some gathering is expected"
    tokens = {str(ROWS * LENGTH), str(ROWS)}
    assert not [shape for shape in gathered if tokens & set(shape.split(","))]
