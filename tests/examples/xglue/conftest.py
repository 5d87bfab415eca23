"""A tiny encoder and made-up files, and the options that use them."""

from __future__ import annotations

from pathlib import Path

import pytest
from xglue_files import write_benchmark

from examples.xglue import tiny_encoder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    write_benchmark(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tiny_encoder.main(["--data", str(data), "--out", str(folder)])
    return folder


@pytest.fixture
def options(data, encoder, tmp_path) -> list[str]:
    given = {"data": data, "model": encoder, "out": tmp_path / "out", "languages": "en", "batch-size": 2}
    given |= {"max-length": 48, "lr": 1e-3, "epochs": 2}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]
