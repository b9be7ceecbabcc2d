"""What is in a checkpoint, and what it would take on a mesh, without either."""

from narrows.parallel.checkpoint import inspect
from narrows.parallel.layout import Layout
from narrows.scripts import inspect_checkpoint


def test_every_leaf_has_a_line_and_a_mesh_its_bytes(call, finished, capsys):
    path = finished / "checkpoints"
    rows = inspect(path).rows
    assert call(inspect_checkpoint, f"--path={path}", "--mesh=fsdp=2,tensor=2") == 0
    said = capsys.readouterr().out
    for row in rows:
        assert row.name in said
        assert f"{row.fingerprint:08x}" in said
    assert "next_index" in said
    total = sum(row.bytes for row in rows)
    assert f"step 40: {len(rows)} leaves, {total:,} bytes" in said
    one = inspect_checkpoint.bytes_on_a_device(inspect(path), Layout())
    assert sum(one.values()) == total
    four = inspect_checkpoint.bytes_on_a_device(inspect(path), Layout(fsdp=4))
    assert all(row.bytes in (four[row.name], four[row.name] * 4) for row in rows)
    kernels = [row for row in rows if "blocks/" in row.name and "kernel" in row.name]
    assert all(four[row.name] * 4 == row.bytes for row in kernels)
    assert len(kernels) == 3 * 7  # of which two are moments


def test_a_mesh_that_does_not_fit_and_a_folder_without_any(
    call, finished, tmp_path, capsys
):
    path = finished / "checkpoints"
    assert call(inspect_checkpoint, f"--path={path}", "--mesh=tensor=3") == 2
    assert "does not divide over tensor=3" in capsys.readouterr().err
    assert call(inspect_checkpoint, f"--path={tmp_path}") == 2
    assert "no complete checkpoint" in capsys.readouterr().err
