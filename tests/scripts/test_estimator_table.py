"""The page of estimators' errors: what it says is what was recorded and declared."""

import json

import pytest
from narrows.ib.estimators.table import ESTIMATORS
from narrows.scripts import estimator_table
from narrows.scripts.results import RESULTS


def line(**changes):
    """A task that `gaussian` declares, unless changed."""
    return {
        "estimator": "gaussian",
        "task": "gaussian",
        "dim": 1,
        "rows": 2000,
        "truth": 1.0,
        "seeds": 50,
        "draw": 1,
        "bias": 0.01,
        "error": 0.02,
        "deviation": 0.03,
        "covered": 0.94,
        "flagged": 0.0,
        "wild": 0,
        "wild_flagged": 0,
        "device": "cpu",
        "commit": "abc",
        "dirty": False,
        **changes,
    }


def said(text, name):
    (row,) = [row for row in text.splitlines() if row.startswith(f"| `{name}` |")]
    return [cell.strip() for cell in row.split("|")[2:-1]]


def test_declared_tasks_hold_by_cover_and_flags_and_others_by_flags_alone():
    elsewhere = line(task="mixture", covered=0.0, wild=40, wild_flagged=30)
    text = estimator_table.page([line(), elsewhere])
    assert said(text, "gaussian") == ["1 of 2", "1 of 1", "40", "75%"]
    for worse in ({"covered": 0.84}, {"flagged": 0.12}):
        text = estimator_table.page([line(**worse), elsewhere])
        assert said(text, "gaussian")[1] == "0 of 1"
    assert "**+0.01 ± 0.03; 94, 0**" in estimator_table.page([line()])


def test_the_newest_line_counts_and_the_largest_size_judges():
    old, new = line(covered=0.1), line(covered=0.9)
    few = line(rows=500, covered=0.2)
    unjudged = line(rows=10_000, covered=0.0, seeds=3)
    text = estimator_table.page([old, few, unjudged, new])
    assert said(text, "gaussian")[:2] == ["1 of 1", "1 of 1"]
    assert "; 10, 0" not in text


def test_the_samples_that_declarations_were_chosen_on_judge_none():
    for seen in (line(draw=0), {k: v for k, v in line().items() if k != "draw"}):
        assert said(estimator_table.page([seen]), "gaussian")[:2] == ["0 of 1", ""]


def test_a_stale_page_is_told(tmp_path):
    (tmp_path / "docs").mkdir()
    record = json.dumps(line()) + "\n"
    (tmp_path / "benchmark_information.jsonl").write_text(record)
    flags = [f"--results_dir={tmp_path}", f"--root={tmp_path}"]
    assert estimator_table.main(["x", "--check", *flags]) == 1
    assert estimator_table.main(["x", *flags]) == 0
    assert estimator_table.main(["x", "--check", *flags]) == 0


@pytest.mark.parametrize("name", [n for n, r in ESTIMATORS.items() if r.covers])
def test_what_an_estimator_declares_is_what_was_measured(name):
    """Every declared task has a recorded line at 50 unseen seeds, and it holds."""
    path = RESULTS / "benchmark_information.jsonl"
    records = [json.loads(text) for text in path.read_text().splitlines()]
    mine = [r for r in estimator_table.newest(records) if r["estimator"] == name]
    found = {(r["task"], r["dim"]): r for r in estimator_table.judged(mine)}
    assert set(found) == ESTIMATORS[name].covers
    assert all(map(estimator_table.holds, found.values()))
