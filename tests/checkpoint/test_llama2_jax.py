"""llama-2-jax's pickles: the real one is read, what is written opens in Python's pickle, and nothing is ever run."""

import os
import pickle
import random
import struct
import subprocess
import sys
import types
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import camelid
from camelid.api import load_params
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec
from camelid.checkpoint.formats import hf, llama2_jax, llama2_jax_pickle
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.formats.llama2_jax_pickle import read_pickle
from camelid.checkpoint.registry import open_checkpoint
from camelid.checkpoint.tensors import Tensor, dtype_named
from camelid.errors import UserError
from camelid.model.config import ComputeConfig
from camelid.model.decoder import Decoder
from camelid.model.params import named
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from families import FAMILIES
from runs import TIMEOUT_S, tensor_bytes
from tiny import save_hf, tiny_config, tiny_params, to_transformers, transformers_twin
from writing import put

CONFIGS = {
    "grouped queries, untied": tiny_config(),
    "grouped queries, tied": tiny_config(tie_embeddings=True),
    "every head its own keys, untied": tiny_config(num_kv_heads=6),
    "one key head for all, tied": tiny_config(num_kv_heads=1, tie_embeddings=True),
}
CLASSES = {
    "lib.llama.llama": ("Llama", "model lm_head"),
    "lib.llama.llama_model": ("LlamaModel", "embedding decoder norm"),
    "lib.llama.decoder_block": (
        "DecoderBlock",
        "input_norm attention post_attn_norm gate_proj up_proj down_proj",
    ),
    "lib.llama.attention": ("Attention", "q_proj k_proj v_proj out_proj"),
}
# A process that has nothing of llama-2-jax but classes of the same names.
STAND_IN = f"""
import pickle, sys, types
from collections import namedtuple
import numpy as np
for name in ("lib", "lib.llama"):
    sys.modules[name] = types.ModuleType(name)
for module, (name, fields) in {CLASSES!r}.items():
    sys.modules[module] = types.ModuleType(module)
    setattr(sys.modules[module], name, namedtuple(name, fields, module=module))

def leaves(node, path=()):
    if not isinstance(node, tuple):
        return {{".".join(path): node}}
    found = {{}}
    for field in node._fields:
        found |= leaves(getattr(node, field), (*path, field))
    return found

for source, target in zip(sys.argv[1::2], sys.argv[2::2]):
    with open(source, "rb") as file:
        found = leaves(pickle.load(file))
    import jax
    assert all(isinstance(x, jax.Array) and not x.weak_type for x in found.values())
    arrays = {{name: np.asarray(x) for name, x in found.items()}}
    np.savez(target, **{{f"{{name}} {{x.dtype}}": x.view(f"u{{x.itemsize}}") for name, x in arrays.items()}})
"""


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> camelid.ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The classes of llama-2-jax, where a pickler finds them."""
    made = {}
    for name in ("lib", "lib.llama", *CLASSES):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        if name in CLASSES:
            cls, fields = CLASSES[name]
            made[cls] = namedtuple(cls, fields, module=name)
            setattr(module, cls, made[cls])
    return made


def export(checkpoint: Checkpoint, dtype: str | None = None) -> ExportSpec:
    dtypes = {path: dtype_named(dtype or own.name) for path, own in checkpoint.dtypes.items()}
    return ExportSpec(checkpoint.config, dtypes, checkpoint.read_slice, checkpoint.companions)


def params_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in named(load_params(checkpoint, ComputeConfig(), one_device())).items()}


def convert_llama(config: camelid.ModelConfig, params: Decoder) -> dict[str, np.ndarray]:
    """The arrays that llama-2-jax's converter makes of Hugging Face's, written down once more."""
    tensors = to_transformers(params)
    N, M, R, H = config.num_layers, config.embed_dim, config.num_heads // config.num_kv_heads, config.num_kv_heads

    def stacked(name: str, shape: tuple[int, ...]) -> np.ndarray:
        weights = [tensors[f"model.layers.{layer}.{name}.weight"] for layer in range(N)]
        heads = [w.reshape(M, -1) if "o_proj" in name else w.reshape(-1, w.shape[-1]) for w in weights]
        return np.stack([w.T.reshape(shape) for w in heads])

    def norms(name: str) -> np.ndarray:
        return np.stack([tensors[f"model.layers.{layer}.{name}.weight"] for layer in range(N)])

    embedding = tensors["model.embed_tokens.weight"]
    layer = {
        "input_norm": norms("input_layernorm"),
        "attention.q_proj": stacked("self_attn.q_proj", (M, R, H, -1)),
        "attention.k_proj": stacked("self_attn.k_proj", (M, H, -1)),
        "attention.v_proj": stacked("self_attn.v_proj", (M, H, -1)),
        "attention.out_proj": stacked("self_attn.o_proj", (R, H, -1, M)),
        "post_attn_norm": norms("post_attention_layernorm"),
        "gate_proj": stacked("mlp.gate_proj", (M, -1)),
        "up_proj": stacked("mlp.up_proj", (M, -1)),
        "down_proj": stacked("mlp.down_proj", (-1, M)),
    }
    return {
        "model.embedding": embedding,
        **{f"model.decoder.{name}": array for name, array in layer.items()},
        "model.norm": tensors["model.norm.weight"],
        "lm_head": np.ascontiguousarray(tensors.get("lm_head.weight", embedding).T),
    }


def nested(arrays: dict[str, Any], classes: dict[str, Any], path: tuple[str, ...] = (), name: str = "Llama") -> Any:
    inner = {"model": "LlamaModel", "decoder": "DecoderBlock", "attention": "Attention"}
    values = [
        nested(arrays, classes, (*path, field), inner[field]) if field in inner else arrays[".".join((*path, field))]
        for field in classes[name]._fields
    ]
    return classes[name](*values)


def pickled(
    config: camelid.ModelConfig,
    classes: dict[str, Any],
    make: Callable[[np.ndarray], Any] = jnp.asarray,
    **options: Any,
) -> bytes:
    arrays = {name: make(array) for name, array in convert_llama(config, tiny_params(config)).items()}
    return pickle.dumps(nested(arrays, classes), **options)


def written(config: camelid.ModelConfig, folder: Path, dtype: str) -> tuple[Path, Path]:
    """A Hugging Face folder, and the same as a pickle in another."""
    theirs = save_hf(transformers_twin(config, tiny_params(config)), folder / "hf")
    for name in ("first", "file"):
        (folder / name).mkdir()
    put(folder / "first", hf.plan_files, export(open_checkpoint(theirs), dtype))
    put(folder / "file", llama2_jax.plan_files, export(open_checkpoint(folder / "first")))
    return folder / "first", folder / "file"


def raw(tensor: Tensor) -> bytes:
    size = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
    return tensor.file.read_bytes()[tensor.offset : tensor.offset + size]


# The real one ---------------------------------------------------------------------------


@pytest.fixture
def golden(assets: Path) -> Path:
    return assets / "golden" / "llama2_jax" / "stories260K.pickle"


def test_the_real_file_gives_the_reference_logits(golden: Path, stories: Path):
    """It holds two query heads a key head: in the order of its own attention they would be far off."""
    checkpoint = llama2_jax.open_checkpoint(golden, read_model_config(stories))
    arrays = np.load(stories.parent / "reference.npz")
    params = load_params(checkpoint, ComputeConfig(), one_device())
    model = camelid.Model(checkpoint.config, params, None, ComputeConfig(), one_device())
    for i in range(3):
        logits = model.logits(arrays[f"prompt{i}_ids"][None])
        np.testing.assert_allclose(logits[0], arrays[f"prompt{i}_logits"], rtol=0, atol=1e-4)
    assert [note.split(" ")[0] for note in checkpoint.notes] == ["norm_eps", "heads"]


def test_the_real_model_is_written_with_the_arrays_of_the_real_file(golden: Path, stories: Path, tmp_path: Path):
    put(tmp_path, llama2_jax.plan_files, export(open_checkpoint(stories)))
    ours, theirs = (
        read_pickle(path, [rule.name for rule in llama2_jax.RULES]) for path in (tmp_path / "model.pickle", golden)
    )
    for name, tensor in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (tensor.shape, tensor.dtype), name
        assert raw(ours[name]) == raw(tensor), name
    assert [llama2_jax.matches(path) for path in (golden, tmp_path, stories)] == [True, True, False]
    assert (tmp_path / "tokenizer.json").read_bytes() == (stories / "tokenizer.json").read_bytes()


# Both ways ------------------------------------------------------------------------------

MAKES: dict[str, tuple[Callable[[np.ndarray], Any], int]] = {
    "jax arrays": (jnp.asarray, 4),
    "jax arrays, latest protocol": (jnp.asarray, 5),
    "numpy arrays, as after device_get": (np.asarray, 4),
    "bfloat16": (lambda x: jnp.asarray(x, jnp.bfloat16), 4),
    "float16": (lambda x: jnp.asarray(x, jnp.float16), 4),
    "some in Fortran's order": (lambda x: np.asfortranarray(x) if x.ndim < 5 else x, 4),
}


@pytest.mark.parametrize("make", MAKES)
def test_what_llama_2_jax_pickles_is_read(config: camelid.ModelConfig, tmp_path: Path, classes: Any, make: str):
    kind, protocol = MAKES[make]
    path = tmp_path / "llama2-7B.pickle"
    path.write_bytes(pickled(config, classes, kind, protocol=protocol))
    checkpoint = llama2_jax.open_checkpoint(tmp_path, config)
    assert llama2_jax.matches(path)
    assert checkpoint.config == config
    opened = params_of(checkpoint)
    for name, array in named(tiny_params(config)).items():
        expected = np.asarray(np.asarray(kind(np.asarray(array))), np.float32)
        np.testing.assert_array_equal(opened[name], expected, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_again_is_exact(config: camelid.ModelConfig, tmp_path: Path, dtype: str):
    first, file = written(config, tmp_path, dtype)
    again = llama2_jax.open_checkpoint(file)
    assert again.config == config
    (tmp_path / "back").mkdir()
    put(tmp_path / "back", hf.plan_files, export(again))
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(first)


def test_small_pieces_make_the_same_file(config: camelid.ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, file = written(config, tmp_path, "bfloat16")
    monkeypatch.setattr("camelid.checkpoint.layout.CHUNK_BYTES", 700)
    monkeypatch.setattr("camelid.checkpoint.tensors.COMPARED_BYTES", 10)
    (tmp_path / "pieces").mkdir()
    put(tmp_path / "pieces", llama2_jax.plan_files, export(open_checkpoint(first)))
    assert (tmp_path / "pieces" / "model.pickle").read_bytes() == (file / "model.pickle").read_bytes()
    llama2_jax.open_checkpoint(file)


def test_a_process_with_nothing_but_classes_of_the_same_names_unpickles_it(tmp_path: Path, user_env: dict[str, str]):
    arguments, expected = [], []
    for number, (config, dtype) in enumerate(zip(CONFIGS.values(), ("float32", "bfloat16") * 2, strict=True)):
        (tmp_path / str(number)).mkdir()
        _, file = written(config, tmp_path / str(number), dtype)
        arguments += [str(file / "model.pickle"), str(tmp_path / f"{number}.npz")]
        kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(np.float32)
        arrays = convert_llama(config, tiny_params(config)).items()
        expected.append({f"{name} {dtype}": array.astype(kind).view(f"u{kind.itemsize}") for name, array in arrays})
    subprocess.run([sys.executable, "-c", STAND_IN, *arguments], env=user_env, check=True, timeout=TIMEOUT_S)
    for target, arrays in zip(arguments[1::2], expected, strict=True):
        found = np.load(target)
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_devices_read_their_heads_of_a_model_without_groups(tmp_path: Path, classes: Any):
    config = tiny_config(num_kv_heads=6, vocab_size=96)
    (tmp_path / "a.pickle").write_bytes(pickled(config, classes))
    checkpoint = llama2_jax.open_checkpoint(tmp_path, config)
    mesh = make_mesh(MeshConfig(tensor=2))
    sharded = named(load_params(checkpoint, ComputeConfig(), mesh))
    for name, array in named(tiny_params(config)).items():
        np.testing.assert_array_equal(sharded[name], array, err_msg=name)


# Refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "about"),
    [
        (FAMILIES["gemma"].ours, "norm_offset"),
        (tiny_config(rope_theta=500.0), "rope_theta = 500.0"),
        (tiny_config(sliding_window=7), "sliding_window = 7"),
        (tiny_config(qkv_bias=True), "qkv_bias = True"),
    ],
)
def test_what_llama_2_jax_cannot_compute_is_not_written(tmp_path: Path, model: camelid.ModelConfig, about: str):
    with pytest.raises(UserError, match=f"llama-2-jax cannot hold {about}"):
        put(tmp_path, llama2_jax.plan_files, ExportSpec(model, {}, lambda *_: np.empty(0)))
    assert not list(tmp_path.iterdir())


def test_the_model_must_be_known_and_must_be_this_one(tmp_path: Path, classes: Any):
    config = CONFIGS["grouped queries, untied"]
    path = tmp_path / "a.pickle"
    path.write_bytes(pickled(config, classes))
    with pytest.raises(UserError, match=r"q_proj \(4, 48, 3, 2, 10\).*\n.*--config"):
        llama2_jax.open_checkpoint(path)
    with pytest.raises(UserError, match=r"q_proj .* asks for \(2, 3\) query heads"):
        llama2_jax.open_checkpoint(path, tiny_config(num_kv_heads=3))
    with pytest.raises(UserError, match=r"gate_proj has shape \(4, 48, 80\)"):
        llama2_jax.open_checkpoint(path, tiny_config(mlp_dim=81))
    with pytest.raises(UserError, match=r"lm_head differs from it"):
        llama2_jax.open_checkpoint(path, tiny_config(tie_embeddings=True))


def test_a_folder_must_hold_one(tmp_path: Path, classes: Any):
    (tmp_path / "c.pickle").write_bytes(pickle.dumps([1, 2, 3]))
    with pytest.raises(UserError, match="and has none"):
        llama2_jax.open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is not a file"):
        llama2_jax.open_checkpoint(tmp_path / "none.pickle")
    for name in ("a.pickle", "b.pickle"):
        (tmp_path / name).write_bytes(pickled(tiny_config(), classes))
    with pytest.raises(UserError, match=r"has a\.pickle, b\.pickle"):
        llama2_jax.open_checkpoint(tmp_path)


class Call:
    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def test_a_file_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path, classes: Any):
    marker, path = tmp_path / "ran", tmp_path / "a.pickle"
    trap = lambda array: Call(os.system, f"touch {marker}") if array.ndim == 5 else array  # noqa: E731
    path.write_bytes(pickled(tiny_config(), classes, trap))
    with pytest.raises(UserError, match=r"would call posix\.system "):
        llama2_jax.open_checkpoint(path, tiny_config())
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


DTYPE = text("numpy") + text("dtype") + b"\x93"
DEEP = b")" + b"\x85" * 50_000
BAD = {
    "empty": (b"", "exhausted"),
    "no pickle": (b"hello", "damaged"),
    "nothing but a number": (b"\x80\x04K\x01.", "is not an array"),
    "an array of 2**60 bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc.", "announced"),
    "text of 2**60 bytes": (b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"abc.", "announced"),
    "a long program": (b"\x80\x04" + b"N" * 2**17 + b".", "besides its arrays"),
    "a long line": (b"\x80\x04c" + b"N" * 2**17 + b"\n.", "no newline"),
    "a dtype that is a deep tuple": (b"\x80\x04" + DTYPE + b"(" + DEEP + b"\x89\x88tR.", "an array is strange"),
    "another dtype": (b"\x80\x04" + DTYPE + b"(" + text("f8") + b"\x89\x88tR.", "an array is f8"),
    "big-endian": (
        b"\x80\x04" + DTYPE + b"(" + text("f4") + b"\x89\x88tR(K\x03" + text(">") + b"NNNtb.",
        "an array is big-endian",
    ),
    "a call of a tuple": (b"\x80\x04))R.", "TypeError"),
    "too few values": (b"\x80\x04" + text("lib.llama.llama") + text("Llama") + b"\x93)\x81.", "ValueError"),
    "bytes after the end": (b"\x80\x04K\x01.more", "4 bytes after its end"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused(tmp_path: Path, case: str):
    content, about = BAD[case]
    path = tmp_path / "a.pickle"
    path.write_bytes(content)
    with pytest.raises(UserError, match=about) as refusal:
        llama2_jax.open_checkpoint(path, tiny_config())
    assert str(path) in refusal.value.problem
    assert len(refusal.value.problem) < 600


def test_arrays_must_have_the_bytes_of_their_shape_and_every_place_one(tmp_path: Path, classes: Any):
    path, content = tmp_path / "a.pickle", pickled(tiny_config(), classes)
    path.write_bytes(content.replace(b"K\x04K\x30K\x50\x87", b"K\x04K\x30K\x51\x87", 1))
    with pytest.raises(UserError, match=r"an array of shape \(4, 48, 81\) and float32 with"):
        llama2_jax.open_checkpoint(path, tiny_config())
    path.write_bytes(pickled(tiny_config(), classes, lambda x: None if x.ndim == 5 else x))
    with pytest.raises(UserError, match="q_proj is not an array"):
        llama2_jax.open_checkpoint(path, tiny_config())


def test_arrays_stay_in_the_file(tmp_path: Path, classes: Any, monkeypatch: pytest.MonkeyPatch):
    """What is read to open a file is a small part of it."""
    path, read = tmp_path / "a.pickle", []
    path.write_bytes(pickled(tiny_config(), classes))
    counted = llama2_jax_pickle.Program._counted
    monkeypatch.setattr(
        llama2_jax_pickle.Program, "_counted", lambda self, held: read.append(len(held)) or counted(self, held)
    )
    llama2_jax.open_checkpoint(path, tiny_config())
    assert 0 < sum(read) < 8000 < path.stat().st_size / 20


def test_random_damage_is_noticed_or_harmless(tmp_path: Path, classes: Any):
    draw, path, config = random.Random(0), tmp_path / "a.pickle", tiny_config(num_layers=1, mlp_dim=8, vocab_size=5)
    content = pickled(config, classes)
    spans = [
        (tensor.offset, tensor.offset + len(raw(tensor)))
        for tensor in read_pickle(_put(path, content), [rule.name for rule in llama2_jax.RULES]).values()
    ]
    program = [i for i in range(len(content)) if not any(a <= i < b for a, b in spans)]
    for _ in range(250):
        held = bytearray(content[: draw.randrange(len(content))] if draw.random() < 0.2 else content)
        for _ in range(draw.randint(1, 3)):
            if (at := draw.choice(program)) < len(held):
                held[at] = draw.randrange(256)
        try:
            checkpoint = llama2_jax.open_checkpoint(_put(path, bytes(held)), config)
        except UserError:
            continue
        assert all(len(raw(tensor)) for tensor in checkpoint.tensors.values())


def _put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
