"""What of the model trains, with which learning rate, and the counts of the paper's tables."""

import pytest
import torch
from glue_tools import make_run
from peft import PeftModel
from tiny import bert
from transformers import AutoModelForSequenceClassification, BertConfig, RobertaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from examples.glue.arguments import GLUE_METHODS
from examples.glue.model import attach_to_mlp, build_model, modules_besides, target_layers
from examples.glue.optimizer import make_optimizer
from examples.glue.tasks import TASKS
from peft_sparsegrad.cli.errors import InputError

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
TINY = {
    "bert": {"intermediate_size": 64},
    "roberta": {"intermediate_size": 64},
    "xlm-roberta": {"intermediate_size": 64},
    "electra": {"intermediate_size": 64, "embedding_size": 16},
    "deberta-v2": {"intermediate_size": 64, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": {"intermediate_size": 64, "global_attn_every_n_layers": 1},
    "albert": {"intermediate_size": 64, "embedding_size": 16},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
}
BATCH = {"input_ids": torch.arange(5, 29).view(4, 6), "labels": torch.tensor([0, 1, 0, 1])}


def classifier(model_type):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **TINY[model_type]}, num_labels=2)
    return AutoModelForSequenceClassification.from_config(config)


def trained_names(model):
    """Names of what trains, as in the model without PEFT."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {n.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for n in names}


@pytest.mark.parametrize("model_type", TINY)
def test_the_rest_of_any_encoder_trains(model_type):
    plain = classifier(model_type)
    targets = target_layers(plain, None)
    inside = tuple(f"{name}." for name in targets)
    everything = {name for name, _ in plain.named_parameters()}
    trained = attach_to_mlp(make_run(method="sparsegrad", rest="trained"), classifier(model_type))
    names = trained_names(trained.model)
    assert {name for name in names if not name.startswith(inside)} == {
        n for n in everything if not n.startswith(inside)
    }
    assert len(trained.adapter) == len(targets) > 0
    trained.model(**BATCH).loss.backward()
    # Some encoders embed a pair's sides, which a single sentence does not reach.
    assert sum(parameter.grad is not None for parameter in trained.rest) > 0.8 * len(trained.rest)


@pytest.mark.parametrize("method", GLUE_METHODS)
def test_what_each_method_trains(method):
    model = bert()
    total = sum(p.numel() for p in model.parameters())
    in_targets = sum(p.numel() for module in target_layers(model, None).values() for p in module.parameters())
    head = sum(p.numel() for p in [*model.classifier.parameters(), *model.bert.pooler.parameters()])
    counts = {}
    for rest in ("trained", "frozen"):
        trained = attach_to_mlp(make_run(method=method, rest=rest), bert())
        values = sum(p.numel() for p in trained.adapter)
        assert trained.counts["model"] == values + (total - in_targets if rest == "trained" else head)
        assert trained.counts["layer"] == pytest.approx(values / 4, abs=0.5)
        assert trained.counts["layer_entries"] == 32 * 64
        counts[rest] = values
    assert counts["trained"] == counts["frozen"]
    if method == "full":
        assert counts["trained"] == in_targets


@pytest.mark.parametrize("method", [name for name in GLUE_METHODS if "dynamic" not in name and name != "full"])
def test_a_number_of_values_is_as_good_as_a_density(method):
    by_number = attach_to_mlp(make_run(method=method, num_values=96), bert())
    assert by_number.counts["layer_in_step"] == 96


def test_more_values_than_entries():
    with pytest.raises(InputError, match=r"--num-values 2,049 is more than the 2,048 of a target layer"):
        attach_to_mlp(make_run(num_values=2049), bert())


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize(
    ("config", "density", "full", "lora", "layer"),
    [
        (BertConfig(num_labels=2), 0.0114, 109, 53, 0.03),  # tables 4 and 9
        (RobertaConfig(num_labels=2, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1), 0.0114,
         125, 68, 0.03),  # tables 4 and 10
    ],
    ids=["BERT", "RoBERTa"],
)  # fmt: skip
def test_trained_parameters_of_the_papers_tables(config, density, full, lora, layer):
    counts = attach_to_mlp(make_run(method="full", rest="trained"), on_meta(config)).counts
    assert round(counts["model"] / 1e6) == full
    assert counts["layer_entries"] == 768 * 3072
    counts = attach_to_mlp(make_run(method="lora", rest="trained", density=density), on_meta(config)).counts
    assert int(counts["model"] / 1e6) == lora
    assert counts["layer"] == 7 * (768 + 3072)  # rank 7, section 5.1
    assert round(counts["layer"] / 1e6, 2) == layer


def test_sparsegrad_trains_as_much_of_berts_layers_as_lora():
    config = BertConfig(num_labels=2, num_hidden_layers=1, vocab_size=8)
    run = make_run(method="lora", rest="trained", density=0.0114)
    lora = attach_to_mlp(run, AutoModelForSequenceClassification.from_config(config)).counts
    run = make_run(method="sparsegrad", rest="trained", density=0.0114)
    ours = attach_to_mlp(run, AutoModelForSequenceClassification.from_config(config)).counts
    assert ours["layer"] == pytest.approx(lora["layer"], rel=0.001)
    assert ours["model"] - 2 * ours["layer"] == lora["model"] - 2 * lora["layer"]


@pytest.mark.parametrize("method", [name for name in GLUE_METHODS if name != "full"])
def test_the_adapter_holds_everything_that_trains(tmp_path, method):
    trained = attach_to_mlp(make_run(method=method, rest="trained"), bert())
    optimizer = torch.optim.SGD([*trained.adapter, *trained.rest], lr=0.5)
    for _ in range(40):  # SparseGrad's and MeProp's warm-up has 32 passes
        trained.model.train()
        trained.model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
    with torch.no_grad():
        expected, found = (model(input_ids=BATCH["input_ids"]).logits for model in (trained.model, loaded))
        assert torch.equal(expected, found)
        assert not torch.allclose(found, bert().eval()(input_ids=BATCH["input_ids"]).logits, atol=1e-3)


@pytest.mark.parametrize("method", GLUE_METHODS)
def test_a_learning_rate_for_the_methods_own_values(method):
    run = make_run(method=method, rest="trained", lr=1e-5, adapter_lr=1e-3)
    trained = attach_to_mlp(run, bert())
    rates = {p: group["lr"] for group in make_optimizer(run, trained).param_groups for p in group["params"]}
    assert {rates[p] for p in trained.adapter} == {1e-3}
    assert {rates[p] for p in trained.rest} == {1e-5}
    assert len(rates) == len(trained.adapter) + len(trained.rest)
    optimizer = make_optimizer(make_run(method=method, lr=1e-5), trained)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-5}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ("up_proj",),
            r"no module of the model matches target_modules=\['up_proj'\]; name linear layers with --target",
        ),
        (("embeddings",), r"embeddings.*name linear layers with --target-modules"),
    ],
)
@pytest.mark.parametrize("method", ["full", "lora", "sparsegrad"])
def test_modules_that_cannot_be_adapted(method, names, reason):
    with pytest.raises(InputError, match=reason):
        attach_to_mlp(make_run(method=method, target_modules=names), bert())


def test_a_module_that_mixes_targets_and_parameters_of_its_own():
    model = bert()
    model.bert.encoder.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(InputError, match=r"bert\.encoder has parameters besides its layers"):
        modules_besides(model, target_layers(model, None), rest_trains=True)


def test_a_head_for_other_labels_becomes_a_new_one(tmp_path):
    bert(num_labels=3).save_pretrained(tmp_path)
    model = build_model(make_run(model=str(tmp_path), method="lora", task="stsb"), TASKS["stsb"]).model
    assert model(input_ids=BATCH["input_ids"]).logits.shape == (4, 1)
