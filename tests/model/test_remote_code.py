"""The model folder as remote code: what it may import, and loading with and without the package and trust."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import random_ids, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_moe
from hf_moe.upcycling import upcycle

sys.path.insert(0, str(Path(__file__).parents[1] / "upcycling"))

from dense import save_dense

PACKAGE = Path(hf_moe.__file__).parent
MODEL = PACKAGE / "model"
MODEL_MAY_IMPORT = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}


def imports_of(path: Path):
    """(level, module) of every import statement in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module


@pytest.mark.parametrize("path", sorted(MODEL.glob("*.py")), ids=lambda path: path.name)
def test_model_folder_imports_only_itself_torch_and_transformers(path):
    for level, module in imports_of(path):
        if level == 0:
            assert module.partition(".")[0] in MODEL_MAY_IMPORT
        else:
            # `from ..x`, `from . import x` and subfolders do not survive the copy beside the weights.
            assert level == 1
            assert (MODEL / f"{module}.py").exists()
    assert [entry for entry in MODEL.iterdir() if entry.is_dir() and entry.name != "__pycache__"] == []


def run_without_package(code: str, folder: Path, scratch: Path) -> str:
    """Standard output of a process in which `import hf_moe` fails."""
    code = f"import sys; sys.modules['hf_moe'] = None; folder = {str(folder)!r}\n{code}"
    environment = os.environ | {"HF_HOME": str(scratch), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=scratch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_PACKAGE = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
    try:
        auto.from_pretrained(folder, trust_remote_code=False)  # None would ask on the terminal
    except ValueError as error:
        print(str(error).replace(chr(10), " "))
ids = torch.load(folder + "/ids.pt")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
print(type(model).__module__.split(".")[0], model.config._experts_implementation)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
print(type(base).__name__)
with torch.no_grad():
    torch.save((model(ids).logits, base(ids).last_hidden_state), folder + "/outputs.pt")
classifier = AutoModelForSequenceClassification.from_config(model.config, trust_remote_code=True)
print(type(classifier).__name__, classifier(ids).logits.shape[-1])
model.save_pretrained(folder + "/again")
"""


def saved(folder: Path) -> Path:
    """A model of random weights, saved as a trainer does."""
    tiny_model("deepseek_v3").save_pretrained(folder)
    return folder


def upcycled(folder: Path) -> Path:
    """A dense model made a mixture of unequal experts."""
    source = save_dense(folder.parent / "dense")
    return upcycle(source, folder, mode="drop", experts=4, top_k=2, progress=False)


@pytest.mark.parametrize("make", [saved, upcycled])
@torch.no_grad()
def test_four_cells_of_package_and_trust(make, tmp_path):
    folder, ids = make(tmp_path / "checkpoint"), random_ids(2, 9)
    torch.save(ids, folder / "ids.pt")
    model = hf_moe.HfMoeForCausalLM.from_pretrained(folder)
    expected = model(ids).logits, model.model(ids).last_hidden_state
    copied = {path.name for path in folder.glob("*.py")}
    assert copied == {path.name for path in MODEL.glob("*.py")} - {"__init__.py"}

    # With the package its classes win, trusted or not.
    for trust in (False, True):
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        base = AutoModel.from_pretrained(folder, trust_remote_code=trust)
        assert (type(loaded), type(base)) == (hf_moe.HfMoeForCausalLM, hf_moe.HfMoeModel)
        assert loaded(ids).logits.equal(expected[0])
        assert base(ids).last_hidden_state.equal(expected[1])

    # Without it: refused by name, or the same numbers to the bit from the files beside the weights.
    *untrusted, origin, base_name, head = run_without_package(WITHOUT_PACKAGE, folder, tmp_path).splitlines()
    assert len(untrusted) == 3
    for message in untrusted:
        assert "trust_remote_code=True" in message
        assert str(folder) in message
    assert origin == "transformers_modules grouped_mm"
    assert base_name == "HfMoeModel"
    assert head == "HfMoeForSequenceClassification 2"
    for actual, wanted in zip(torch.load(folder / "outputs.pt"), expected, strict=True):
        assert actual.equal(wanted)

    # What remote code saved is a checkpoint like ours, with the files again.
    again = AutoModelForCausalLM.from_pretrained(folder / "again")
    assert again(ids).logits.equal(expected[0])
    assert {path.name for path in (folder / "again").glob("*.py")} == copied


def test_every_head_is_named_for_the_hub():
    config = tiny_config()
    assert config.auto_map["AutoModelForSequenceClassification"] == "modeling_hf_moe.HfMoeForSequenceClassification"
    for reference in config.auto_map.values():
        file, name = reference.split(".")
        assert (MODEL / f"{file}.py").exists()
        assert hasattr(hf_moe, name)
    assert type(AutoModelForSequenceClassification.from_config(config)) is hf_moe.HfMoeForSequenceClassification
