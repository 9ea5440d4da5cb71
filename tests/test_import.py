"""What importing costs and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto

import hf_moe

PACKAGE = Path(hf_moe.__file__).parent

# A folder may import itself and what stands in its row. No folder may import the command line.
ARROWS = {
    "model": set(),
    "kernels": {"model"},
    "training": {"model", "kernels"},
    "upcycling": {"model", "kernels", "training", "cost"},
    "demo": {"model", "kernels", "training", "upcycling", "cost"},
    "cli": {"model", "kernels", "training", "upcycling", "cost", "demo"},
}


def imported_parts(file: Path) -> set[str]:
    """First name below hf_moe of everything that a file imports, at its top or inside a function."""
    package = ("hf_moe", *file.relative_to(PACKAGE).parent.parts)
    parts = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            names = [f"{base}{node.module or ''}"] if node.module else [f"{base}{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("hf_moe.")}
    return parts


@pytest.mark.parametrize("folder", ARROWS)
def test_arrows_point_one_way(folder):
    for file in sorted((PACKAGE / folder).rglob("*.py")):
        forbidden = imported_parts(file) - ARROWS[folder] - {folder}
        assert not forbidden, f"{file.relative_to(PACKAGE)} imports {sorted(forbidden)}"


def test_every_folder_has_its_row():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ARROWS)


def test_import_is_inert():
    # Transformers comes first: what it loads and asks the device for is its own affair.
    code = """
import sys, torch
import transformers.generation, transformers.integrations.moe, transformers.modeling_layers, transformers.masking_utils
before = set(sys.modules)
def refuse(*args): raise AssertionError("device query at import")
torch.cuda.is_available = torch.cuda.get_device_capability = torch.cuda.current_device = refuse
import hf_moe
print(sorted(set(sys.modules) - before))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in ast.literal_eval(result.stdout.strip().splitlines()[-1])}
    assert loaded.isdisjoint({"triton", "peft", "matplotlib", "reasoning_gym", "typer", "rich", "gguf"})


def test_auto_classes_and_name_tables_know_the_model():
    assert AutoModelForCausalLM._model_mapping[hf_moe.HfMoeConfig] is hf_moe.HfMoeForCausalLM
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hf_moe"] == "HfMoeForCausalLM"
    assert modeling_auto.MODEL_MAPPING_NAMES["hf_moe"] == "HfMoeModel"
