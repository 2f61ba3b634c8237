"""Options of generation: their bounds and contradictions."""

import re

import pytest

from camelid.errors import UserError
from camelid.generate.config import GenerationConfig, generation_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0 is below 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5 is not a whole number"),
        ({"min_new_tokens": 65}, "min_new_tokens = 65 is not in [0, max_new_tokens = 64]"),
        ({"n": 0}, "n = 0 is below 1"),
        ({"n": 2}, "n = 2 completions of a prompt would be equal with temperature = 0"),
        ({"n": 2, "num_return_sequences": 3, "temperature": 1.0}, "n = 2 and num_return_sequences = 3 contradict"),
        ({"temperature": -0.1}, "temperature = -0.1 is not in [0, inf)"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": 0}, "top_k = 0 is below 1"),
        ({"top_k": 1.5}, "top_k = 1.5 is not a whole number"),
        ({"top_p": 1.1}, "top_p = 1.1 is not in (0, 1]"),
        ({"min_p": 0.0}, "min_p = 0.0 is not in (0, 1]"),
        ({"typical_p": float("nan")}, "typical_p = nan is not in (0, 1]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0 is not in (0, inf)"),
        ({"presence_penalty": float("inf")}, "presence_penalty = inf is not finite"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty = nan is not finite"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size = -1 is below 0"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias of token 3 is nan"),
        ({"temperature": None}, "temperature = None is not a number"),
        ({"top_p": 1e-46}, "top_p = 1e-46 is not in (0, 1]"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias = '5' is not a whole number"),
        ({"logit_bias": {5: 1e39}}, "logit_bias of token 5 is 1e+39"),
        ({"logit_bias": "x"}, "logit_bias = 'x' is not a mapping"),
        ({"stop": 5}, "stop = 5 is not a list of texts"),
        ({"stop": ["", "a"]}, "stop = ['', 'a'] has an empty text"),
        ({"top_logprobs": -1}, "top_logprobs = -1 is below 0"),
        ({"suppress_tokens": [1.5]}, "suppress_tokens = 1.5 is not a whole number"),
        ({"max_tokens": 5}, "there is no option 'max_tokens' of generation\nDid you mean 'max_new_tokens'?"),
        ({"temprature": 5}, "there is no option 'temprature' of generation\nDid you mean 'temperature'?"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        generation_config(None, options)


def test_two_names_of_one_option():
    assert GenerationConfig(num_return_sequences=3, temperature=1.0) == GenerationConfig(n=3, temperature=1.0)
    assert GenerationConfig(n=3, num_return_sequences=3, temperature=1.0).n == 3


def test_one_stop_string_needs_no_list():
    assert GenerationConfig(stop="end").stop == ("end",)


def test_changes_keep_the_other_options():
    options = generation_config(GenerationConfig(temperature=0.5, top_k=3), {"top_k": 4})
    assert options == GenerationConfig(temperature=0.5, top_k=4)
