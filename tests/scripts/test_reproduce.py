"""The harness: verdicts from rows, records that resume, a table that is fresh."""

import io
import json
import math
import types

import jax
import numpy as np
import optax
import pytest
from narrows.optim.normalized_gd import normalized_gd, separate
from narrows.scripts import claims, figures, reproduce, results, systems_table
from narrows.scripts.claims import Claim, Law, Ordering, Ratio, Row, System
from narrows.scripts.reproductions.normalized_gd import hard_set
from rich.console import Console


def rows(ours, theirs):
    return {
        seed: [Row("x", a), Row("x", b, "base")]
        for seed, (a, b) in enumerate(zip(ours, theirs, strict=True))
    }


def planted(method, calls=None):
    """A system of two claims on one measure; `method` is optimised against sgd."""

    @jax.jit
    def steps(z):
        return [
            separate(tx, z, max_steps=500).iterations for tx in (method, optax.sgd(1e3))
        ]

    def measure(scale, seed):
        if calls is not None:
            calls.append((scale, seed))
        mu = np.random.default_rng(seed).uniform(0.08, 0.2)
        ours, theirs = steps(hard_set(100, mu, np.eye(2)).astype(np.float32))
        yield Row("iterations", int(ours))
        yield Row("iterations", int(theirs), "LR+GD")

    def absent(scale, seed):
        raise claims.NotMeasured("the data set is not in --data_dir")

    found = (
        Claim("half", "", "", Ratio("iterations", "method", "LR+GD", 0.5), measure),
        Claim("better", "", "", Ordering("iterations", "method", "LR+GD"), measure),
        Claim("later", "", "", Law("iterations", 1e9), measure, scales=("paper",)),
        Claim("absent", "", "", Law("iterations", 1e9), absent),
    )
    system = System("planted", "A title", "a paper", "optim/", "a.module", "a summary")
    return types.SimpleNamespace(SYSTEM=system, CLAIMS=found)


def refused(main, argv, capsys):
    """What a command said on standard error when it ended with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run(module, *flags)` -> (exit code, what was printed)."""

    def call(module, *flags):
        monkeypatch.setattr(claims, "names", lambda: ("planted",))
        monkeypatch.setattr(claims, "load", lambda slug: module)
        out = io.StringIO()
        argv = ["reproduce", "--system=planted", f"--results_dir={tmp_path}", *flags]
        code = reproduce.main(argv, Console(file=out, width=200))
        return code, out.getvalue()

    return call


def test_a_method_that_does_what_it_claims_holds(run):
    code, text = run(planted(normalized_gd(1e3)), "--require")
    assert code == 0
    assert text.count("holds") == 2
    assert "not measured at this scale" in text
    assert "the data set is not in --data_dir" in text


def test_a_method_without_its_normaliser_falls_short(run):
    broken = planted(optax.sgd(1e3))
    code, text = run(broken, "--require")
    assert code == 1
    assert text.count("falls short") == 2
    assert run(broken)[0] == 0  # reported, but required only on request


def test_claims_of_one_measure_share_its_calls_and_records_resume(run, monkeypatch):
    clean = {"commit": "c0ffee", "dirty": False, "device": "cpu", "versions": {}}
    monkeypatch.setattr(results, "provenance", lambda: clean)
    calls = []
    module = planted(normalized_gd(1e3), calls)
    run(module, "--record", "--seeds=2")
    assert calls == [("quick", 0), ("quick", 1)]
    run(module, "--record", "--seeds=3")
    assert calls[2:] == [("quick", 2)]
    run(module, "--record", "--seeds=1", "--scale=full")
    assert calls[3:] == [("full", 0)]
    monkeypatch.setattr(results, "provenance", lambda: clean | {"dirty": True})
    run(module, "--record", "--seeds=1")  # changed code: nothing is reused
    assert calls[4:] == [("quick", 0)]


def test_a_seed_gives_its_rows_again_and_the_record_says_how(
    run, tmp_path, monkeypatch
):
    origin = results.provenance() | {"dirty": True}  # or the second run would resume
    monkeypatch.setattr(results, "provenance", lambda: origin)
    for _ in range(2):
        run(planted(normalized_gd(1e3)), "--record", "--seed=7", "--seeds=1")
    first, second = results.read(tmp_path, "planted")
    assert first["rows"] == second["rows"]
    assert first["command"] == (
        "python scripts/reproduce.py --system=planted --scale=quick --seed=7 --seeds=1"
    )
    assert {"commit", "dirty", "device", "versions", "seconds"} <= first.keys()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--system=normalised_gd", "the nearest: normalized_gd"),
        ("--scale=huge", "quick|full|paper"),
        ("--seeds=0", "--seeds=0"),
        ("--data_dir=nowhere", "--data_dir=nowhere is no folder"),
        ("--sistem=x", "sistem"),
        ("--list", "either --system=<slug> or --list"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_code_2(flag, words, capsys):
    argv = ["reproduce", flag]
    if not flag.startswith("--system"):
        argv.append("--system=normalized_gd")
    said = refused(reproduce.main, argv, capsys)
    assert words in said
    assert len(said.splitlines()) == 1


def test_the_list_shows_every_claim_of_every_system():
    out = io.StringIO()
    assert reproduce.main(["reproduce", "--list"], Console(file=out, width=200)) == 0
    for slug in claims.names():
        for claim in claims.load(slug).CLAIMS:
            assert f"{claim.id}: " in out.getvalue()


def test_ratio_needs_its_whole_interval_below_the_bound():
    """Log-ratios -0.1 and 0.1 around log 0.5: t(1) = 12.7 makes the interval wide."""
    wide = rows([0.5 * math.exp(-0.1), 0.5 * math.exp(0.1)], [1, 1])
    found = Ratio("x", "method", "base", at_most=1.0).verdict(wide)
    assert found.interval is not None
    low, high = found.interval
    assert low == pytest.approx(0.5 * math.exp(-12.706 * 0.1), rel=1e-3)
    assert high == pytest.approx(0.5 * math.exp(12.706 * 0.1), rel=1e-3)
    assert not found.holds  # the mean is half the bound, the interval is not below it
    assert Ratio("x", "method", "base", at_most=2.0).verdict(wide).holds
    assert Ratio("x", "method", "base", at_least=0.1).verdict(wide).holds
    assert not Ratio("x", "method", "base", at_least=0.2).verdict(wide).holds


def test_ordering_is_paired_and_has_a_direction():
    """Seeds differ by far more than the arms do: only pairing can see the gain."""
    base = np.array([10.0, 200.0, 3000.0, 40.0])
    table = rows(base - [1, 1.1, 0.9, 1], base)
    assert Ordering("x", "method", "base").verdict(table).holds
    assert not Ordering("x", "base", "method").verdict(table).holds
    assert Ordering("x", "base", "method", lower_is_better=False).verdict(table).holds
    found = Ordering("x", "method", "base").verdict(table)
    assert (found.n, found.baseline) == (4, base.mean())
    assert found.interval == pytest.approx((0.87, 1.13), abs=0.01)


def test_one_seed_proves_only_a_law():
    one = rows([1.0], [100.0])
    assert not Ratio("x", "method", "base", at_most=0.5).verdict(one).holds
    assert not Ordering("x", "method", "base").verdict(one).holds
    assert Law("x", 1.0).verdict(one).holds


@pytest.mark.parametrize("bad", [1.01, -1.01, math.nan, math.inf])
def test_a_law_holds_in_every_row_of_every_seed(bad):
    table = {0: [Row("x", 0.5), Row("x", -1.0)], 1: [Row("x", 0.0), Row("x", 0.5)]}
    assert Law("x", 1.0).verdict(table).holds
    table[1].append(Row("x", bad))
    assert not Law("x", 1.0).verdict(table).holds


def test_nan_and_zero_never_hold():
    assert not Ratio("x", "method", "base", 9.0).verdict(rows([1, 0], [2, 2])).holds
    assert not Ordering("x", "method", "base").verdict(rows([1, np.nan], [2, 2])).holds


def test_missing_and_double_rows_are_named():
    with pytest.raises(ValueError, match="no row of metric 'y', arm 'method' at seed"):
        Law("y", 1.0).verdict(rows([1], [1]))
    twice = {0: [Row("x", 1), Row("x", 2), Row("x", 1, "base")]}
    with pytest.raises(ValueError, match="2 rows of metric 'x'"):
        Ordering("x", "method", "base").verdict(twice)


def test_records_are_strict_json_and_keep_what_is_not_finite(tmp_path):
    record = results.line(
        slug="s",
        measurement="m",
        scale="quick",
        seed=0,
        rows=[Row("x", math.inf), Row("y", math.nan), Row("z", 0.5)],
        seconds=1.0,
        origin={},
    )
    results.append(tmp_path, record)
    (again,) = results.read(tmp_path, "s")
    values = [row.value for row in results.rows_of(again)]
    assert values[0] == math.inf
    assert math.isnan(values[1])
    assert values[2] == 0.5
    assert "Infinity" not in json.dumps(again)


def test_the_newest_record_of_a_seed_and_the_largest_scale_count():

    def measure(scale, seed):
        return []

    claim = Claim("c", "", "", Law("x", 1.0), measure)
    base = {"measurement": "measure", "commit": "c", "dirty": False, "device": "d"}

    def record(scale, seed, value):
        return base | {"scale": scale, "seed": seed, "rows": [["x", "method", value]]}

    records = [record("quick", 0, 5.0), record("quick", 0, 0.5)]
    found = results.judge(claim, records)
    assert found is not None
    assert found.verdict.holds
    records += [record("full", 0, 0.5), record("full", 1, 2.0)]
    found = results.judge(claim, records)
    assert found is not None
    assert (found.scale, found.verdict.holds, found.verdict.n) == ("full", False, 2)
    assert results.judge(claim, []) is None


def test_every_reproduction_keeps_the_contract():
    listed = {row["slug"]: row for row in systems_table.systems()}
    assert len(listed) == 85
    for slug in claims.names():
        module = claims.load(slug)
        assert module.SYSTEM.room == listed[slug]["room"]
        assert module.SYSTEM.title == listed[slug]["title"]
        assert f"--system={slug}" in (module.__doc__ or "")
        assert module.CLAIMS
        for claim in module.CLAIMS:
            assert set(claim.scales) <= set(claims.SCALES)


def test_the_table_lists_all_systems_and_is_not_stale(capsys):
    text = systems_table.page(results.RESULTS)
    for row in systems_table.systems():
        assert row["title"] in text
    code = systems_table.main(["systems_table", "--check"])
    assert code == 0, capsys.readouterr().out


def test_a_stale_table_is_found_and_mended(tmp_path, capsys):
    argv = ["systems_table", f"--root={tmp_path}"]
    assert "README.md" in refused(systems_table.main, argv, capsys)
    (tmp_path / "README.md").write_text("# A title\n")
    assert systems_table.BEGIN in refused(systems_table.main, argv, capsys)
    (tmp_path / "README.md").write_text(
        f"# A title\n{systems_table.BEGIN}\nstale words\n{systems_table.END}\nthe end\n"
    )
    assert systems_table.main([*argv, "--check"]) == 1
    assert systems_table.main(argv) == 0
    assert systems_table.main([*argv, "--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# A title\n")
    assert text.endswith("the end\n")
    assert "stale words" not in text
    assert "normalized_gd" in text
    (tmp_path / "docs" / "systems.md").write_text("edited by hand")
    assert systems_table.main([*argv, "--check"]) == 1


def test_every_figure_of_the_manual_is_drawn_from_results(tmp_path, capsys):
    in_docs = {path.stem for path in figures.FOLDER.glob("*")}
    assert in_docs <= set(figures.table())
    assert "normalized_gd" in in_docs
    for name in in_docs:
        first = figures.draw(name, results.RESULTS, tmp_path).read_bytes()
        assert figures.draw(name, results.RESULTS, tmp_path).read_bytes() == first
    said = refused(figures.main, ["figures", "--figure=nothing"], capsys)
    assert "no figure 'nothing'" in said
