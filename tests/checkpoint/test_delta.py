"""Differences of checkpoints: exact ones give back every bit, sums are those of EasyLM, adapters are the nearest."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

import camelid
from camelid.checkpoint.adapters import delta
from camelid.checkpoint.adapters.peft import open_adapter
from camelid.checkpoint.compare import compare, config_differences
from camelid.checkpoint.convert import convert
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.registry import open_checkpoint
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from families import FAMILIES
from runs import called, tensor_bytes
from tiny import LLAMA3, save_hf, tiny_config, tiny_params, tiny_tokens, transformers_twin

CONFIG = tiny_config(head_dim=8, bos_id=1, eos_ids=(2,))
HEAD = "lm_head.weight"


def save(folder: Path, config: ModelConfig = CONFIG, seed: int = 0, dtype: str = "float32", theirs: Any = None) -> Path:
    twin = transformers_twin(config, tiny_params(config, seed), theirs)
    return save_hf(twin.to(getattr(torch, dtype)), folder)


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], object], name: str = "model.safetensors") -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """With other numbers, other settings, and a tokenizer."""
    folder = save(tmp_path / "tuned", replace(CONFIG, eos_ids=(2, 5), rope_theta=500.0), seed=1)
    (folder / "tokenizer_config.json").write_text('{"mine": true}')
    return folder


# Exact ----------------------------------------------------------------------------------


def restored(base: str | Path, tuned: str | Path, folder: Path, **how: Any) -> Path:
    """What the exact delta of two makes of the first."""
    delta.make(base, tuned, folder / "delta")
    delta.apply(base, folder / "delta", folder / "restored", **how)
    return folder / "restored"


@pytest.mark.parametrize("before", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("after", ["float32", "bfloat16", "float16"])
def test_every_bit_comes_back_for_every_pair_of_dtypes(tmp_path: Path, before: str, after: str):
    base = save(tmp_path / "base", dtype=before)
    tuned = save(tmp_path / "tuned", seed=1, dtype=after)
    assert tensor_bytes(restored(base, tuned, tmp_path)) == tensor_bytes(tuned)
    bits = {"float32": np.uint32}.get(after, np.uint16)
    assert {array.dtype for array in load_file(tmp_path / "delta" / "delta.safetensors").values()} == {np.dtype(bits)}


def test_odd_numbers_come_back_too(tmp_path: Path, base: Path, tuned: Path):
    odd = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45, 3.4e38], np.float32)
    edit(tuned, lambda tensors: tensors[HEAD][0, :8].__setitem__(slice(None), odd))
    edit(base, lambda tensors: tensors[HEAD][0, :8].__setitem__(slice(None), odd[::-1]))
    assert tensor_bytes(restored(base, tuned, tmp_path)) == tensor_bytes(tuned)


def test_config_and_companions_are_those_of_the_tuned_model(base: Path, tuned: Path, tmp_path: Path):
    found = restored(base, tuned, tmp_path)
    assert config_differences(open_checkpoint(found).config, open_checkpoint(tuned).config) == {}
    assert (found / "tokenizer_config.json").read_text() == '{"mine": true}'


def test_what_is_equal_is_zero(base: Path, tmp_path: Path):
    other = shutil.copytree(base, tmp_path / "other")
    edit(other, lambda tensors: tensors[HEAD].__setitem__((3, 4), 7.0))
    delta.make(base, other, tmp_path / "delta")
    differ = {name: np.count_nonzero(a) for name, a in load_file(tmp_path / "delta" / "delta.safetensors").items()}
    assert {name: count for name, count in differ.items() if count} == {"lm_head": 1}


@pytest.mark.parametrize(("first", "second"), [("meta", "hf"), ("hf", "easylm"), ("gguf", "megatron")])
def test_formats_may_differ(base: Path, tuned: Path, tmp_path: Path, first: str, second: str):
    convert(base, tmp_path / "first", to=first)
    tuned = save(tmp_path / "same", seed=1)  # of settings that all formats can say
    convert(tuned, tmp_path / "second", to=second)
    delta.make(tmp_path / "first", tmp_path / "second", tmp_path / "delta")
    delta.apply(base, tmp_path / "delta", tmp_path / "hf")  # the base's values are those of the other format
    assert tensor_bytes(tmp_path / "hf") == tensor_bytes(tuned)
    delta.apply(tmp_path / "first", tmp_path / "delta", tmp_path / "meta", to="meta")
    assert all(each.equal for each in compare(open_checkpoint(tmp_path / "meta"), open_checkpoint(tuned)))


def test_a_grown_vocabulary_and_a_head_of_its_own_are_held_whole(tmp_path: Path):
    base = save(tmp_path / "base", replace(CONFIG, tie_embeddings=True))
    tuned = save(tmp_path / "tuned", replace(CONFIG, vocab_size=101), seed=1)
    made = delta.make(base, tuned, tmp_path / "delta")
    assert made.notes == ("stored entirely, because the base has no such tensor: embed, lm_head",)
    delta.apply(base, tmp_path / "delta", tmp_path / "restored")
    assert tensor_bytes(tmp_path / "restored") == tensor_bytes(tuned)
    # And the other way: what the tuned model has less of is not missed.
    assert tensor_bytes(restored(tuned, base, tmp_path / "back")) == tensor_bytes(base)


def test_slices_of_any_size_give_the_same_delta(base: Path, tuned: Path, tmp_path: Path, monkeypatch):
    delta.make(base, tuned, tmp_path / "whole")
    monkeypatch.setattr("camelid.checkpoint.layout.CHUNK_BYTES", 1000)
    delta.make(base, tuned, tmp_path / "cut")
    for name in ("delta.safetensors", "delta.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_another_base_is_refused_by_the_first_tensor_that_differs(base: Path, tuned: Path, tmp_path: Path):
    delta.make(base, tuned, tmp_path / "delta")
    other = shutil.copytree(base, tmp_path / "other")
    edit(other, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].__setitem__((0, 0), 9.0))
    edit(other, lambda tensors: tensors[HEAD].__setitem__((0, 0), 9.0))
    with pytest.raises(UserError, match=r"layers\.mlp\.up_proj\.2 of .*other differs from the base of .*delta"):
        delta.apply(other, tmp_path / "delta", tmp_path / "restored")
    wide = save(tmp_path / "wide", replace(CONFIG, mlp_dim=96))
    with pytest.raises(UserError, match=r"wide has no layers\.mlp\.gate_proj\.0 of shape \(80, 48\)"):
        delta.apply(wide, tmp_path / "delta", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def spoil(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    said = json.loads((folder / "delta.json").read_text())
    change(said)
    (folder / "delta.json").write_text(json.dumps(said))


def flip(folder: Path) -> None:
    file = folder / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (flip, r"lm_head in .*delta\.safetensors is damaged"),
    "a byte less": (
        lambda f: (f / "delta.safetensors").write_bytes((f / "delta.safetensors").read_bytes()[:-1]),
        "cut",
    ),
    "no tensors": (lambda f: (f / "delta.safetensors").unlink(), r"has no delta\.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "no delta": (lambda f: (f / "delta.json").unlink(), "is not a delta"),
    "a later version": (lambda f: spoil(f, lambda said: said.update(version=2)), "version 2"),
    "another kind": (lambda f: spoil(f, lambda said: said.update(kind="xor")), "kind 'xor'"),
    "a tensor less": (lambda f: spoil(f, lambda said: said["tensors"].pop("embed")), "describe different models"),
    "no checksum": (lambda f: spoil(f, lambda said: said["tensors"]["embed"].pop("base")), "the entry of embed in"),
    "another dtype": (
        lambda f: spoil(f, lambda said: said["tensors"]["embed"].update(dtypes=["float32", "bfloat16"])),
        r"embed in .* is \(97, 48\) uint32",
    ),
    "another shape": (
        lambda f: edit(f, lambda t: t.update(embed=t["embed"].reshape(48, 97)), "delta.safetensors"),
        r"embed in .* is \(48, 97\) uint32",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_deltas_are_refused(base: Path, tuned: Path, tmp_path: Path, case: str):
    delta.make(base, tuned, tmp_path / "delta")
    change, problem = DAMAGE[case]
    change(tmp_path / "delta")
    with pytest.raises(UserError, match=problem):
        delta.apply(base, tmp_path / "delta", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_nothing_half_written_stays_and_nothing_is_replaced_unasked(base: Path, tuned: Path, tmp_path: Path):
    delta.make(base, tuned, tmp_path / "delta")
    with pytest.raises(UserError, match="exists already"):
        delta.make(base, tuned, tmp_path / "delta")
    before = (tmp_path / "delta" / "delta.safetensors").read_bytes()

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        delta.make(base, base, tmp_path / "delta", overwrite=True, progress=stop)
    assert (tmp_path / "delta" / "delta.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "tuned"]
    for kind, rank in (("sum", None), ("lora", 2)):
        close = shutil.copytree(base, tmp_path / kind)
        edit(close, lambda tensors: tensors[HEAD].__setitem__((0, 0), 9.0))
        delta.make(base, close, tmp_path / "delta", kind=kind, rank=rank, overwrite=True)
        assert not (tmp_path / "delta" / "delta.safetensors").exists()
        delta.make(base, tuned, tmp_path / "delta", overwrite=True)


def all_bytes(*folders: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("kind", "rank"), [("exact", None), ("sum", None), ("lora", 2)])
def test_a_destination_is_never_one_of_the_sources(base: Path, tmp_path: Path, kind: str, rank: int | None):
    """Without the base a delta says nothing; without the tuned model or the delta, rounded values are all there is."""
    tuned = merged(base, tmp_path / "tuned", 2, [HEAD])
    made = tmp_path / "delta"
    delta.make(base, tuned, made, kind=kind, rank=rank)
    (tmp_path / "link").symlink_to(base)
    before = all_bytes(base, tuned, made)
    for destination in (base, tuned, tmp_path / "link", tmp_path / "x" / ".." / "tuned"):
        with pytest.raises(UserError, match=r"cannot be replaced, because .* is read"):
            delta.make(base, tuned, destination, kind=kind, rank=rank, overwrite=True)
        assert all_bytes(base, tuned, made) == before
    for destination in (base, made, tmp_path / "link", tmp_path / "x" / ".." / "delta"):
        with pytest.raises(UserError, match=r"cannot be replaced, because .* is read"):
            delta.apply(base, made, destination, overwrite=True)
        assert all_bytes(base, tuned, made) == before
    if kind == "lora":
        for destination in (base, made):  # an adapter is read together with its base
            with pytest.raises(UserError, match=r"cannot be replaced, because .* is read"):
                convert(made, destination, overwrite=True)
            assert all_bytes(base, tuned, made) == before


def test_a_published_delta_is_not_replaced_by_what_it_makes(base: Path, tuned: Path, tmp_path: Path):
    convert(tuned, tmp_path / "theirs", to="easylm")
    for prefix in ("", "easylm::"):
        with pytest.raises(UserError, match=r"cannot be replaced, because .* is read"):
            delta.apply(base, f"{prefix}{tmp_path / 'theirs'}", tmp_path / "theirs", summed=True, overwrite=True)
    assert open_checkpoint(tmp_path / "theirs").format == "easylm"


@pytest.mark.parametrize("linked", ["a file", "the folder", "into the destination"])
def test_a_source_is_found_behind_links(base: Path, tmp_path: Path, linked: str):
    """As in the cache of the Hub, whose files are links; and of two folders, the one that really holds the file."""
    other = tmp_path / "other"
    if linked == "the folder":
        other.symlink_to(base)
    else:
        other.mkdir()
        for file in base.iterdir():
            (other / file.name).symlink_to(file)
    before = all_bytes(base)
    source, destination = (other, base) if linked == "into the destination" else (other, other)
    with pytest.raises(UserError, match=r"cannot be replaced, because .* is read"):
        convert(source, destination, dtype="bfloat16", overwrite=True)
    assert all_bytes(base) == before


def test_a_model_in_memory_replaces_the_files_that_it_came_from(base: Path, tmp_path: Path):
    """Nothing is read from them any more."""
    model, tokens = camelid.load(base), tiny_tokens(CONFIG, 2, 9)
    logits = np.asarray(model.logits(tokens))
    model.save(base, overwrite=True, format="hf")
    np.testing.assert_array_equal(np.asarray(model.logits(tokens)), logits)
    np.testing.assert_array_equal(np.asarray(camelid.load(base).logits(tokens)), logits)


# Sum ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sum_is_an_ordinary_checkpoint_of_differences(tmp_path: Path, dtype: str):
    base, tuned = save(tmp_path / "base", dtype=dtype), save(tmp_path / "tuned", seed=1, dtype=dtype)
    delta.make(base, tuned, tmp_path / "delta", kind="sum")
    one, two, found = (load_torch(f / "model.safetensors") for f in (base, tuned, tmp_path / "delta"))
    for name in two:
        expected = (two[name].float() - one[name].float()).to(two[name].dtype)
        assert torch.equal(found[name], expected), name
    convert(tmp_path / "delta", tmp_path / "ordinary")  # as others publish it
    assert not (tmp_path / "ordinary" / "delta.json").exists()
    with pytest.raises(UserError, match="is not a delta"):
        delta.apply(base, tmp_path / "ordinary", tmp_path / "restored")
    delta.apply(base, tmp_path / "ordinary", tmp_path / "published", summed=True)
    delta.apply(base, tmp_path / "delta", tmp_path / "restored")
    assert tensor_bytes(tmp_path / "published") == tensor_bytes(tmp_path / "restored")
    restored = load_torch(tmp_path / "restored" / "model.safetensors")
    for name in two:
        expected = (one[name].float() + found[name].float()).to(two[name].dtype)
        assert torch.equal(restored[name], expected), name
        bound = 2.0 ** (-8 if dtype == "bfloat16" else -23) * (
            one[name].float().abs().max() + two[name].float().abs().max()
        )
        assert (restored[name].float() - two[name].float()).abs().max() <= bound


def test_easylms_kind_of_delta_applies(assets: Path, stories: Path, tmp_path: Path):
    """EasyLM's golden file as a difference from itself doubles it, in every bit."""
    golden, config = assets / "golden" / "easylm" / "streaming_params_fp32", read_model_config(stories)
    delta.apply(f"params::{golden}", f"params::{golden}", tmp_path / "sum", summed=True, config=config)
    once, twice = (load_file(folder / "model.safetensors") for folder in (stories, tmp_path / "sum"))
    assert any(array.any() for array in twice.values())
    for name, array in twice.items():
        np.testing.assert_array_equal(array, 2 * once[name], err_msg=name)
    delta.make(tmp_path / "sum", f"params::{golden}", tmp_path / "delta", config=config)
    delta.apply(tmp_path / "sum", tmp_path / "delta", tmp_path / "once", to="easylm")
    assert all(each.equal for each in compare(open_checkpoint(tmp_path / "once"), open_checkpoint(stories)))


def test_sums_and_adapters_need_models_of_one_shape(base: Path, tmp_path: Path):
    wide = save(tmp_path / "wide", replace(CONFIG, vocab_size=101))
    tied = save(tmp_path / "tied", replace(CONFIG, tie_embeddings=True))
    for kind, rank in (("sum", None), ("lora", 4)):
        with pytest.raises(UserError, match=r"embed is \(97, 48\) in .* and \(101, 48\) in"):
            delta.make(base, wide, tmp_path / "delta", kind=kind, rank=rank)
        with pytest.raises(UserError, match=r"only one of .* has lm_head"):
            delta.make(base, tied, tmp_path / "delta", kind=kind, rank=rank)
    with pytest.raises(UserError, match="only one of"):
        delta.apply(base, tied, tmp_path / "restored", summed=True)


# Adapters -------------------------------------------------------------------------------


def merged(base: Path, folder: Path, rank: int, names: list[str], seed: int = 3) -> Path:
    """The base with a product of this rank added to some tensors."""
    draw = np.random.default_rng(seed)
    tuned = shutil.copytree(base, folder)

    def add(tensors: dict[str, np.ndarray]) -> None:
        for name in names:
            outputs, inputs = tensors[name].shape
            b, a = draw.standard_normal((outputs, rank)), draw.standard_normal((rank, inputs))
            tensors[name] = (tensors[name] + (b @ a) / 20).astype(tensors[name].dtype)

    edit(tuned, add)
    return tuned


def layer(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}.weight"


def test_a_merged_adapter_is_found_again(base: Path, tmp_path: Path):
    names = [layer(i, f"self_attn.{name}") for i in range(4) for name in ("q_proj", "o_proj")]
    names += [layer(1, "mlp.down_proj"), HEAD, "model.embed_tokens.weight"]
    tuned = merged(base, tmp_path / "tuned", 3, names)
    made = delta.make(base, tuned, tmp_path / "delta", kind="lora", rank=3)
    assert made.residual is not None
    assert made.residual < 1e-5
    said = json.loads((tmp_path / "delta" / "adapter_config.json").read_text())
    assert said["target_modules"] == ["embed_tokens", "lm_head", "model.layers.1.mlp.down_proj", "o_proj", "q_proj"]
    assert (said["r"], said["lora_alpha"], said["rank_pattern"]) == (3, 3, {})
    for path in (tmp_path / "delta", None):
        if path is None:  # and on a base of another format
            convert(base, tmp_path / "meta", to="meta")
            delta.apply(tmp_path / "meta", tmp_path / "delta", tmp_path / "restored")
            path = tmp_path / "restored"
        for each in compare(open_checkpoint(path), open_checkpoint(tuned)):
            assert each.largest < 1e-6, each
    tokens = tiny_tokens(CONFIG, 2, 9)
    np.testing.assert_allclose(
        np.asarray(camelid.load(tmp_path / "delta").logits(tokens)),
        np.asarray(camelid.load(tuned).logits(tokens)),
        atol=1e-4,
    )


def test_what_a_smaller_rank_leaves_is_what_the_singular_values_say(base: Path, tmp_path: Path):
    names = [layer(0, "self_attn.q_proj"), layer(2, "mlp.up_proj")]
    tuned = merged(base, tmp_path / "tuned", 40, names)
    made = delta.make(base, tuned, tmp_path / "delta", kind="lora", rank=10)
    one, two = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    values = [np.linalg.svd(two[name].astype(np.float64) - one[name], compute_uv=False) for name in names]
    left, total = sum((s[10:] ** 2).sum() for s in values), sum((s**2).sum() for s in values)
    assert made.residual == pytest.approx((left / total) ** 0.5, rel=1e-4)
    assert 0.3 < made.residual < 0.95
    # A rank beyond a matrix's is as much as the matrix has.
    made = delta.make(base, tuned, tmp_path / "full", kind="lora", rank=1000)
    assert made.residual is not None
    assert made.residual < 1e-5
    assert open_adapter(tmp_path / "full", CONFIG).pairs["layers.attn.q_proj", 0].rank == 48


def test_norms_and_a_tied_table_are_held_whole(tmp_path: Path):
    config = replace(CONFIG, tie_embeddings=True)
    base = save(tmp_path / "base", config)
    tuned = merged(base, tmp_path / "tuned", 2, [layer(0, "self_attn.q_proj"), "model.embed_tokens.weight"])
    edit(tuned, lambda t: t.update({layer(1, "input_layernorm"): t[layer(1, "input_layernorm")] + 1}))
    made = delta.make(base, tuned, tmp_path / "delta", kind="lora", rank=2)
    assert made.residual is not None
    assert made.residual < 1e-6
    said = json.loads((tmp_path / "delta" / "adapter_config.json").read_text())
    assert said["modules_to_save"] == ["embed_tokens", "lm_head", "model.layers.1.input_layernorm"]
    tokens = tiny_tokens(config, 2, 9)
    np.testing.assert_allclose(
        np.asarray(camelid.load(tmp_path / "delta").logits(tokens)),
        np.asarray(camelid.load(tuned).logits(tokens)),
        atol=1e-4,
    )


def test_what_no_adapter_can_say_is_told_or_refused(base: Path, tmp_path: Path):
    family = FAMILIES["llama, biases"]
    biased = save(tmp_path / "biased", family.ours, theirs=family.theirs())
    tuned = merged(biased, tmp_path / "tuned", 2, [layer(0, "self_attn.q_proj")])
    edit(tuned, lambda t: t["model.layers.3.mlp.up_proj.bias"].__iadd__(1))
    made = delta.make(biased, tuned, tmp_path / "delta", kind="lora", rank=2)
    assert made.notes == ("an adapter cannot express the difference of layers.mlp.up_bias.3",)
    assert made.residual is not None
    assert made.residual > 0.1
    for other, problem in [
        (save(tmp_path / "theta", replace(CONFIG, rope_theta=500.0, rope_scaling=LLAMA3)), "rope_scaling, rope_theta"),
        (base, "all matrices of"),
    ]:
        with pytest.raises(UserError, match=problem):
            delta.make(base, other, tmp_path / "other", kind="lora", rank=2)
    infinite = merged(base, tmp_path / "infinite", 2, [HEAD])
    edit(infinite, lambda t: t[HEAD].__setitem__((0, 0), np.inf))
    with pytest.raises(UserError, match="lm_head has infinite or NaN values"):
        delta.make(base, infinite, tmp_path / "other", kind="lora", rank=2)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("kind", "rank"), [("lora", None), ("lora", 0), ("exact", 4), ("xor", None)])
def test_a_rank_is_for_adapters(base: Path, tmp_path: Path, kind: str, rank: int | None):
    with pytest.raises(UserError, match="kind"):
        delta.make(base, base, tmp_path / "delta", kind=kind, rank=rank)


# The command line -----------------------------------------------------------------------


def test_the_command_line_makes_and_applies(base: Path, tuned: Path, tmp_path: Path):
    done = called("delta", "make", base, tuned, tmp_path / "delta")
    assert done.returncode == 0, done.stderr
    done = called("delta", "apply", base, tmp_path / "delta", tmp_path / "easylm", "--to", "easylm")
    assert done.returncode == 0, done.stderr
    assert all(each.equal for each in compare(open_checkpoint(tmp_path / "easylm"), open_checkpoint(tuned)))
    close = merged(base, tmp_path / "close", 2, [HEAD])
    done = called("delta", "make", base, close, tmp_path / "lora", "--kind", "lora", "--rank", 1)
    assert done.returncode == 0, done.stderr
    assert "the residual of rank 1 is " in done.stderr
    done = called("delta", "make", base, close, tmp_path / "sum", "--kind", "sum")
    assert "up to rounding" in done.stderr
    done = called("delta", "apply", base, tmp_path / "sum", tmp_path / "close2", "--sum")
    assert done.returncode == 0, done.stderr
    done = called("delta", "apply", tuned, tmp_path / "delta", tmp_path / "wrong")
    assert done.returncode == 2
    assert "differs from the base of" in done.stderr
    done = called("delta", "mke", base, tuned, tmp_path / "other")
    assert done.returncode == 2
    assert "camelid delta make" in done.stderr
