"""The model that docs/adding-a-model.md writes works as it says."""

import re
import sys
from pathlib import Path

import torch

from dvexport.models import zoo

GUIDE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


def test_the_guide_s_model_works(tmp_path, monkeypatch):
    source, *_ = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.S)
    (tmp_path / "my_models.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    model = zoo.create("my_models:tiny", classes="12")
    frames = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert model(frames).shape == (3, 12)
        axes = ({0: torch.export.Dim("frames", min=2)},)
        program = torch.onnx.export(model, (frames,), dynamo=True, dynamic_shapes=axes, verbose=False)
    ops = [node.op_type for node in program.model.graph if node.domain == "dv"]
    assert sorted(ops) == ["Delay", "FrameMean", "GatedConv", "GatedConv"]
