"""The warning that a large share of a layer trains."""

import warnings

import pytest
from peft import PeftModel
from tiny import adapted, llama

from peft_sparsegrad import SparseGradConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 1}, r"2,048 of the 2,048 entries of 'model.layers.0.mlp.up_proj' \(100%\), and 35% of the model"),
        ({"num_values": 1024}, r"1,024 of the 2,048 .*\(50%\), and 18% of the model"),
        ({"density_pattern": {"1.mlp.down_proj": 0.3}}, r"'model.layers.1.mlp.down_proj' \(30%\)"),
    ],
    ids=str,
)
def test_it_names_the_shares_of_the_layer_and_of_the_model(settings, message):
    with pytest.warns(UserWarning, match=message) as said:
        model = adapted(llama(), **settings)
    assert sum("time, memory and file" in str(warning.message) for warning in said) == 1
    if settings == {"density": 1}:
        train, _ = model.get_nb_trainable_parameters()
        assert round(100 * train / sum(p.numel() for p in llama().parameters())) == 35


def test_an_ordinary_share_and_loading_are_silent(tmp_path):
    adapted(llama(), density=0.5).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SparseGrad trains")
        adapted(llama(), density=0.1)
        adapted(llama(hidden_size=4, intermediate_size=8), density=0.01)  # 8 of 32 entries, the fewest of any layer
        assert isinstance(PeftModel.from_pretrained(llama(), tmp_path).peft_config["default"], SparseGradConfig)
