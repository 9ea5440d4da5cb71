"""Run Transformers' own common tests against this package, and compare their outcome with transformers_suite.md.

    python tests/transformers_suite/run.py [--update] [-k EXPRESSION]

The tests come from the source distribution of the installed Transformers version, which is downloaded once into
`.cache/transformers_suite`. What the distribution lacks is in `stand_ins`.
"""

import argparse
import collections
import difflib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REPORT = HERE.parent / "transformers_suite.md"
CACHE = ROOT / ".cache" / "transformers_suite"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
# The suite's own imports that the package does not need.
SUITE_REQUIREMENTS = ["parameterized==0.9.0", "torchao==0.18.0"]


def fetch(version: str) -> Path:
    """Folder that holds `tests/` of Transformers' source distribution, our stand-ins and what the tests import."""
    folder = CACHE / version
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as download:
            source = ["--no-deps", "--no-binary", "transformers", f"transformers=={version}"]
            subprocess.run([*PIP, "download", *source, "-d", download], check=True)
            with tarfile.open(next(Path(download).glob("*.tar.gz"))) as archive:
                for member in archive.getmembers():
                    member.name = member.name.partition("/")[2]
                    if member.name.startswith("tests/"):
                        archive.extract(member, folder, filter="data")
        subprocess.run([*PIP, "install", "--no-deps", "--target", folder / "site", *SUITE_REQUIREMENTS], check=True)
        (folder / "complete").touch()
    shutil.copytree(HERE / "stand_ins", folder / "tests", dirs_exist_ok=True)
    for package in (folder / "tests", folder / "src" / "transformers"):
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
    return folder


def make_tiny_models(folder: Path) -> None:
    """One small random checkpoint with a tokenizer for each head, laid out as the pipeline tests expect."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import hf_moe

    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", *map(str, range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    summary = {}
    for head in ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
        name = f"HfMoe{head}"
        config = hf_moe.HfMoeConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            max_position_embeddings=64,
            pad_token_id=0,
            num_labels=3,
            label2id={"contradiction": 0, "entailment": 1, "neutral": 2},
            id2label={0: "contradiction", 1: "entailment", 2: "neutral"},
        )
        model = getattr(hf_moe, name)(config)
        model.save_pretrained(folder / "hf_moe" / name)
        fast.save_pretrained(folder / "hf_moe" / name)
        summary[name] = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))


def run_suite(folder: Path, pytest_arguments: list[str]) -> list[dict]:
    """Outcome of every test as {name, outcome, reason}; the tests' own output goes to the terminal."""
    with tempfile.TemporaryDirectory() as scratch:
        make_tiny_models(Path(scratch))
        outcomes = Path(scratch) / "outcomes.jsonl"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, [HERE, folder, folder / "site", ROOT])),
            "TRANSFORMERS_TINY_MODEL_PATH": scratch,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "RUN_TRAINING_TESTS": "1",
            "HF_MOE_OUTCOMES": str(outcomes),
        }
        command = [sys.executable, "-m", "pytest", HERE / "suite.py", "-p", "record_outcomes", "-c", os.devnull]
        command += ["--rootdir", HERE, "-p", "no:cacheprovider", "-q", "--disable-warnings", "--tb=short", "-n", "2"]
        code = subprocess.run([*command, *pytest_arguments], env=environment, cwd=scratch).returncode
        if code not in (0, 1):
            sys.exit(f"pytest ended with {code}")
        return [json.loads(line) for line in outcomes.read_text().splitlines()]


def report(version: str, outcomes: list[dict]) -> str:
    """The outcome as Markdown: counts, then every skipped test under its reason."""
    counts = collections.defaultdict(collections.Counter)
    reasons = collections.defaultdict(set)
    for outcome in outcomes:
        suite, _, test = outcome["name"].partition(".")
        counts[suite][outcome["outcome"]] += 1
        if outcome["outcome"] == "skipped":
            # Which of its libraries another modality's pipeline misses first depends on the machine.
            reason = "a pipeline of another modality or head" if test.startswith("test_pipeline") else outcome["reason"]
            reasons[reason].add(f"`{test}`")
    lines = [
        "# Transformers' own tests",
        "",
        f"`make transformers-suite` runs the common tests of Transformers {version} (modelling, configuration,",
        "pipelines, training, tensor, expert and data parallelism) against this package's classes on CPU, without a",
        "failure, and compares the outcome with this file; `python tests/transformers_suite/run.py --update` writes",
        "it. Two tiny configurations: `Latent` is DeepSeek-V3's form, `Grouped` a grouped-query model in latent form.",
        "",
        "| configuration | passed | skipped |",
        "|---|---|---|",
        *(f"| {suite} | {count['passed']} | {count['skipped']} |" for suite, count in sorted(counts.items())),
        "",
        "## Skipped, by reason",
        "",
    ]
    for reason, names in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
        lines += [f"- {reason}: {', '.join(sorted(names))}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the outcome instead of comparing it")
    parser.add_argument("-k", dest="expression", help="run only matching tests, and compare nothing")
    arguments = parser.parse_args()

    sys.path.insert(0, str(ROOT))
    import transformers

    folder = fetch(transformers.__version__)
    outcomes = run_suite(folder, ["-k", arguments.expression] if arguments.expression else [])
    failed = [outcome["name"] for outcome in outcomes if outcome["outcome"] == "failed"]
    if failed:
        sys.exit(f"{len(failed)} of Transformers' tests fail: {', '.join(failed)}")
    if arguments.expression:
        return
    text = report(transformers.__version__, outcomes)
    if arguments.update:
        REPORT.write_text(text)
    elif text != (recorded := REPORT.read_text()):
        sys.stderr.writelines(difflib.unified_diff(recorded.splitlines(True), text.splitlines(True), "recorded", "now"))
        sys.exit(f"the outcome differs from {REPORT.name}; see the difference above, or run with --update")


if __name__ == "__main__":
    main()
