"""The script that makes a task of film reviews: clear ratings, no sentence twice."""

import io
import json
import sys
import tarfile

import get_reviews
import pytest


def packed(path, name, content):
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def archive(tmp_path):
    rated = [f"{i}\t{(-1) ** i * (0.1 + i % 4)}\tSentence {i % 1900} is here." for i in range(2000)]
    inner = packed(tmp_path / "inner.tar.gz", get_reviews.REVIEWS, "\r\n".join(rated).encode())
    packed(tmp_path / "package.tar.gz", get_reviews.DATA, inner)
    return tmp_path / "package.tar.gz"


def test_splits_of_clear_sentences(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "reviews"), f"--archive={archive}"])
    get_reviews.main()
    splits = {}
    for split, size in get_reviews.SIZES.items():
        lines = (tmp_path / "reviews" / f"{split}.jsonl").read_text().splitlines()
        splits[split] = {json.loads(line)["prompt"]: json.loads(line)["completion"] for line in lines}
        assert len(splits[split]) == size
    assert len(set().union(*splits.values())) == sum(get_reviews.SIZES.values())
    for rows in splits.values():
        for prompt, completion in rows.items():
            number = int(prompt.split()[2])
            assert number % 4 != 0  # their ratings are 0.1 and -0.1
            assert completion == (" negative" if number % 2 else " positive")
    with pytest.raises(SystemExit, match="exists"):
        get_reviews.main()
