"""Real text for continued pre-training: the manuals in Debian packages, as SmolLM2's tokens.

    apt-get update && python examples/continued/prepare_text.py .data

writes `train.npy.xz` and `heldout.npy.xz`: uint16 token ids, documents in a shuffled order, each ended by the
tokenizer's end token. No held-out document is a training document, and no paragraph stands in the text twice. Reads
`packages.txt`. Needs Debian (tried on version 12), 4 GB of disk and about ten minutes.
"""

import argparse
import gzip
import hashlib
import html
import lzma
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from hf_moe.demo.run import packaged_checkpoint
from hf_moe.upcycling import open_source

PACKAGES = Path(__file__).with_name("packages.txt").read_text().split()
SUFFIXES = {".html", ".xhtml", ".page", ".docbook", ".txt", ".rst", ".pod", ".gz", ".dz"}
# No package may outweigh the others.
MOST_CHARACTERS, SHORTEST, HELD_OUT_TOKENS, SEED = 2_100_000, 1000, 400_000, 0
BLOCK = re.compile(r"(?i)</?(?:p|div|h\d|li|tr|dt|dd|dl|ul|ol|table|title|section|para|note|item|br)\b[^>]*>")
COMMON = re.compile(r"\b(?:the|of|to|and|is|in|that|be|for|it)\b")


def plain(markup: str) -> list[str]:
    """Paragraphs of an HTML or XML page; line breaks survive in <pre> alone."""
    markup = re.sub(r"(?is)<(script|style|head|nav|header|footer)\b.*?</\1\s*>|<!--.*?-->", " ", markup)
    paragraphs = []
    for i, part in enumerate(re.split(r"(?is)<pre\b[^>]*>(.*?)</pre\s*>", markup)):
        part = html.unescape(re.sub(r"<[^<>]+>", "", BLOCK.sub("\0", part)))
        if i % 2:
            paragraphs.append(part.replace("\0", "\n").strip("\n"))
        else:
            paragraphs += [re.sub(r"\s+", " ", paragraph).strip() for paragraph in part.split("\0")]
    return paragraphs


def documents(root: Path) -> Iterator[list[str]]:
    """The paragraphs of each readable file under a folder."""
    for path in sorted(root.rglob("*")):
        if path.suffix not in SUFFIXES or path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode("utf-8", errors="ignore")
        if "\0" not in text:
            yield plain(text) if re.search(r"(?i)</(?:p|title|section)>", text) else text.split("\n\n")


def english(text: str) -> bool:
    """Prose has these words; tables of symbols and other languages do not."""
    words = text.count(" ") + 1
    return len(COMMON.findall(text)) > 0.1 * words and sum(map(str.isascii, text[:20000])) > 0.98 * len(text[:20000])


def collect(folder: Path, package: str, seen: set[bytes]) -> list[str]:
    """A package's documents, without the paragraphs that came before, in any package."""
    subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    root = folder / package
    subprocess.run(["dpkg-deb", "-x", *folder.glob(f"{package}_*.deb"), root], check=True)
    found = []
    for paragraphs in documents(root):
        kept = []
        for paragraph in filter(None, paragraphs):
            digest = hashlib.blake2b(paragraph.encode(), digest_size=8).digest()
            if digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) >= SHORTEST and english(text):
            found.append(text)
    random.Random(SEED).shuffle(found)
    size, chosen = 0, []
    for text in found:
        if size >= MOST_CHARACTERS:
            break
        size += len(text)
        chosen.append(text)
    print(f"{package}: {len(chosen)} documents, {size:,} characters", flush=True)
    return chosen


def main(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        texts = [text for package in PACKAGES for text in collect(Path(folder), package, seen)]
    random.Random(SEED).shuffle(texts)
    tokenizer = AutoTokenizer.from_pretrained(**open_source(packaged_checkpoint()).load_arguments())
    end = tokenizer.eos_token_id
    rows: list[np.ndarray] = []
    for i in range(0, len(texts), 1000):
        rows += [np.array([*ids, end], np.uint16) for ids in tokenizer(texts[i : i + 1000])["input_ids"]]
    total = np.cumsum([len(row) for row in rows])
    cut = int(np.searchsorted(total, HELD_OUT_TOKENS)) + 1
    for name, part in (("heldout", rows[:cut]), ("train", rows[cut:])):
        tokens = np.concatenate(part)
        with lzma.open(output / f"{name}.npy.xz", "wb", preset=6) as file:
            np.save(file, tokens)
        print(f"{name}: {len(part)} documents, {len(tokens):,} tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the two files")
    main(parser.parse_args().output)
