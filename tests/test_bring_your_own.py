"""The page on adding a family holds: its code, as printed, takes a model nobody thought of through every stage."""

import json
import re
from pathlib import Path

import pytest
import torch
from roads import SAMPLE, make

from pipelines import runner
from pipelines.errors import HqdmError
from pipelines.models.families import FAMILIES
from pipelines.workspace.store import Store

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def code_of_the_page() -> str:
    return re.search(r"```python\n(\"\"\".*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's folder with a tiny AuraFlow transformer and its scheduler, and embeddings of three prompts."""
    from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("auraflow")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AuraFlowTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=3, out_channels=3, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=24, num_attention_heads=2, joint_attention_dim=40, caption_projection_dim=48,
            pos_embed_max_size=64,
        )  # fmt: skip
        embeddings = torch.randn(4, 5, 40)
    network.save_pretrained(root / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.73).save_pretrained(root / "scheduler")
    index = {
        "_class_name": "AuraFlowPipeline",
        "transformer": ["diffusers", "AuraFlowTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    save_file({"encoder_hidden_states": embeddings}, root / "embeddings.safetensors")
    return root


def test_a_family_that_is_not_in_the_table_is_refused_with_the_page_that_helps(folder, tmp_path):
    with pytest.raises(HqdmError, match="AuraFlowTransformer2DModel is not supported") as caught:
        runner.make(Store(tmp_path), "model", runner.model_config(folder))
    assert "docs/families.md" in caught.value.hint


def test_the_code_of_the_page_takes_the_model_through_every_stage(folder, tmp_path, monkeypatch):
    names = {}
    exec(compile(code_of_the_page(), str(PAGE), "exec"), names)
    monkeypatch.setitem(FAMILIES, "auraflow", names["FAMILY"])
    store = Store(tmp_path)
    config = runner.model_config(folder, embeddings=folder / "embeddings.safetensors")
    model = runner.make(store, "model", config).artifact
    roles = {site["role"] for site in json.loads(model.file("sites.json").read_text())}
    assert roles == {"first", "time", "condition", "modulation", "last", "attention", "feed-forward"}
    make(store, "profile", steps=2, batch=1, sample=SAMPLE)
    make(store, "plan")
    make(store, "distill", trajectories=2, batch=1)
    make(store, "export")
    fake, integer = (make(store, "sample", source=source, count=2, steps=2) for source in ("fake", "int"))
    assert fake.digest == integer.digest
