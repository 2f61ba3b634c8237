"""What a run writes for use elsewhere: models and adapters, when it is finished and at milestones."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from camelid.api import Model
from camelid.checkpoint.checkpoint import ExportSpec
from camelid.checkpoint.folder import check_destination
from camelid.checkpoint.registry import plan_files
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import named
from camelid.runs.components import Components
from camelid.runs.file_names import ADAPTER, ADAPTER_EMA, MILESTONES, MODEL, MODEL_EMA
from camelid.runs.lora import base_dtype, save_adapter
from camelid.runs.recipe import Recipe
from camelid.runs.run_folder import is_written
from camelid.runs.start import Start
from camelid.text.tokenizer import CHAT_TEMPLATE
from camelid.train.state import TrainState
from camelid.train.trainable import combine


@dataclass(frozen=True)
class Results:
    """Writes the models and adapters of a run; every process calls all methods that write."""

    components: Components
    folder: Path
    """the folder of the run"""
    mesh: Mesh

    @property
    def recipe(self) -> Recipe:
        return self.components.recipe

    @property
    def names(self) -> tuple[str, ...]:
        """The folders that are written."""
        return result_names(self.recipe)

    @property
    def companions(self) -> dict[str, Path]:
        """The files that are copied with the model, with the chat template of the training data."""
        template = {} if self.components.chat_template is None else {CHAT_TEMPLATE: self.folder / CHAT_TEMPLATE}
        return self.components.companions | template

    @property
    def dtype(self) -> str | None:
        """The dtype of what is written; None: that of the parameters."""
        return self.recipe.checkpoint.dtype or (None if self.recipe.lora is None else base_dtype(self.recipe))

    def check(self) -> None:
        """Raises UserError, before training, if a folder may not be replaced or a format cannot hold the model."""
        for name in self.names:
            check_destination(self.folder / name, True, {"config.json": None, **self.components.companions})
        format, config = self.recipe.checkpoint.export, self.components.config
        if format is not None and MODEL in self.names:
            dtypes = dict.fromkeys(named(declare_decoder(config)), np.dtype(self.dtype or "float32"))
            plan_files(ExportSpec(config, dtypes, _no_values, tuple(self.components.companions.values())), format)

    def model(self, params: Decoder) -> Model:
        files = tuple(self.companions.values())
        return Model(self.components.config, params, self.components.tokenizer, self.recipe.compute, self.mesh, files)

    def save(self, state: TrainState, start: Start, place: Path, format: str = "hf") -> None:
        """Writes the folders `names` into `place`. Each is complete at any time, and replaces one of an earlier step.

        Models have the format `format`, adapters that of PEFT.
        """
        params = {ADAPTER: state.trainable, MODEL: state.trainable, ADAPTER_EMA: state.ema, MODEL_EMA: state.ema}
        for name in self.names:
            if start.base is not None and name in (ADAPTER, ADAPTER_EMA):
                save_adapter(place / name, params[name], start.base, self.companions, self.recipe.checkpoint.dtype)
            else:
                model = self.model(combine(params[name], start.frozen))
                model.save(place / name, format, dtype=self.dtype, overwrite=True)

    def save_at_checkpoint(self, state: TrainState, start: Start, step: int) -> None:
        """Writes what belongs to a checkpoint: adapter/, and a milestone in the format `checkpoint.export`."""
        if start.base is not None:
            dtype = self.recipe.checkpoint.dtype
            save_adapter(self.folder / ADAPTER, state.trainable, start.base, self.companions, dtype)
        self._save_milestone(state, start, step)

    def make_up(self, state: TrainState, start: Start) -> None:
        """Writes the milestone from which the run is resumed, if the process was killed before it was written."""
        if start.resumed is not None and not is_written(self._milestone(start.resumed), self.names):
            self._save_milestone(state, start, start.resumed)

    def _save_milestone(self, state: TrainState, start: Start, step: int) -> None:
        every, format = self.recipe.train.milestones_every, self.recipe.checkpoint.export
        if format is not None and every is not None and step % every == 0:
            self.save(state, start, self._milestone(step), format)

    def _milestone(self, step: int) -> Path:
        return self.folder / MILESTONES / str(step)


def result_names(recipe: Recipe) -> tuple[str, ...]:
    """The folders that a run writes: model/ or adapter/, or both, also of the moving average of the parameters."""
    models = (MODEL,) if recipe.ema is None else (MODEL, MODEL_EMA)
    if recipe.lora is None:
        return models
    adapters = (ADAPTER,) if recipe.ema is None else (ADAPTER, ADAPTER_EMA)
    return (*adapters, *models) if recipe.lora.merge else adapters


def _no_values(*about: object) -> np.ndarray:
    raise AssertionError("plans of files read no values")
