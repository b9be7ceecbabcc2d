"""The ledger of a compiled step: what it moves, computes and keeps, on one device."""

from typing import NamedTuple

from .hlo_flops import products
from .wire import Collective, collectives


class Memory(NamedTuple):
    """Bytes on one device, as the compiler assigned them."""

    arguments: int  # state and batch
    results: int
    shared: int  # results that lie where arguments did
    temporary: int  # activations, gradients, gathered parameters
    code: int

    @property
    def peak(self) -> int:
        """Of arguments, results and temporaries together: an upper bound."""
        return self.arguments + self.results - self.shared + self.temporary + self.code


class Ledger(NamedTuple):
    collectives: list[Collective]
    flops: float  # loops multiplied
    counted: float  # as `cost_analysis` says: the body of every loop once
    exact: bool  # False: a loop of unknown length, or a branch, holds products
    kernels: int  # runs of custom kernels, whose operations are not in `flops`
    memory: Memory


def ledger(compiled, mesh) -> Ledger:
    """Of `jax.jit(fn).lower(*args).compile()` over `mesh`.

    flops = counted + the products that loops run more than once. Raises ValueError as
    `wire.collectives` does.
    """
    text = compiled.as_text()
    found = products(text)
    said = compiled.cost_analysis() or {}
    counted = float(said.get("flops", 0.0))
    m = compiled.memory_analysis()
    return Ledger(
        collectives=collectives(compiled, mesh),
        flops=counted + found.all - found.once,
        counted=counted,
        exact=found.exact,
        kernels=found.kernels,
        memory=Memory(
            m.argument_size_in_bytes,
            m.output_size_in_bytes,
            m.alias_size_in_bytes,
            m.temp_size_in_bytes,
            m.generated_code_size_in_bytes,
        ),
    )


def unlisted(
    found: list[Collective], listed: set[tuple[str, tuple[str, ...]]]
) -> list[Collective]:
    """What a layout's list of (kind, axes) does not have. Scalars ride along unasked.

    >>> unlisted([], set())
    []
    """
    return [
        c
        for c in found
        if (c.kind, c.axes) not in listed and any(shape for shape in c.shapes)
    ]
