"""Hugging Face folders: what camelid reads is what transformers wrote, and the other way round."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import camelid
from camelid.checkpoint.convert import convert
from camelid.checkpoint.files import MANIFEST
from camelid.checkpoint.formats import hf
from camelid.checkpoint.registry import open_checkpoint
from camelid.errors import UserError
from camelid.model.params import named
from runs import contents, tensor_bytes
from tiny import LLAMA3, save_hf, tiny_config, tiny_params, tiny_tokens, to_transformers, transformers_twin

IDS = [1, 403, 407, 261, 378]
CONFIGS = {
    "untied": tiny_config(),
    "tied": tiny_config(tie_embeddings=True),
    "llama3": tiny_config(rope_scaling=LLAMA3, rope_theta=500_000.0, bos_id=3, eos_ids=(5, 7), pad_id=0),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> camelid.ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def theirs(config: camelid.ModelConfig, tmp_path: Path) -> Path:
    """A folder that transformers wrote."""
    return save_hf(transformers_twin(config, tiny_params(config)), tmp_path / "theirs")


def open_with_transformers(folder: Path) -> transformers.LlamaForCausalLM:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def config_dict(folder: Path) -> dict:
    """config.json as transformers understands it."""
    table = transformers.AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in table.items() if key not in ("_name_or_path", "transformers_version")}


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Reading --------------------------------------------------------------------------------


def test_parameters_are_those_that_transformers_wrote(config: camelid.ModelConfig, theirs: Path):
    model = camelid.load(theirs)
    assert model.config == config
    for path, array in named(tiny_params(config)).items():
        np.testing.assert_array_equal(named(model.params)[path], array, err_msg=path)


@pytest.mark.parametrize("name", ["hf_4layer", "hf_mha_untied"])
def test_logits_of_real_checkpoints_are_those_that_transformers_gave(assets: Path, name: str):
    folder = assets / "golden" / "hf_variants" / name
    reference = np.array(json.loads((folder / "logits.json").read_text())["logits"], np.float32)
    # Logits reach 20 and come from another order of float32 sums.
    logits = np.asarray(camelid.load(folder).logits(np.array([IDS])))
    np.testing.assert_allclose(logits.reshape(reference.shape), reference, atol=1e-4)


def test_every_dtype_is_rounded_as_torch_does(theirs: Path):
    tensors = load_file(theirs / "model.safetensors")
    for name in ("bfloat16", "float16"):
        params = to_transformers(camelid.load(theirs, dtype=name).params)
        for key, array in params.items():
            rounded = tensors[key].to(getattr(torch, name)).view(torch.int16).numpy()
            np.testing.assert_array_equal(array.view(np.int16).reshape(rounded.shape), rounded, err_msg=key)


def test_dtype_none_keeps_that_of_the_files(theirs: Path, tmp_path: Path):
    edit_tensors(theirs, lambda tensors: tensors.update({k: v.to(torch.float16) for k, v in tensors.items()}))
    model = camelid.load(theirs, dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float16")}
    assert model.compute.dtype == model.compute.param_dtype == "float16"
    edit_tensors(theirs, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}))
    with pytest.raises(UserError, match=r"several dtypes: float16, float32\n.*dtype"):
        camelid.load(theirs, dtype=None)


def test_a_tied_checkpoint_may_repeat_its_head(tmp_path: Path):
    config = CONFIGS["tied"]
    folder = save_hf(transformers_twin(config, tiny_params(config)), tmp_path / "theirs")
    before = camelid.load(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    after = camelid.load(folder)
    assert all(map(np.array_equal, jax.tree.leaves(before.params), jax.tree.leaves(after.params)))


@pytest.mark.parametrize("change", ["one value", "shape", "dtype"])
def test_a_tied_checkpoint_whose_head_differs_is_refused(tmp_path: Path, change: str):
    config = CONFIGS["tied"]
    folder = save_hf(transformers_twin(config, tiny_params(config)), tmp_path / "theirs")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["model.embed_tokens.weight"].clone()
        if change == "one value":
            head[-1, -1] += 1
        tensors["lm_head.weight"] = {"one value": head, "shape": head[1:].clone(), "dtype": head.half()}[change]

    edit_tensors(folder, add)
    with pytest.raises(UserError, match=r"lm_head\.weight differs.*\n.*tie_word_embeddings"):
        camelid.load(folder)


def test_buffers_of_old_checkpoints_are_ignored(theirs: Path, config: camelid.ModelConfig):
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.num_layers)]
    edit_tensors(theirs, lambda tensors: tensors.update({name: torch.ones(5) for name in names}))
    model = camelid.load(theirs)
    assert all(map(np.array_equal, jax.tree.leaves(model.params), jax.tree.leaves(tiny_params(config))))


# Writing --------------------------------------------------------------------------------


def test_transformers_opens_what_camelid_saves_with_the_same_parameters_and_config(
    config: camelid.ModelConfig, theirs: Path, tmp_path: Path
):
    camelid.load(theirs).save(tmp_path / "ours")
    assert tensor_bytes(tmp_path / "ours") == tensor_bytes(theirs)
    assert config_dict(tmp_path / "ours") == config_dict(theirs)
    state = open_with_transformers(tmp_path / "ours").state_dict()
    for name, array in to_transformers(tiny_params(config)).items():
        np.testing.assert_array_equal(state[name].numpy(), array.reshape(state[name].shape), err_msg=name)


def test_save_of_load_of_a_real_model_is_the_model_itself(stories: Path, tmp_path: Path):
    model = camelid.load(stories)
    model.save(tmp_path / "ours")
    assert tensor_bytes(tmp_path / "ours") == tensor_bytes(stories)
    assert config_dict(tmp_path / "ours") == config_dict(stories)
    # As bytes too: the tokenizer must not change on its way.
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (stories / name).read_bytes()
    tokens = torch.tensor([IDS])
    with torch.no_grad():
        ours, original = (open_with_transformers(f)(tokens).logits for f in (tmp_path / "ours", stories))
    assert torch.equal(ours, original)
    np.testing.assert_allclose(np.asarray(model.logits(np.array([IDS]))), original.numpy(), atol=1e-4)


def test_a_checkpoint_in_shards_opens_in_transformers_and_in_camelid(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint, limit = open_checkpoint(theirs), 40_000
    monkeypatch.setattr(hf, "SHARD_BYTES", limit)
    convert(theirs, tmp_path / "shards")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    assert tensor_bytes(tmp_path / "shards") == tensor_bytes(theirs)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for *_, data in tensor_bytes(theirs).values())
    tokens = torch.from_numpy(tiny_tokens(checkpoint.config, 2, 9)).long()
    with torch.no_grad():
        assert torch.equal(*(open_with_transformers(f)(tokens).logits for f in (tmp_path / "shards", theirs)))
    ours, single = (camelid.load(folder).params for folder in (tmp_path / "shards", theirs))
    assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(single)))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_saving_in_another_dtype_rounds_as_torch_does_and_says_so(theirs: Path, tmp_path: Path, name: str):
    camelid.load(theirs).save(tmp_path / "ours", dtype=name)
    written, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", theirs))
    assert written.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(written[key], tensor.to(getattr(torch, name))), key
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == name
    assert open_with_transformers(tmp_path / "ours").dtype == getattr(torch, name)


def test_every_companion_of_the_weights_is_carried_along_and_nothing_else(theirs: Path, tmp_path: Path):
    carried = ("tokenizer.json", "LICENSE.txt", "README.md", "chat_template.jinja", "USE_POLICY.md")
    for name in (*carried, "optimizer.pt", "train.log"):
        (theirs / name).write_text("{}" if name.endswith("json") else name)
    convert(theirs, tmp_path / "ours")
    names = {file.name for file in (tmp_path / "ours").iterdir()}
    assert names == {*carried, MANIFEST, "config.json", "generation_config.json", "model.safetensors"}


def test_an_unknown_format_or_dtype_is_refused(theirs: Path, tmp_path: Path):
    model = camelid.load(theirs)
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        model.save(tmp_path / "ours", dtype="int8")
    with pytest.raises(UserError, match="dtype 'float64' is unknown"):
        camelid.load(theirs, dtype="float64")
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]


def test_progress_counts_bytes_up_to_the_end(theirs: Path, tmp_path: Path):
    heard: list[tuple[int, int]] = []
    camelid.load(theirs).save(tmp_path / "ours", progress=lambda done, total: heard.append((done, total)))
    size = sum((tmp_path / "ours" / name).stat().st_size for name in ("model.safetensors", "config.json"))
    assert heard[-1] == (size, size)
    assert [done for done, _ in heard] == sorted({done for done, _ in heard})


# Conversion --------------------------------------------------------------------------------


def test_converting_is_loading_and_saving(theirs: Path, tmp_path: Path):
    for name in (None, "bfloat16"):
        convert(theirs, tmp_path / f"converted {name}", dtype=name)
        camelid.load(theirs).save(tmp_path / f"saved {name}", dtype=name)
        assert tensor_bytes(tmp_path / f"converted {name}") == tensor_bytes(tmp_path / f"saved {name}")
        assert config_dict(tmp_path / f"converted {name}") == config_dict(tmp_path / f"saved {name}")


def test_converting_keeps_the_dtype_of_each_tensor(theirs: Path, tmp_path: Path):
    def mix(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({k: v.to(torch.bfloat16) for k, v in tensors.items() if "norm" not in k})

    edit_tensors(theirs, mix)
    convert(theirs, tmp_path / "ours")
    assert tensor_bytes(tmp_path / "ours") == tensor_bytes(theirs)


def test_large_tensors_are_converted_in_pieces(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert(theirs, tmp_path / "whole", dtype="bfloat16")
    monkeypatch.setattr("camelid.checkpoint.layout.CHUNK_BYTES", 1000)
    monkeypatch.setattr("camelid.checkpoint.tensors.CHUNK", 700)
    convert(theirs, tmp_path / "pieces", dtype="bfloat16")
    assert tensor_bytes(tmp_path / "pieces") == tensor_bytes(tmp_path / "whole")
    params = (camelid.load(folder, dtype="float32").params for folder in (theirs, tmp_path / "whole"))
    original, rounded = map(jax.tree.leaves, params)
    for a, b in zip(original, rounded, strict=True):
        np.testing.assert_array_equal(a.astype(jnp.bfloat16).astype(jnp.float32), b)


def test_a_checkpoint_is_never_replaced_by_its_own_conversion(theirs: Path):
    before = contents(theirs)
    with pytest.raises(UserError, match=r"cannot be replaced, because .* is read"):
        convert(theirs, theirs, dtype="bfloat16", overwrite=True)
    assert contents(theirs) == before
    assert [file.name for file in theirs.parent.iterdir()] == [theirs.name]
