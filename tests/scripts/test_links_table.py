"""The page's table of links holds what was recorded, and says what never arrived."""

import pytest
from narrows.optim.links import LINKS
from narrows.scripts import links_table
from narrows.scripts.results import Recorded


def recorded(name, value, seed, metric="kilobits to 1e-8"):
    return Recorded(metric, value, name, seed, "quick", "bits_to_solution")


def rows():
    found = []
    for name in links_table.SENT:
        needed = float("inf") if name == "plain" else 20.0
        for seed in range(2):
            found += [
                recorded(name, needed + seed, seed),
                recorded(
                    name, 1e-4 if name == "plain" else 1e-20, seed, "where it ends"
                ),
                recorded(name, 200, seed, "bits a round"),
            ]
    return found


def test_every_link_of_gradients_is_measured():
    links = {sent.link for sent in links_table.SENT.values()}
    assert links == {name for name in LINKS if not name.startswith("masha")}


def test_a_link_that_never_arrives_is_said_to(tmp_path):
    lines = links_table.table(rows())
    (plain,) = [x for x in lines if x.startswith("| `plain` ")]
    assert "never" in plain
    assert "1.0e-04" in plain
    (ef21,) = [x for x in lines if x.startswith("| `ef21` ")]
    assert "20.5 ± 0.7" in ef21
    page = tmp_path / "page.md"
    page.write_text(f"a\n{links_table.BEGIN}\nold\n{links_table.END}\nz\n")
    for _ in range(2):  # written twice, the page is the same
        links_table.write(page, lines)
        text = page.read_text()
        assert text.startswith("a\n")
        assert text.endswith("\nz\n")
        assert "old" not in text
        assert text.count(plain) == 1


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no bits_to_solution"):
        links_table.table([])
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match=r"page\.md lacks the comments"):
        links_table.write(page, [])
