"""The default install stays small: its packages are counted from the metadata of what is installed."""

import importlib.metadata
import re


def requirements(name: str, extras: frozenset[str] = frozenset()):
    """Names that a distribution requires here; markers of other platforms and of unrequested extras are dropped."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires(name) or ():
        requirement = Requirement(text)
        environments = [{"extra": extra} for extra in (extras or {""})]
        if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
            yield canonical(requirement.name), frozenset(requirement.extras)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str) -> set[str]:
    seen, todo = set(), [(canonical(name), frozenset())]
    while todo:
        item = todo.pop()
        if item not in seen:
            seen.add(item)
            todo += requirements(*item)
    return {name for name, _ in seen}


def test_default_install_is_under_60_packages():
    packages = closure("gemmakit")
    assert len(packages) < 60
    assert not packages & {"torch", "tensorflow", "transformers", "kauldron"}


def test_default_install_is_under_1_gb():
    """Bytes of every file that the metadata lists; the interpreter itself is not counted."""
    total = 0
    for name in closure("gemmakit"):
        for file in importlib.metadata.files(name) or ():
            path = file.locate()
            total += path.stat().st_size if path.is_file() else 0
    assert 100e6 < total < 1e9
