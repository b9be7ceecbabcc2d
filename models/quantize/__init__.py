"""Quantisers: a position's numbers pass as one or several indices, and come back.

One protocol (`protocol.py`). A quantiser is a NamedTuple of pure functions:

    state = q.init(key)                    State(params, memory)
    out = q.quantize(state, x, mask)       Quantized(z, indices, losses, stats)
    indices = q.encode(state, x)           int32 [*b, q], index j below q.sizes[j]
    z = q.decode(state, indices)           float32 [*b, code_width]
    state, report = q.update(state, stats) once a step, with the sums of all positions
    state = q.start(key, state, x, mask)   codes from data, before the first step

`params` follow the gradient of the losses or of z, `memory` follows sums and never a
gradient. Losses are separate means over unmasked positions, float32, no weight applied;
`q.weights` proposes one each. Stats are plain float32 sums over unmasked positions: to
add them over microbatches and devices is all the synchronisation there is. Who does not
call `update` has frozen the codes. out.z is decode(encode(x)) in x's dtype, bit for
bit; only its gradient knows x.

Methods: `vq` (nearest code; `updates` says how codes learn), `fsq`, `lfq`, `simvq`,
`random_projection`, `gumbel`. Compositions of any: `residual`, `product`, `grouped`.
`layer.Quantize` makes any of them a waist; `table` names them all.
"""
