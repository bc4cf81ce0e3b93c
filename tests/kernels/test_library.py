"""docs/kernels.md, which shows the kernels as a library, runs as it is printed; what it asserts holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
HERE = 'device, dtype = "cpu", torch.float32'


def code() -> str:
    """All blocks, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("```python") == 4
    return "\n".join(blocks)


def test_on_a_cpu_as_printed() -> None:
    names: dict[str, object] = {}
    exec(compile(code(), str(PAGE), "exec"), names)
    assert isinstance(names["answer"], torch.Tensor) and names["answer"].isfinite().all()


@pytest.mark.gpu
def test_on_a_gpu_as_it_says() -> None:
    there = HERE.replace('"cpu"', '"cuda"').replace("float32", "bfloat16")
    assert there in PAGE.read_text() and HERE in code()
    names: dict[str, object] = {}
    exec(compile(code().replace(HERE, there), str(PAGE), "exec"), names)
    assert isinstance(names["answer"], torch.Tensor) and names["answer"].isfinite().all()


def test_the_readme_leads_there() -> None:
    assert "docs/kernels.md" in (ROOT / "README.md").read_text()
