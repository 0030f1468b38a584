"""Prints the versions of everything that m3serve needs, as installed here: `python -m deploy.pins`.

Its output is deploy/constraints.txt, which the images are made with. torch and triton are left out: they come
with the base image or from an index of their own.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.install import dependencies

LEFT_OUT = frozenset({"torch", "triton"})
_HEADER = """\
# Versions of everything in the images but torch and triton: those that the tests ran with.
# Made by `python -m deploy.pins > deploy/constraints.txt` in the environment of `make test`.
"""


def pins() -> dict[str, str]:
    """Name -> version of the project's dependencies and all of theirs."""
    found: dict[str, str] = {}
    pending = [Requirement(text) for text in dependencies()]
    # A package is visited once per set of extras that somebody asks for.
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        wanted = pending.pop()
        name = canonicalize_name(wanted.name)
        key = (name, frozenset(wanted.extras))
        if name in LEFT_OUT or key in seen:
            continue
        seen.add(key)
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # Of another platform or Python.
            continue
        for text in requires(name) or ():
            below = Requirement(text)
            contexts = [{"extra": extra} for extra in wanted.extras] or [{"extra": ""}]
            if below.marker is None or any(below.marker.evaluate(context) for context in contexts):
                pending.append(below)
    return found


def main() -> None:
    """Print the constraints file."""
    print(_HEADER + "\n".join(f"{name}=={found}" for name, found in sorted(pins().items())))


if __name__ == "__main__":
    main()
