"""The documentation names tests and files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAINS = (ROOT / "docs" / "pains.md").read_text()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+::test_\w+)`", PAINS))))
def test_every_test_that_pains_names_exists(name):
    file, test = name.split("::")
    (path,) = (ROOT / "tests").rglob(f"{file}.py")
    assert f"\ndef {test}(" in path.read_text()


def test_every_pain_has_its_row_and_a_test():
    rows = re.findall(r"^\| (\d+) \|(.*)$", PAINS, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 23))
    assert all("::test_" in row for _, row in rows)


@pytest.mark.parametrize("page", sorted(p.relative_to(ROOT).as_posix()
                                        for p in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]))
def test_every_link_to_a_file_leads_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
