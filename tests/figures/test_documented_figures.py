"""Every figure in the documents is what the results files give, or has another source that is named."""

import re

import claims_ablation
import claims_cards
import claims_comparison
import claims_energy
import claims_frontier
import claims_gpu
import claims_graddrop
import claims_guides
import claims_printed
import claims_published
import claims_readme
import claims_speed
import claims_verdicts
import claims_versions
import pytest
from documents import DOCUMENTS, ROOT, Claim, figures_without_source

MODULES = (
    claims_ablation,
    claims_cards,
    claims_comparison,
    claims_graddrop,
    claims_energy,
    claims_frontier,
    claims_gpu,
    claims_guides,
    claims_printed,
    claims_published,
    claims_readme,
    claims_speed,
    claims_verdicts,
    claims_versions,
)
CLAIMS = [claim for module in MODULES for claim in module.CLAIMS]
GIVEN = [given for module in MODULES for given in module.GIVEN]


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_figures_are_what_the_results_give(claim):
    assert claim.spans(), f"{claim.document} should say: {claim.sentence}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_figure_is_without_a_source(document):
    assert not (found := figures_without_source(document, [*CLAIMS, *GIVEN])), "\n".join(found)


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_figures_that_nobody_measured_are_still_there(given):
    assert given.spans()
    for file in re.findall(r"\S+\.(?:py|toml)", given.source):
        assert (ROOT / file).exists()


def test_a_figure_that_nothing_gives_is_found():
    others = [each for each in CLAIMS if "of loss on SmolLM2" not in each.template]
    (found,) = figures_without_source("README.md", [*others, *GIVEN])
    assert ">0.005<" in found


def test_a_wrong_figure_is_found():
    right, wrong = (Claim("README.md", "lost {:.3f} of loss", lambda n=n: [n]) for n in (0.0051, 0.0061))
    assert right.spans()
    assert not wrong.spans()
