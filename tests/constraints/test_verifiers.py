"""All 54 published ids against the public verifiers, on 2,400 generated texts.

Their verdicts stand in a fixture, and with them where ours differ; docs/log has who is right.
"""

import json
import re
from pathlib import Path

import helpers_verifiers as given
import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "log" / "2026-11-constraint-kinds.md"
PUBLIC = json.loads(given.FIXTURE.read_text(encoding="utf-8"))
EVERY_TENTH = range(0, given.TEXTS, 10)


def bits(name):
    theirs = given.unpacked(PUBLIC["verdicts"][name])
    apart = PUBLIC["differ"].get(name)
    return theirs, given.unpacked(apart) if apart else [False] * len(theirs)


def expected(name, indices):
    """Our verdicts: theirs, save where the two are known to differ."""
    theirs, apart = bits(name)
    draws = len(theirs) // given.TEXTS
    places = [index * draws + n for index in indices for n in range(draws)]
    return [theirs[place] != apart[place] for place in places]


def test_the_texts_are_those_that_the_verifiers_were_asked_about():
    assert given.fingerprint(EVERY_TENTH) == PUBLIC["fingerprint"]


@pytest.mark.parametrize("name", given.IDS)
def test_every_tenth_text(name):
    assert given.verdicts(given.ours, name, EVERY_TENTH) == expected(name, EVERY_TENTH)


@pytest.mark.slow
@pytest.mark.parametrize("name", given.IDS)
def test_all_texts(name):
    indices = range(given.TEXTS)
    assert given.verdicts(given.ours, name, indices) == expected(name, indices)


@pytest.mark.slow
@pytest.mark.parametrize("module", given.REGISTRIES)
def test_the_fixture_holds_what_the_public_verifiers_say(module):
    pytest.importorskip(module, reason=f"{module} is not installed")
    names, ask = given.verifier(module)
    assert len(names) in (25, 54)
    for name in names:
        assert given.verdicts(ask, name) == bits(name)[0], name


def test_the_table_in_the_docs():
    rows = re.findall(
        r"^\| `([a-z_0-9]+:\w+)` \|(.*?)\|(.*?)\|(.*?)\|(.*)\|$", TABLE.read_text(), re.M
    )
    found = {name: tuple(cell.strip() for cell in cells) for name, *cells in rows}
    assert list(found) == list(given.IDS)
    for name, (asked, yes, apart, who) in found.items():
        theirs, differ = bits(name)
        assert (asked, yes, apart) == tuple(
            f"{n:,}" for n in (len(theirs), sum(theirs), sum(differ))
        )
        assert bool(who) == any(differ), name
