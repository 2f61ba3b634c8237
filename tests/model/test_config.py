import pytest

from camelid.model.config import ModelConfig
from tiny import tiny_config


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"num_heads": 5}, "num_heads = 5 is not a multiple of num_kv_heads = 2"),
        ({"head_dim": 7}, "head_dim = 7 has 7 rotary features"),
    ],
)
def test_a_config_that_no_model_can_have_is_refused(field: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        tiny_config(**field)


NEEDED = (
    "vocab_size embed_dim mlp_dim num_layers num_heads num_kv_heads head_dim context_length norm_eps rope_theta".split()
)


@pytest.mark.parametrize("forgotten", NEEDED)
def test_nothing_that_changes_every_model_has_a_default(forgotten: str):
    given = vars(tiny_config())
    with pytest.raises(TypeError, match=forgotten):
        ModelConfig(**{name: given[name] for name in NEEDED if name != forgotten})
