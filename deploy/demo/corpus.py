"""The text that m3-nano learns from: Python sources of permissively licensed packages, as registries ship them.

    pip download --no-deps --only-binary=:all: -d WHEELS scipy pandas ...
    python -m deploy.demo.corpus --wheels WHEELS --out DATA

writes into DATA: tokenizer.json, train.*.xz (uint16, documents one after the other), the documents of the packages
that are held out, and corpus.json (package, version, licence, files, bytes, tokens, SHA-256).

Packages are whole or not at all on either side: no file of a held-out package is trained on, nor one that shares text
with it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import lzma
import re
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploy.demo.vocabulary import BEGIN_OF_DOCUMENT, END_OF_TURN, train_code_tokenizer

VOCAB_SIZE = 8192
# Distribution and licence, as its metadata states it. "python" is the standard library of the running interpreter.
TRAIN_PACKAGES = {
    "python": "PSF-2.0",
    "accelerate": "Apache-2.0",
    "aiohttp": "Apache-2.0 AND MIT",
    "astropy": "BSD-3-Clause",
    "attrs": "MIT",
    "black": "MIT",
    "bokeh": "BSD-3-Clause",
    "celery": "BSD-3-Clause",
    "cirq-core": "Apache-2.0",
    "click": "BSD-3-Clause",
    "dask": "BSD-3-Clause",
    "diffusers": "Apache-2.0",
    "distributed": "BSD-3-Clause",
    "django": "BSD-3-Clause",
    "fastapi": "MIT",
    "flask": "BSD-3-Clause",
    "flax": "Apache-2.0",
    "httpx": "BSD-3-Clause",
    "ipython": "BSD-3-Clause",
    "jax": "Apache-2.0",
    "jinja2": "BSD-3-Clause",
    "keras": "Apache-2.0",
    "libcst": "MIT",
    "matplotlib": "PSF-based",
    "mlflow-skinny": "Apache-2.0",
    "moto": "Apache-2.0",
    "mpmath": "BSD-3-Clause",
    "mypy": "MIT",
    "nltk": "Apache-2.0",
    "numba": "BSD-2-Clause",
    "numpy": "BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0",
    "openai": "Apache-2.0",
    "optax": "Apache-2.0",
    "pandas": "BSD-3-Clause",
    "peft": "Apache-2.0",
    "pennylane": "Apache-2.0",
    "pip": "MIT",
    "pydantic": "MIT",
    "pygments": "BSD-2-Clause",
    "pytest": "MIT",
    "qiskit": "Apache-2.0",
    "ray": "Apache-2.0",
    "requests": "Apache-2.0",
    "rich": "MIT",
    "scikit-image": "BSD-3-Clause",
    "scikit-learn": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "scrapy": "BSD-3-Clause",
    "setuptools": "MIT",
    "sphinx": "BSD-2-Clause",
    "sqlalchemy": "MIT",
    "starlette": "BSD-3-Clause",
    "statsmodels": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "torch": "Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSD-2-Clause AND BSD-3-Clause AND BSL-1.0 AND MIT",
    "tornado": "Apache-2.0",
    "transformers": "Apache-2.0",
    "twisted": "MIT",
    "urllib3": "MIT",
    "uvicorn": "BSD-3-Clause",
    "xarray": "Apache-2.0",
}
HELD_OUT_PACKAGES = {
    "calibration": {"trio": "MIT OR Apache-2.0", "werkzeug": "BSD-3-Clause"},
    "test": {"networkx": "BSD-3-Clause"},
}
MAX_FILE_BYTES = 400_000
MAX_PACKAGE_BYTES = 6_500_000
MAX_TEST_SHARE = 0.1
# Files are compressed in parts: a machine that takes only small transfers can do with the first ones.
PART_TOKENS = 8_000_000
_TOKENIZER_BYTES = 40_000_000
# Lines in a row that count as the same text, and the share of a file that may be known already.
_WINDOW = 8
_MAX_REPEATED, _MAX_HELD_OUT = 0.6, 0.02
# No span of so many tokens of a held-out file occurs in training.
_SPAN = 50
_SKIPPED_PARTS = re.compile(
    r"(^|/)(_?vendor(ed)?|_?externals?|extern|_?third_?party(_files)?|thirdparty|generated|site-packages|lib2to3|idlelib"
    r"|pydoc_data|encodings|turtledemo|ensurepip|cpp_api_parity|_inductor/autoheuristic|lexers/_|idna_?data)(/|$)"
)
_LICENCE_WORDS = re.compile(r"GNU (Lesser |Affero )?General Public|\bA?L?GPL\b|Creative Commons|\bMPL\b|Mozilla Public")


@dataclass
class Package:
    """One distribution and what was taken of it. texts: by path inside it, in the order of paths."""

    name: str
    version: str
    licence: str
    texts: dict[str, str] = field(default_factory=dict)

    def row(self, tokens: int) -> dict[str, object]:
        digest = hashlib.sha256()
        for path, text in self.texts.items():
            digest.update(f"{path}\0{text}\0".encode())
        size = sum(len(text.encode()) for text in self.texts.values())
        row = {"package": self.name, "version": self.version, "licence": self.licence, "files": len(self.texts)}
        return row | {"bytes": size, "tokens": tokens, "sha256": digest.hexdigest()}


def read_package(name: str, licence: str, wheels: Path) -> Package:
    """All usable Python files of one package: from its wheel in `wheels`, else as installed here."""
    if name == "python":
        root = Path(sysconfig.get_path("stdlib"))
        paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
        files: Iterable[tuple[str, bytes]] = ((path.relative_to(root).as_posix(), path.read_bytes()) for path in paths)
        return Package(name, sys.version.split()[0], licence, _usable(files))
    for wheel in sorted(wheels.glob("*.whl")):
        distribution, version = wheel.name.split("-")[:2]
        if distribution.replace("_", "-").lower() == name:
            with zipfile.ZipFile(wheel) as archive:
                names = sorted(entry for entry in archive.namelist() if entry.endswith((".py", ".pyi")))
                return Package(name, version, licence, _usable((entry, archive.read(entry)) for entry in names))
    installed = importlib.metadata.distribution(name)
    entries = sorted(str(entry) for entry in installed.files or () if str(entry).endswith((".py", ".pyi")))
    read = ((entry, Path(str(installed.locate_file(entry))).read_bytes()) for entry in entries if ".." not in entry)
    return Package(name, installed.version, licence, _usable(read))


def _usable(files: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    return {path: text for path, data in files if (text := _text_of(path, data)) is not None}


def _text_of(path: str, data: bytes) -> str | None:
    """The file's text, or None: of others, generated, tables of numbers, too long or too short to teach anything."""
    if _SKIPPED_PARTS.search(path) or path.endswith(("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")):
        return None
    if not 200 < len(data) <= MAX_FILE_BYTES:
        return None
    try:
        text = data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    digits = sum(map(text.count, "0123456789"))
    longest = max(map(len, text.split("\n")))
    if longest > 1000 or digits > 0.3 * len(text) or "\0" in text or _LICENCE_WORDS.search(text):
        return None
    return text


def _windows(text: str) -> list[int]:
    lines = [line.strip() for line in text.split("\n") if len(line.strip()) > 3]
    return [hash("\n".join(lines[i : i + _WINDOW])) for i in range(max(1, len(lines) - _WINDOW + 1))]


def drop_repeats(package: Package, seen: set[int], held_out: set[int]) -> None:
    """Keep files that are new; `seen` grows by the windows of those that stay."""
    kept: dict[str, str] = {}
    for path, text in package.texts.items():
        windows = _windows(text)
        repeated = sum(window in seen for window in windows) / len(windows)
        shared = sum(window in held_out for window in windows) / len(windows)
        if repeated <= _MAX_REPEATED and shared <= _MAX_HELD_OUT:
            kept[path] = text
            seen.update(windows)
    package.texts = kept


def cap(package: Package) -> None:
    """Keep at most MAX_PACKAGE_BYTES and a small share of tests, chosen by the hash of the path."""
    ordered = sorted(package.texts, key=lambda path: hashlib.sha256(path.encode()).digest())
    tests = {path for path in ordered if re.search(r"(^|/)(tests?|testing)(/|$)|(^|/)test_|_test\.py$", path)}
    sources = [path for path in ordered if path not in tests]
    kept = set(_first(package, sources, MAX_PACKAGE_BYTES))
    size = sum(len(package.texts[path]) for path in kept)
    kept.update(_first(package, [path for path in ordered if path in tests], int(MAX_TEST_SHARE * size)))
    package.texts = {path: text for path, text in package.texts.items() if path in kept}


def _first(package: Package, paths: list[str], size: int) -> Iterator[str]:
    for path in paths:
        size -= len(package.texts[path])
        if size < 0:
            return
        yield path


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> list[NDArray[np.uint16]]:
    """Each document's tokens, uint16, between the begin-of-document token and the end-of-turn token."""
    begin, end = (tokenizer.token_to_id(token) for token in (BEGIN_OF_DOCUMENT, END_OF_TURN))
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array([begin, *encoding.ids, end], dtype=np.uint16) for encoding in encodings]


def span_hashes(tokens: NDArray[np.uint16]) -> NDArray[np.uint64]:
    """A hash per span of _SPAN tokens; equal spans have equal hashes."""
    with np.errstate(over="ignore"):
        mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        # Of prefix sums, each weighted by an odd power, so that a span's sum can be shifted to a common place.
        base, inverse = 0xD6E8FEB86659FD93, pow(0xD6E8FEB86659FD93, -1, 2**64)
        count = len(tokens)
        powers = np.cumprod(np.full(count, base, dtype=np.uint64))
        inverses = np.cumprod(np.full(count, inverse, dtype=np.uint64))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed * powers)])
        if count < _SPAN:
            return np.zeros(0, np.uint64)
        spans: NDArray[np.uint64] = (sums[_SPAN:] - sums[:-_SPAN]) * inverses[: count - _SPAN + 1]
    return spans


def shares_a_span(tokens: NDArray[np.uint16], held_out: NDArray[np.uint64]) -> bool:
    """Whether a span of 50 tokens occurs in the held-out documents. held_out: sorted hashes."""
    hashes = span_hashes(tokens)
    if not len(hashes):
        return False
    places = np.searchsorted(held_out, hashes)
    places[places == len(held_out)] = 0
    return bool((held_out[places] == hashes).any())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def build(wheels: Path, out: Path) -> None:
    """Write the data set into `out`, made if missing."""
    out.mkdir(parents=True, exist_ok=True)
    held_out = {
        split: [read_package(name, licence, wheels) for name, licence in packages.items()]
        for split, packages in HELD_OUT_PACKAGES.items()
    }
    known = {w for packages in held_out.values() for p in packages for text in p.texts.values() for w in _windows(text)}
    packages: list[Package] = []
    seen: set[int] = set()
    # In the order of a hash, so that every part has something of everything.
    for name in sorted(TRAIN_PACKAGES, key=lambda name: hashlib.sha256(name.encode()).digest()):
        licence = TRAIN_PACKAGES[name]
        package = read_package(name, licence, wheels)
        before = sum(map(len, package.texts.values()))
        drop_repeats(package, seen, known)
        cap(package)
        _say(f"{name} {package.version}: {before / 1e6:.1f} -> {sum(map(len, package.texts.values())) / 1e6:.1f} MB")
        packages.append(package)
    texts = [text for package in packages for text in package.texts.values()]
    _say(f"{sum(map(len, texts)) / 1e6:.1f} MB of text")
    tokenizer = train_code_tokenizer(VOCAB_SIZE, _sample(texts))
    tokenizer.save(str(out / "tokenizer.json"))
    rows: dict[str, list[dict[str, object]]] = {"train": []}
    hashes: list[NDArray[np.uint64]] = []
    for split, members in held_out.items():
        rows[split] = []
        documents = []
        for package in members:
            encoded = encode(tokenizer, package.texts.values())
            hashes += [span_hashes(tokens) for tokens in encoded]
            rows[split].append(package.row(sum(map(len, encoded))))
            for (path, text), tokens in zip(package.texts.items(), encoded, strict=True):
                documents.append({"package": package.name, "path": path, "tokens": len(tokens), "text": text})
        with lzma.open(out / f"{split}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(document) + "\n" for document in documents)
    spans = np.unique(np.concatenate(hashes))
    stream: list[NDArray[np.uint16]] = []
    for package in packages:
        encoded = encode(tokenizer, package.texts.values())
        clean = [not shares_a_span(tokens, spans) for tokens in encoded]
        package.texts = {path: text for (path, text), keep in zip(package.texts.items(), clean, strict=True) if keep}
        kept = [tokens for tokens, keep in zip(encoded, clean, strict=True) if keep]
        stream += kept
        rows["train"].append(package.row(sum(map(len, kept))))
        _say(f"{package.name}: {rows['train'][-1]['tokens']} tokens, {clean.count(False)} files share a span")
    tokens = np.concatenate(stream)
    manifest = {"vocab_size": VOCAB_SIZE, "documents": len(stream), "tokens": len(tokens)}
    digest = {"tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
    (out / "corpus.json").write_text(json.dumps(manifest | digest | {"packages": rows}, indent=1) + "\n")
    _say(f"{len(tokens)} tokens; compressing")
    for part, start in enumerate(range(0, len(tokens), PART_TOKENS)):
        data = tokens[start : start + PART_TOKENS].tobytes()
        (out / f"train.{part}.xz").write_bytes(lzma.compress(data, preset=6))


def _sample(texts: list[str]) -> list[str]:
    """About _TOKENIZER_BYTES of the documents, evenly spread."""
    step = max(1, sum(map(len, texts)) // _TOKENIZER_BYTES)
    return texts[::step]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo.corpus", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wheels", type=Path, required=True, help="directory of wheels; others are read as installed")
    parser.add_argument("--out", type=Path, required=True, help="directory of the data set")
    args = parser.parse_args()
    build(args.wheels, args.out)


if __name__ == "__main__":
    main()
