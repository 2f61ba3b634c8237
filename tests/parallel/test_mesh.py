import re

import jax
import pytest

from camelid.errors import UserError
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), {"data": 1, "fsdp": 8, "tensor": 1}),
        (MeshConfig(tensor=2), {"data": 1, "fsdp": 4, "tensor": 2}),
        (MeshConfig(data=-1, fsdp=1, tensor=4), {"data": 2, "fsdp": 1, "tensor": 4}),
        (MeshConfig(data=2, fsdp=2, tensor=2), {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(config: MeshConfig, sizes: dict[str, int]):
    assert config.sizes(8) == sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(tensor=3), "does not fill 8 devices"),
        (MeshConfig(fsdp=2, tensor=2), "does not fill 8 devices\nChoose sizes whose product is 8"),
        (MeshConfig(tensor=0), "is not a mesh"),
        (MeshConfig(tensor=-2), "is not a mesh"),
        (MeshConfig(tensor="2"), "is not a mesh"),  # pyright: ignore[reportArgumentType]
        (MeshConfig(tensor=2.0), "is not a mesh"),  # pyright: ignore[reportArgumentType]
        (MeshConfig(data=True), "is not a mesh"),
        (
            MeshConfig(fsdp=4, tensor=4),
            "mesh data 1 x fsdp 4 x tensor 4 needs 16 devices; 8 are available\nChoose sizes whose product is 8, or ",
        ),
        (MeshConfig(tensor=9), "mesh data 1 x fsdp -1 x tensor 9 needs 9 devices; 8 are available"),
        (MeshConfig(data=-1), "one axis may be -1"),
    ],
)
def test_sizes_that_make_no_mesh_are_refused(config: MeshConfig, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        config.sizes(8)


def test_a_mesh_for_two_on_one_device_is_refused():
    with pytest.raises(UserError, match="mesh data 1 x fsdp 2 x tensor 1 needs 2 devices; 1 is available"):
        MeshConfig(fsdp=2).sizes(1)


def test_a_mesh_has_every_device_once():
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sorted(device.id for device in mesh.devices.flat) == [device.id for device in jax.devices()]


def test_one_device_is_the_first():
    assert list(one_device().devices.flat) == jax.devices()[:1]
