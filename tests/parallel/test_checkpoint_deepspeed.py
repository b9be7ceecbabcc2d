"""Per-rank folders of DeepSpeed, ZeRO 1 to 3, written by hand."""

import pathlib

import ml_dtypes
import numpy as np
import pytest
from narrows.parallel.checkpoint.deepspeed_files import read_deepspeed
from narrows.parallel.checkpoint.unpickle import Tensor
from torch_writer import Call, assert_bits, save, size

GROUPS = (("a", "b"), ("c",))


def write_deepspeed(folder: pathlib.Path, ranks, world, stage) -> None:
    """`ranks`: {name: array} for each tensor-parallel rank."""
    folder = folder / "global_step7"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("global_step7")
    for rank, mine in enumerate(ranks):
        shapes = [{name: size(*mine[name].shape) for name in group} for group in GROUPS]
        half = {name: x.astype(ml_dtypes.bfloat16) for name, x in mine.items()}
        model = {"module": half, "param_shapes": shapes, "global_steps": 7}
        files = [f"mp_rank_{rank:02}_model_states.pt"]
        if stage == 3:
            prefix = [f"zero_pp_rank_{n}_mp_rank_{rank:02}" for n in range(world)]
            files = [f"{p}_model_states.pt" for p in prefix]
        for file in files:
            save(model, folder / file)
        for n in range(world) if stage else ():
            parts = []
            for group in GROUPS:
                arrays = [mine[name].ravel() for name in group]
                if stage == 3:  # each over the ranks
                    padded = [np.pad(a, (0, -a.size % world)) for a in arrays]
                    cut = [a.reshape(world, -1)[n] for a in padded]
                    parts.append(np.concatenate(cut))
                else:
                    flat = np.concatenate(arrays)
                    flat = np.pad(flat, (0, -flat.size % (2 * world)))
                    parts.append(flat.reshape(world, -1)[n])
            key = "fp32_flat_groups" if stage == 3 else (
                "single_partition_of_fp32_groups"
            )  # fmt: skip
            scaler = Call("deepspeed.runtime.fp16.loss_scaler LossScaler", (), {"a": 1})
            state = {key: parts, "zero_stage": stage, "loss_scaler": scaler}
            name = f"bf16_zero_pp_rank_{n}_mp_rank_{rank:02}_optim_states.pt"
            save({"optimizer_state_dict": state}, folder / name)


def rank_of(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 5), "b": (4,), "c": (2, 3, 3)}
    return {name: rng.normal(size=s).astype("f4") for name, s in shapes.items()}


@pytest.mark.parametrize(
    ("ranks", "world", "stage"),
    [(1, 1, 1), (1, 4, 2), (2, 3, 1), (1, 3, 3), (2, 4, 3), (2, 0, 0)],
)
def test_masters_of_deepspeed_come_together(tmp_path, ranks, world, stage):
    """The float32 of ZeRO's buffers; without any, the weights of the model."""
    mine = [rank_of(i) for i in range(ranks)]
    write_deepspeed(tmp_path, mine, world, stage)
    found = read_deepspeed(tmp_path)
    assert (found.ranks, found.step) == (ranks, 7)
    for rank, arrays in enumerate(mine):
        for name, x in arrays.items():
            want = x if stage else x.astype(ml_dtypes.bfloat16)
            key = f"{name}/{rank}" if ranks > 1 else name
            assert isinstance(found.tensors[key], Tensor)
            assert_bits(found.tensors[key].read(), want)
    assert len(found.tensors) == 3 * ranks


def test_a_deepspeed_folder_that_is_not_whole_is_named(tmp_path):
    write_deepspeed(tmp_path, [rank_of(0), rank_of(1)], 2, 2)
    folder = tmp_path / "global_step7"
    gone = folder / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"
    data = gone.read_bytes()
    gone.unlink()
    with pytest.raises(ValueError, match=r"of data ranks \[1\] are there"):
        read_deepspeed(tmp_path)
    gone.write_bytes(data)
    (folder / "mp_rank_00_model_states.pt").rename(folder / "x.pt")
    with pytest.raises(ValueError, match=r"ranks \[1\], but they must be mp_rank_00"):
        read_deepspeed(folder)
    (folder / "x.pt").rename(folder / "mp_rank_00_model_states.pt")
    key = "single_partition_of_fp32_groups"
    short = {"optimizer_state_dict": {key: [np.ones(2, "f4"), np.ones(2, "f4")]}}
    save(short, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match=r"group 0 has 19 elements.*hold \[2, 10\]"):
        read_deepspeed(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(ValueError, match=r"names '\.\./elsewhere', which is no folder"):
        read_deepspeed(tmp_path)
