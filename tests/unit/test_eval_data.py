"""What the evaluation is made of: documents, far copies, plans on the command line, figures."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ConfigError
from service.evaluation.data import Answers, Data, Sizes, far_copies, make_data
from service.evaluation.documents import Document, read_documents
from service.evaluation.measure import Measured, accuracies, loss_differences, losses
from service.evaluation.plans import plan_settings, resolve, with_plan


def test_documents_of_every_form(tmp_path: Path) -> None:
    rows = [{"package": "p", "path": "a.py", "text": "one"}, {"text": "two"}, {"text": ""}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "d.jsonl").write_text(lines)
    (tmp_path / "d.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    expected = [Document("p/a.py", "one"), Document("line 2", "two")]
    assert read_documents(tmp_path / "d.jsonl") == read_documents(tmp_path / "d.jsonl.xz") == expected
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "b.py").write_text("b")
    (tree / "a.md").write_text("a")
    (tree / "c.png").write_bytes(b"\xff\xfe")
    assert read_documents(tree) == [Document("a.md", "a"), Document("sub/b.py", "b")]
    assert read_documents(tree / "a.md") == [Document("a.md", "a")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "absent.txt cannot be read"),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', "bad.jsonl, line 2 is not JSON"),
        ("bad.jsonl", b'{"body": "a"}\n', 'line 1 needs "text", a string'),
        ("bad.jsonl.xz", b"no archive", "cannot be read"),
        ("empty.txt", b"", "holds no text"),
    ],
)
def test_documents_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_documents(tmp_path / name)


def test_far_copies() -> None:
    seen = [1, 2, 3, 4, *range(10, 20), 1, 2, 3, 4, 1, 2, 3, 4, *range(30, 40), 1, 2, 3, 9]
    far = np.flatnonzero(far_copies(seen, 8))
    # The 4 of the second time; the third is near, and at the end the text goes on otherwise.
    assert far.tolist() == [17]
    assert np.flatnonzero(far_copies(seen, 0)).tolist() == [17, 21]


def data(checkpoint: Path, **sizes: int) -> Data:
    texts = [Document(name, f"{name} = 1\n" * count) for name, count in (("a", 100), ("b", 400), ("c", 500))]
    chosen = {"length": 256, "documents": 8, "examples": 2, "seed": 0, "skip_tokens": 128} | sizes
    return make_data(checkpoint, texts, Sizes(**chosen))  # type: ignore[arg-type]


def test_data_is_fixed_by_its_sizes(checkpoint: Path) -> None:
    first, again, other = data(checkpoint), data(checkpoint), data(checkpoint, seed=1)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.documents == other.documents and first.sequences != other.sequences
    assert {len(ids) for ids in first.documents + first.sequences} == {256}
    # Each begins as a document does, and the texts are whole.
    assert len({ids[0] for ids in first.documents}) == 1
    assert len(data(checkpoint, documents=1).documents) == 1
    assert len(first.answers) == first.answers.task.size > 20 and set(first.answers.task.tolist()) == set(range(5))
    assert first.num_tokens == 256 * (len(first.documents) + 10)
    assert data(checkpoint, examples=0).sequences == [] and data(checkpoint, documents=0).documents == []


def test_data_that_cannot_be_made(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"no document has --length 5000 tokens: the longest of 3 has \d+"):
        data(checkpoint, length=5000)
    with pytest.raises(ConfigError, match=r"the documents have \d+ tokens in all, the tasks need \d+ in a row"):
        data(checkpoint, length=8000, documents=0)
    with pytest.raises(ConfigError, match="length must be at least 64, got 63"):
        data(checkpoint, length=63)
    with pytest.raises(ConfigError, match="there is nothing to evaluate"):
        data(checkpoint, documents=0, examples=0)
    with pytest.raises(ConfigError, match=r"tasks must be of recall.*got 'sums'"):
        Sizes(length=64, documents=1, examples=1, seed=0, skip_tokens=0, tasks=("sums",))


def test_plans_on_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text('{"format": "m3serve-index-plan", "version": 1, "pattern": "FSS"}')
    settings = {"dtype": "float32", "index_topk_freq": 3}
    _, letters = resolve(checkpoint, settings, ["F", "2", "FFS", str(file)])
    assert letters == ["DDFFF", "DDFSF", "DDFFS", "DDFSS"]
    assert resolve(checkpoint, settings, [None])[1] == ["DDFSS"]
    assert with_plan(settings, "2") == {"dtype": "float32", "use_index_cache": True, "index_topk_freq": 2}
    assert plan_settings("1") == plan_settings("F") == {"use_index_cache": False}
    with pytest.raises(ConfigError, match=r"--compare 'absent\.json': expected a number"):
        plan_settings("absent.json")
    with pytest.raises(ConfigError, match="names the plan DDFSF twice"):
        resolve(checkpoint, {}, ["2", "FSF"])
    with pytest.raises(ConfigError, match="needs 3 letters"):
        resolve(checkpoint, {}, ["FS"])


def figures() -> tuple[Data, Measured, Measured]:
    """Two documents of 1024 tokens whose loss is 1 before position 512 and 2 from there on, and 3 in the second
    document under the other plan; four questions."""
    shape = (2, 1024)
    far = np.zeros(shape, dtype=bool)
    far[0, 600] = True
    answers = Answers(
        *np.array([[0, 0, 10, 11, 5, 1], [0, 0, 20, 22, 300, 1], [0, 0, 30, 31, 300, 2], [0, 0, 40, 41, 5, 2]]).T
    )
    made = Data(
        sizes=Sizes(length=1024, documents=2, examples=1, seed=0, skip_tokens=512, tasks=("tracking",)),
        names=["a", "b"],
        documents=[[0] * 1024] * 2,
        token_bytes=np.full(shape, 4),
        far_copy=far,
        sequences=[[0] * 1024],
        answers=answers,
    )
    nats = np.where(np.arange(1024) < 512, np.float32(1), np.float32(2)) * np.ones(shape, dtype=np.float32)
    nats[:, 0] = np.nan
    worse = nats.copy()
    worse[1, 512:] = 3
    base = Measured("F", nats, np.array([True, True, False, True]))
    return made, base, Measured("S", worse, np.array([True, False, False, True]))


def test_losses_by_position() -> None:
    made, base, other = figures()
    rows = {row["part"]: row for row in losses(made, base)}
    assert list(rows) == ["0-512", "512-1k", "from 512 on", "far copies"]
    assert rows["0-512"] == {"part": "0-512", "tokens": 1022, "nats": 1.0, "bits_per_byte": pytest.approx(0.3607, 1e-3)}
    assert (rows["512-1k"]["nats"], rows["far copies"]["tokens"]) == (2.0, 1)
    differences = {row["part"]: row for row in loss_differences(made, base, other)}
    assert differences["0-512"] == {"part": "0-512", "documents": 2, "difference": 0.0, "low": 0.0, "high": 0.0}
    # Of two documents one is worse by 1: drawn anew, both, one or none of them are.
    assert [differences["512-1k"][key] for key in ("difference", "low", "high")] == [0.5, 0.0, 1.0]
    assert differences["far copies"]["documents"] == 1


def test_accuracies_by_distance_and_hops() -> None:
    made, base, _ = figures()
    rows = [(row["distance"], row["hops"], row["questions"], row["accuracy"]) for row in accuracies(made, base)]
    assert rows == [
        ("0-128", None, 2, 1.0),
        ("128-512", None, 2, 0.5),
        ("all", None, 4, 0.75),
        ("all", 1, 2, 1.0),
        ("all", 2, 2, 0.5),
    ]
