"""PEFT's own generic tests, for both methods. They run where `--peft-source` names a checkout of PEFT."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITES = ["custom_models", "config", "decoder_models", "encoder_decoder_models", "feature_extraction_models",
          "seq_classifier", "token_classification_qa"]  # fmt: skip


@pytest.fixture
def peft_source(request):
    source = request.config.getoption("--peft-source")
    if source is None:
        pytest.skip("needs --peft-source, a checkout of PEFT in the installed version")
    if not Path(source, "tests", "test_custom_models.py").is_file():
        pytest.fail(f"--peft-source {source}: there is no tests/test_custom_models.py in it")
    return Path(source).resolve()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("method", ["SparseGrad", "GradDrop"])
def test_peft_s_own_tests_pass(peft_source, method, suite):
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
    options = ["-q", "-p", "rows", "-p", "no:xdist", "-p", "no:cacheprovider", "--import-mode", "importlib"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-c", os.devnull, "--rootdir", ".", f"tests/test_{suite}.py"],
        cwd=peft_source,
        env={**os.environ, "PEFT_SUITE_METHOD": method, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    print(run.stdout[-200:])
    assert run.returncode == 0, run.stdout[-20_000:]
