"""Chooses the fields of a recipe from the facts: reads the text, and asks for the model's size and the devices."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from camelid.data.config import DataConfig, Source
from camelid.model.config import ComputeConfig
from camelid.parallel.mesh import MeshConfig, device_memory, make_mesh
from camelid.runs import finetune_defaults as defaults
from camelid.runs.notes import counted, times, truncation_note
from camelid.runs.recipe import recipe_of
from camelid.train.lora_config import LoRAConfig

if TYPE_CHECKING:
    from camelid.data.preparation.store import Store
    from camelid.model.config import ModelConfig
    from camelid.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chooser:
    """Chooses fields around those that are given."""

    config: "ModelConfig"
    tokenizer: "Tokenizer"
    given: Mapping[str, Any]
    notes: list[str]

    def tables(self, sources: list[dict[str, Any]]) -> dict[str, Any]:
        """The tables of the recipe."""
        from camelid.model.flops import count_parameters

        lora, dpo = "lora" in self.given, "dpo" in self.given
        texts = all(source["kind"] in ("text", "tokens") for source in sources) and not dpo
        data, rows, examples = self._data(sources, texts, dpo)
        parameters, devices = count_parameters(self.config), self._devices()
        length = self._value("data", "sequence_length", data["sequence_length"])
        batch = defaults.batch_size(rows, length, devices.data_parallel)
        batch = self._value("data", "batch_size", batch)
        times = defaults.epochs(examples, texts, dpo)
        steps = self._value("train", "steps", defaults.steps(rows, batch, times))
        dtype = self._value("compute", "dtype", devices.dtype)
        parts, remat = self._memory(parameters, length, batch, devices, dtype)
        both = {**data, **self.given.get("data", {})}
        validates = bool(both.get("validation") or both.get("validation_fraction"))
        table: dict[str, Any] = {
            "data": data | {"batch_size": batch},
            "optimizer": self._optimizer(parameters, lora, dpo),
            "train": {
                "steps": steps,
                **({"accumulate": parts} if parts > 1 else {}),
                "checkpoint_every": min(500, -(-steps // 4)),
                **({"evaluate_every": min(250, -(-steps // 5))} if validates else {}),
            },
            "compute": {"dtype": dtype} | ({} if remat == ComputeConfig.remat else {"remat": remat}),
        }
        if lora:
            table["lora"] = {"rank": LoRAConfig.rank}
        if dpo:
            table["dpo"] = {"beta": 0.1}
        self._tell(rows, examples, batch, steps)
        return table

    def _optimizer(self, parameters: int, lora: bool, dpo: bool) -> dict[str, Any]:
        """The table [optimizer]; of another optimizer than AdamW, the learning rate is its default."""
        table: dict[str, Any] = {}
        if self._value("optimizer", "name", "adamw") == "adamw":
            table["learning_rate"] = defaults.learning_rate(parameters, lora, dpo)
        if "warmup_steps" not in self.given.get("optimizer", {}):
            table["warmup_ratio"] = 0.1 if dpo else 0.03
        return table | {"weight_decay": 0.0}

    def _value(self, table: str, name: str, chosen: Any) -> Any:
        """A field that is given, or else the choice."""
        return self.given.get(table, {}).get(name, chosen)

    def _data(self, sources: list[dict[str, Any]], texts: bool, dpo: bool) -> tuple[dict[str, Any], int, int]:
        """The table [data] without the batch size, the rows of an epoch, and the examples or documents."""
        from camelid.data.rows.loader import Loader
        from camelid.data.rows.stores import open_stores
        from camelid.train.loggers import tokenizing

        table: dict[str, Any] = {"train": sources}
        given = {name: value for name, value in self.given.get("data", {}).items() if name != "batch_size"}

        def config(**chosen: Any) -> DataConfig:
            others = {"run": "-", "init": "-", "train": {"steps": 1}} | ({"dpo": {}} if dpo else {})
            return recipe_of({**others, "data": {**table, "batch_size": 1, **chosen, **given}}).data

        fraction = _held_out(config(sequence_length=1).train)
        if fraction and not given.keys() & {"validation", "validation_fraction"}:
            table["validation_fraction"] = fraction
        stores = open_stores(config(sequence_length=self.config.max_length), self.tokenizer, "train", tokenizing())
        lengths = _lengths(stores, dpo)
        if texts and any(store.codes is not None for store in stores):  # prepared examples, which have prompts
            texts, table["packing"] = False, "best_fit"
        longest, tokens = max(lengths, default=0), sum(lengths)
        table["sequence_length"] = defaults.sequence_length(longest, tokens, self.config.max_length, texts)
        length = self._value("data", "sequence_length", table["sequence_length"])
        longer = sum(each > length for each in lengths)
        # The second part of an example that is split would lack its prompt; texts lose nothing.
        examples = not texts and all(source["kind"] != "text" for source in sources)
        if longer and examples and "overlong" not in given and config().packing_method != "stream":
            table["overlong"] = "truncate"
            what = "pair" if dpo else "example"
            self.notes.append(truncation_note(longer, len(lengths), what, length, longest))
        return table, Loader(config(), self.tokenizer, "train", stores=stores).num_rows, len(lengths)

    def _devices(self) -> defaults.Devices:
        from camelid.parallel.batch_sharding import data_parallel_size

        mesh = make_mesh(replace(MeshConfig(), **self.given.get("mesh", {})))
        device = mesh.devices.flat[0]
        return defaults.Devices(device.platform, mesh.size, device_memory(device), data_parallel_size(mesh))

    def _memory(
        self, parameters: int, length: int, batch: int, devices: defaults.Devices, dtype: str
    ) -> tuple[int, defaults.Remat]:
        """The number of microbatches, and what is computed again."""
        base = self._value("lora", "base", dtype) if "lora" in self.given else None
        rows = max(1, batch // devices.data_parallel)
        planned: dict[defaults.Remat, defaults.Memory] = {
            remat: defaults.memory(self.config, parameters, length, devices, dtype, base, remat)
            for remat in ("elementwise", "layer")
        }
        remat: defaults.Remat = "elementwise" if planned["elementwise"].rows >= min(8, rows) else "layer"
        if not planned[remat].rows and devices.memory is not None:
            way_out = "--lora takes less" if base is None else "use more devices, or a smaller --data.sequence-length"
            self.notes.append(
                f"training is estimated to take {planned[remat].needed / 2**30:.0f} GiB of each device, which has "
                f"{devices.memory / 2**30:.0f}: {way_out}"
            )
        return defaults.microbatches(rows, planned[remat].rows), remat

    def _tell(self, rows: int, examples: int, batch: int, steps: int) -> None:
        fill, read = ("fills" if examples == 1 else "fill"), ("reads" if steps == 1 else "read")
        self.notes.insert(
            0,
            f"{counted(examples, 'example')} {fill} {counted(rows, 'row')}, which {counted(steps, 'step')} of "
            f"{counted(batch, 'row')} {read} {times(steps * batch / rows)}",
        )


def _held_out(sources: Sequence[Source]) -> float:
    """The fraction of the records to hold out for validation; no more are read than is needed to choose it."""
    from camelid.data.readers.sources import read_records

    records = itertools.chain.from_iterable(map(read_records, sources))
    return defaults.validation_fraction(sum(1 for _ in itertools.islice(records, defaults.HELD_OUT[0][0])))


def _lengths(stores: Sequence["Store"], pairs: bool) -> list[int]:
    """The number of tokens of each document; those of both answers of a pair are added."""
    import numpy as np

    found = [np.diff(store.offsets) for store in stores]
    return np.concatenate([each.reshape(-1, 2).sum(1) if pairs else each for each in found]).tolist()
