"""The model card: what it says is so, its snippet runs, and it leaves the user's own words alone."""

import ast
import html
import re
from pathlib import Path

import pytest
import torch
from fresh import run_program
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import batch, bert, llama, train
from torch import nn

from peft_sparsegrad import GradDropConfig, SparseGradConfig
from peft_sparsegrad.common.files.model_card import with_section

TESTS = Path(__file__).parents[1]


def sparsegrad(base=None, **settings):
    settings = {"density": 0.05, "warmup_steps": 0, "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(llama() if base is None else base, SparseGradConfig(**settings))


def row(card: str, label: str) -> str:
    return re.search(rf"^\| {label} \| (.*) \|$", card, re.MULTILINE)[1]


def snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_says_what_the_adapter_is(tmp_path):
    model = sparsegrad(renewal_steps=7, target_modules=["up_proj"], exclude_modules=["layers.2.mlp.up_proj"])
    model.peft_config["default"].base_model_name_or_path = "some/model"
    train(model)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert row(card, "method").startswith("SparseGrad (Chekalina")
    assert row(card, "base model") == "`some/model`"
    assert row(card, "adapted modules") == "`up_proj`"
    assert row(card, "trainable parameters") == f"{model.get_nb_trainable_parameters()[0]:,}" == "204"
    assert row(card, "bytes of the tensors") == f"{sum(tensor.nbytes for tensor in tensors.values()):,}"
    assert "`import peft_sparsegrad`; without it PEFT says `KeyError: 'SPARSEGRAD'`" in card
    for setting in ("`density=0.05`", "`renewal_steps=7`", "`exclude_modules=['layers.2.mlp.up_proj']`"):
        assert setting in row(card, "settings")


def test_counts_what_is_saved_in_full_and_what_graddrop_trains(tmp_path):
    base, config = bert(num_labels=3), {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    model = get_peft_model(base, GradDropConfig(target_modules=["query"], save_density=0.1, **config))
    model(**{**batch(), "labels": torch.arange(8) % 3}).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert row(
        card, "trainable parameters"
    ) == f"{2 * (32 * 32 + 32):,} and 99 in other modules, saved in full".replace(" and", ", and", 1)
    assert row(card, "bytes of the tensors") == f"{sum(tensor.nbytes for tensor in tensors.values()):,}"
    assert "KeyError: 'GRADDROP'" in card
    assert "num_labels=3" in snippet(card)
    assert card.count("## What was left out of this file") == 1


def test_snippets_run_in_a_fresh_process(tmp_path, monkeypatch):
    """One with a relative path to its base, one whose head has its own number of labels, one without a task."""
    monkeypatch.chdir(tmp_path)
    expected = {}
    bases = {"language": (llama(), "CAUSAL_LM"), "labels": (bert(num_labels=3), "SEQ_CLS"), "plain": (llama(), None)}
    for name, (base, task) in bases.items():
        base.save_pretrained(f"models/{name}")
        again = type(base).from_pretrained(f"models/{name}")
        heads = ["classifier"] if task == "SEQ_CLS" else None
        if name == "plain":
            model = get_peft_model(again, GradDropConfig(target_modules=["up_proj"], init_weights=False))
        else:
            model = sparsegrad(again, task_type=task, modules_to_save=heads, init_weights=False)
        model.save_pretrained(f"runs/{name}")
        inputs = {key: value for key, value in batch().items() if key != "labels"}
        with torch.no_grad():
            expected[name] = model.eval()(**inputs).logits
    torch.save((inputs, expected), "expected.pt")
    code = """
import os, re, torch
inputs, expected = torch.load("expected.pt")
root = os.getcwd()
for name, logits in expected.items():
    os.chdir(f"{root}/runs/{name}")
    names = {}
    exec(re.search(r"```python\\n(.*?)```", open("README.md", encoding="utf-8").read(), re.DOTALL)[1], names)
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(**inputs).logits, logits), name
"""
    done = run_program("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'LlamaForCausalLM.from_pretrained("../../models/plain")' in Path("runs/plain/README.md").read_text("utf-8")


def test_second_save_rewrites_the_section_and_keeps_the_users_words(tmp_path):
    model = sparsegrad()
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    text = path.read_text("utf-8")
    own = text.replace("# Model Card for Model ID", "# My adapter\n\nIt sings.") + "\n## Results\n\n0.9\n"
    path.write_text(own, "utf-8")
    model.save_pretrained(tmp_path)
    assert path.read_text("utf-8").rstrip() == own.rstrip()
    model.peft_config["default"].renewal_steps = 3
    model.save_pretrained(tmp_path)
    assert path.read_text("utf-8").rstrip() == own.replace("renewal_steps=25", "renewal_steps=3").rstrip()
    assert path.read_text("utf-8").count("## SparseGrad adapter") == 1


def test_section_goes_in_front_of_the_first_heading_outside_of_code():
    text = "# Mine\n\n```bash\n## no heading\n```\n\n## Results\n\n## More"
    placed = with_section(text, "## Section")
    assert placed.index("## no heading") < placed.index("## Section") < placed.index("## Results")
    assert placed.replace(placed[placed.index("<!--") : placed.index("## Results")], "") == text
    assert with_section("# Mine", "S").startswith("# Mine\n\n<!--")
    again = with_section(with_section(text, r"first \1"), r"second \g<0>")
    assert "first" not in again
    assert again == with_section(text, r"second \g<0>")


def test_each_of_several_adapters_has_its_own_card(tmp_path):
    model = sparsegrad()
    model.add_adapter("other", SparseGradConfig(density=0.02, warmup_steps=0))
    model.save_pretrained(tmp_path)
    first, other = (Path(tmp_path, name, "README.md").read_text("utf-8") for name in ("", "other"))
    assert "density=0.05" in first
    assert "density=0.02" not in first
    assert "density=0.02" in other
    assert other.startswith("---\n")
    assert "library_name: peft" in other
    assert row(first, "trainable parameters") != row(other, "trainable parameters")
    model.save_pretrained(tmp_path)
    assert Path(tmp_path, "other", "README.md").read_text("utf-8") == other


def test_other_ranks_write_nothing(tmp_path):
    sparsegrad().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.rglob("README.md"))


def test_configuration_saved_by_itself_has_no_card(tmp_path):
    model = sparsegrad()
    model.save_pretrained(tmp_path / "adapter")
    model.peft_config["default"].save_pretrained(tmp_path / "config")
    assert not (tmp_path / "config" / "README.md").exists()


def test_adapter_of_transformers_has_a_card(tmp_path):
    model = llama()
    model.add_adapter(SparseGradConfig(density=0.05, warmup_steps=0))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert row(card, "bytes of the tensors") == f"{sum(tensor.nbytes for tensor in tensors.values()):,}"
    assert "from transformers import LlamaForCausalLM" in snippet(card)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.last(self.first(x))


def test_model_that_cannot_be_loaded_by_name_is_left_to_the_reader(tmp_path):
    config = SparseGradConfig(warmup_steps=0, target_modules="first|last")
    get_peft_model(Tower(), config).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "base = ...  # the Tower that was adapted, with its weights" in snippet(card)
    assert row(card, "base model") == "without a name"
    assert row(card, "adapted modules") == r"`first\|last`"
    assert PeftModel.from_pretrained(Tower(), tmp_path) is not None


NAMES = [
    "a\n## Danger\n<script>alert(1)</script>",
    "x`y|z",
    "a\\|b",
    "ends in \\",
    "<!-- peft_sparsegrad: end -->",
    "---\n\n```\n# Danger",
    "quote\" and 'quote'",
    "[link](https://example.org) ![i](x) &lt; *b* _i_ \u2028 \U0001f600",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_from_outside_are_only_text(tmp_path, name):
    """In the table, in the code and in the front matter; also in a second save of the same card."""
    model = sparsegrad(target_modules=["up_proj"])
    plain = sparsegrad(target_modules=["up_proj"])
    plain.peft_config["default"].base_model_name_or_path = "name"
    plain.save_pretrained(tmp_path / "plain")
    model.peft_config["default"].base_model_name_or_path = name
    model.peft_config["default"].revision = name
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card, expected = (path.read_text("utf-8") for path in (tmp_path / "README.md", tmp_path / "plain" / "README.md"))
    headings = re.compile(r"^(#+ .*|\|.*?\|.*?\||```.*|---)$", re.MULTILINE)
    assert [line[:12] for line in headings.findall(card)] == [line[:12] for line in headings.findall(expected)]
    assert "<script" not in card
    assert card.count("<!-- peft_sparsegrad: end -->") == 1
    cell = row(card, "base model")
    assert not re.search(r"(?<!\\)(\\\\)*\|", cell), "a bar that ends the cell"
    shown = re.sub(r"[\n\u2028]+", " ", name)
    if cell.startswith("<code>"):
        assert html.unescape(cell.removeprefix("<code>").removesuffix("</code>")) == shown
    else:
        assert cell == f"`{shown}`".replace("|", "\\|")
    call = ast.parse(snippet(card)).body[-2].value
    assert ast.literal_eval(call.args[0]) == ast.literal_eval(call.keywords[0].value) == name


def test_class_that_cannot_be_written_as_code_is_not(tmp_path):
    base = type("Tower\n## Danger", (Tower,), {"from_pretrained": None})()
    get_peft_model(base, SparseGradConfig(warmup_steps=0, target_modules="first|last")).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "base = ...  # the Tower_Danger that was adapted" in snippet(card)
    assert "\n## Danger" not in card


def test_many_targets_are_cut_short(tmp_path):
    names = [f"layers.{i}.mlp.{name}" for i in range(3) for name in ("up_proj", "gate_proj", "down_proj")]
    sparsegrad(target_modules=names).save_pretrained(tmp_path)
    targets = row((tmp_path / "README.md").read_text("utf-8"), "adapted modules")
    assert targets.count("`") == 16
    assert targets.endswith(" and 1 more")


@pytest.mark.parametrize("kind", ["copy", "pickle"])
def test_configuration_is_copied_and_pickled_as_before(tmp_path, kind):
    import copy
    import pickle

    model = sparsegrad()
    model.base_model._get_adapter_state_dict(model, model.peft_config["default"], "default", model.state_dict(), [])
    config = model.peft_config["default"]
    again = copy.deepcopy(config) if kind == "copy" else pickle.loads(pickle.dumps(config))
    assert again == config
    assert "card_facts" not in again.to_dict()
