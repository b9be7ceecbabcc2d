"""The flags of a pipeline's schedule, and what they ask of a model."""

from absl import flags
from narrows.models.scheduled import SCHEDULES, check_schedule
from narrows.models.transformer import TransformerConfig
from narrows.parallel.layout import Layout


def define_schedule(values: flags.FlagValues) -> None:
    flags.DEFINE_enum(
        "schedule",
        "loop",
        SCHEDULES,
        "of stages: the loop that JAX differentiates, or a table of ticks",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "chunks", 1, "groups of blocks a stage, if interleaved", 1, flag_values=values
    )


def schedule_of(
    values: flags.FlagValues, config: TransformerConfig, layout: Layout
) -> dict:
    """Arguments of `model_parts`. Raises ValueError for what cannot be scheduled."""
    check_schedule(
        values.schedule,
        depth=config.depth,
        stages=layout.stage,
        chunks=values.chunks,
        seq=layout.seq,
    )
    return {"schedule": values.schedule, "chunks": values.chunks}
