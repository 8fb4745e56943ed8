"""The scan on a CUDA device: Triton kernels for forward, backward, and the carry between stretches of positions.

Letters: K directions, L positions, G groups, N states, R rank of delta; T steps of a tile, J channels of a block.
One program is one warp: it takes J channels of one group over one stretch of positions, direction after direction,
tile after tile, and inside a tile state after state, so registers hold (T, J) tiles whatever N is. In a tile the
recurrence h[t] = a[t] h[t-1] + d[t] is an associative scan over t; the state that enters the next tile waits in
`carry` (N x J numbers, they stay in cache). Decays are exp2 with log2(e) folded into A. Places are 64-bit, so a map
may have more than 2^31 elements. Integers come unspecialised: one compilation serves every shape.
An absent tensor is None, which leaves its part out of the compiled kernel.
Imported by scan_triton only, inside its functions: triton is optional.
"""
# mypy: disable-error-code="no-untyped-def"

import inspect

import triton
import triton.language as tl


def _kernel(function):
    """A kernel compiled once for all shapes, strides and alignments, as no value is built in.

    With a channel stride known to be 1 the compiler would also give a thread four channels instead of its share of
    the steps, and the scan would go through other threads.
    """
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[p.name for p in parameters if p.annotation is not tl.constexpr])


@triton.jit
def _then(a1, b1, a2, b2):
    """The step h -> a1 h + b1, and after it (a2, b2), as one step."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _program(groups, width, segments, J: tl.constexpr):
    """This program's batch entry, stretch, group, block of channels; and its channels of the group with a mask."""
    pid, blocks = tl.program_id(0), tl.cdiv(width, J)
    block, pid = pid % blocks, pid // blocks
    group, pid = pid % groups, pid // groups
    j = block * J + tl.arange(0, J)
    return tl.cast(pid // segments, tl.int64), pid % segments, tl.cast(group, tl.int64), block, j, j < width


@triton.jit
def _places(order, reverse_mask, k, t, length):
    """Where direction k stands at steps t (64-bit) and which of the steps exist; a place off the map is skipped."""
    live = t < length
    if order is None:
        place = tl.where((reverse_mask >> k) & 1 == 1, length - 1 - t, t)
    else:
        place = tl.load(order + k * length + t, mask=live, other=0)
        live = live & (place >= 0) & (place < length)
    return tl.cast(place, tl.int64), live


@triton.jit
def _tile(x, place, live, step, offset, inside):
    """x at every place and column offset, (T, J) float32, 0 where there is nothing."""
    at = x + place[:, None] * step + offset[None, :]
    return tl.load(at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _column(x, place, live, step):
    """x at every place, (T, 1) float32: one number for all channels."""
    return tl.load(x + place * step, mask=live, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _raw(delta, column, step, weight, bias, place, live, channel, row, inside, rank, T: tl.constexpr, J: tl.constexpr):
    """delta + bias before softplus, (T, J); delta is weight @ r where there is a weight. `row`: k D + channel."""
    if weight is None:
        raw = _tile(delta, place, live, step, channel * column, inside)
    else:
        raw = tl.zeros((T, J), tl.float32)
        for r in range(rank):
            w = tl.load(weight + row * rank + r, mask=inside, other=0.0).to(tl.float32)
            raw += _column(delta + r * column, place, live, step) * w[None, :]
    if bias is not None:
        raw += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    return raw


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), exact to the last digits for any x: log1p(e) = 2 atanh(e / (2 + e)), e = exp(-|x|) <= 1."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    p = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.maximum(x, 0.0) + 2.0 * s * p


@triton.jit
def _sigmoid(x):
    """The derivative of softplus, without cancellation at either end."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _step(raw, live, inside, SOFTPLUS: tl.constexpr):
    """The step dt; 0 where there is none, so that its decay is 1 and its drive 0."""
    if SOFTPLUS:
        raw = _softplus(raw)
    return tl.where(live[:, None] & inside[None, :], raw, 0.0)


@_kernel
def forward_kernel(
    u, delta, weight, A, B, C, D, bias, order, y, carry, borders, sums,
    ub, ul, uc, db, dk, dl, dc, Bb, Bk, Bg, Bl, Bn, Cb, Ck, Cg, Cl, Cn, yb, yl, yc,
    directions, groups, width, padded, states, rank, length, segments, per, reverse_mask, first, last, fresh,
    SOFTPLUS: tl.constexpr, T: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Directions first..last over one stretch: y (directions below `fresh` write, the others add), carry, borders.

    Without `y` only the state at the end of the stretch (in carry) and the sum of its steps (in sums) are found.
    """
    b, segment, g, _block, j, inside = _program(groups, width, segments, J)
    t0 = tl.arange(0, T)
    chunks, channel = tl.cdiv(length, T), g * width + j
    for direction in range(first, last):
        k = b * 0 + direction  # 64-bit
        row = k * groups * width + channel
        slot = carry + (((b * directions + k) * segments + segment) * groups + g) * states * padded + j
        delta_k = delta + b * db + k * dk
        B_k = B + b * Bb + k * Bk + g * Bg
        C_k = C + b * Cb + k * Ck + g * Cg
        total = tl.zeros((J,), tl.float32)
        for chunk in range(segment * per, tl.minimum(segment * per + per, chunks)):
            place, live = _places(order, reverse_mask, k, chunk * T + t0, length)
            raw = _raw(delta_k, dc, dl, weight, bias, place, live, channel, row, inside, rank, T, J)
            dt = _step(raw, live, inside, SOFTPLUS)
            x = _tile(u + b * ub, place, live, ul, channel * uc, inside)
            kick = dt * x
            total += tl.sum(dt, 0)
            border = (((b * directions + k) * chunks + chunk) * groups + g) * padded * states + j
            out = tl.zeros((T, J), tl.float32)
            for n in range(states):
                decay = tl.exp2(dt * (1.4426950408889634 * tl.load(A + row * states + n, mask=inside, other=0.0)))
                enter = tl.load(slot + n * padded, mask=inside, other=0.0)
                if borders is not None:
                    tl.store(borders + border + n * padded, enter, mask=inside)
                drive = kick * _column(B_k + n * Bn, place, live, Bl)
                drive = tl.where(t0[:, None] == 0, drive + decay * enter[None, :], drive)
                _passed, h = tl.associative_scan((decay, drive), 0, _then)
                tl.store(slot + n * padded, tl.sum(tl.where(t0[:, None] == T - 1, h, 0.0), 0), mask=inside)
                if y is not None:
                    out += h * _column(C_k + n * Cn, place, live, Cl)
            if y is not None:
                if D is not None:
                    out += x * tl.load(D + row, mask=inside, other=0.0)[None, :]
                there = live[:, None] & inside[None, :]
                at = y + b * yb + place[:, None] * yl + (channel * yc)[None, :]
                if k >= fresh:
                    out += tl.load(at, mask=there, other=0.0)
                tl.store(at, out, mask=there)
            tl.debug_barrier()  # the next tile reads carry, the next direction y, with other lanes
        if sums is not None:
            head = ((b * directions + k) * segments + segment) * groups + g
            tl.store(sums + head * padded + j, total, mask=inside)


@_kernel
def backward_kernel(
    u, delta, weight, A, B, C, D, bias, order, borders, dy, carry, sums, du, ddelta, dA, dB, dC, dD, dbias,
    ub, ul, uc, db, dk, dl, dc, Bb, Bk, Bg, Bl, Bn, Cb, Ck, Cg, Cl, Cn, gb, gl, gc, eb, el, ec, fb, fk, fl, fc,
    batch, directions, groups, width, padded, states, rank, length, segments, per, reverse_mask, first, last,
    SOFTPLUS: tl.constexpr, T: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Directions first..last over one stretch, from its last step to its first; ddelta is before bias and softplus.

    carry holds what arrives from the right: the gradient of the state that leaves the stretch. States of a tile are
    found again from its border. dA is a float64 sum; dB, dC are parts, one for each block of channels, (T,) a state.
    Without `du` only the carry that leaves the stretch to the left and the sum of its steps (in sums) are found.
    """
    b, segment, g, block, j, inside = _program(groups, width, segments, J)
    t0 = tl.arange(0, T)
    chunks, channel = tl.cdiv(length, T), g * width + j
    begin, end = segment * per, tl.minimum(segment * per + per, chunks)
    for direction in range(first, last):
        k = b * 0 + direction  # 64-bit
        row = k * groups * width + channel
        head = ((b * directions + k) * segments + segment) * groups + g
        slot = head * states * padded + j
        delta_k = delta + b * db + k * dk
        B_k = B + b * Bb + k * Bk + g * Bg
        C_k = C + b * Cb + k * Ck + g * Cg
        part = (((block * batch + b) * directions + k) * groups + g) * length * states
        total = tl.zeros((J,), tl.float32)
        sum_D, sum_bias = tl.zeros((J,), tl.float64), tl.zeros((J,), tl.float64)
        for back in range(end - begin):
            chunk = end - 1 - back
            t = chunk * T + t0
            place, live = _places(order, reverse_mask, k, t, length)
            there = live[:, None] & inside[None, :]
            raw = _raw(delta_k, dc, dl, weight, bias, place, live, channel, row, inside, rank, T, J)
            dt = _step(raw, live, inside, SOFTPLUS)
            after, follows = _places(order, reverse_mask, k, t + 1, length)
            raw_after = _raw(delta_k, dc, dl, weight, bias, after, follows, channel, row, inside, rank, T, J)
            dt_after = _step(raw_after, follows, inside, SOFTPLUS)
            gy = _tile(dy + b * gb, place, live, gl, channel * gc, inside)
            x = _tile(u + b * ub, place, live, ul, channel * uc, inside)
            total += tl.sum(dt, 0)
            border = (((b * directions + k) * chunks + chunk) * groups + g) * padded * states + j
            by_drive = tl.zeros((T, J), tl.float32)  # sum over states of g B
            by_decay = tl.zeros((T, J), tl.float32)  # sum over states of g a h[t-1] A
            for n in range(states):
                rate = tl.load(A + row * states + n, mask=inside, other=0.0)
                decay = tl.exp2(dt * (1.4426950408889634 * rate))
                decay_after = tl.exp2(dt_after * (1.4426950408889634 * rate))
                grad = gy * _column(C_k + n * Cn, place, live, Cl)
                arrive = tl.load(carry + slot + n * padded, mask=inside, other=0.0)
                grad = tl.where(t0[:, None] == T - 1, grad + arrive[None, :], grad)
                _passed, grad = tl.associative_scan((decay_after, grad), 0, _then, reverse=True)
                leave = tl.sum(tl.where(t0[:, None] == 0, decay * grad, 0.0), 0)
                tl.store(carry + slot + n * padded, leave, mask=inside)
                if du is not None:
                    B_n = _column(B_k + n * Bn, place, live, Bl)
                    drive = dt * x * B_n
                    enter = tl.load(borders + border + n * padded, mask=inside, other=0.0)
                    first_step = tl.where(t0[:, None] == 0, drive + decay * enter[None, :], drive)
                    _passed, h = tl.associative_scan((decay, first_step), 0, _then)
                    kept = tl.where(live[:, None], grad * (h - drive), 0.0)  # g a h[t-1]
                    by_drive += grad * B_n
                    by_decay += kept * rate[None, :]
                    at = dA + slot + n * padded
                    before = tl.load(at, mask=inside, other=0.0)
                    tl.store(at, before + tl.sum(kept * dt, 0).to(tl.float64), mask=inside)
                    tl.store(dB + part + place * states + n, tl.sum(grad * dt * x, 1), mask=live)
                    tl.store(dC + part + place * states + n, tl.sum(gy * h, 1), mask=live)
            if du is not None:
                draw = by_drive * x + by_decay
                if SOFTPLUS:
                    draw *= _sigmoid(raw)
                draw = tl.where(there, draw, 0.0)
                at = ddelta + b * fb + k * fk + (channel * fc)[None, :]
                tl.store(at + place[:, None] * fl, draw, mask=there)
                out = by_drive * dt
                if D is not None:
                    out += gy * tl.load(D + row, mask=inside, other=0.0)[None, :]
                at = du + b * eb + place[:, None] * el + (channel * ec)[None, :]
                if k > 0:
                    out += tl.load(at, mask=there, other=0.0)
                tl.store(at, out, mask=there)
                sum_D += tl.sum(gy * x, 0).to(tl.float64)
                sum_bias += tl.sum(draw, 0).to(tl.float64)
            tl.debug_barrier()  # the next tile reads carry and dA, the next direction du, with other lanes
        if sums is not None:
            tl.store(sums + head * padded + j, total, mask=inside)
        if du is not None:
            tl.store(dD + head * padded + j, sum_D, mask=inside)
            tl.store(dbias + head * padded + j, sum_bias, mask=inside)


@_kernel
def carry_kernel(
    A, ends, sums, starts, directions, groups, width, padded, states, segments, reverse,
    T: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """What enters every stretch, from what each sends on when nothing enters it; `reverse`: from last to first.

    `starts` holds what enters the first stretch taken; the rest of it is filled. One program: a state of a block.
    """
    pid = tl.program_id(0)
    n, pid = pid % states, pid // states
    blocks = tl.cdiv(width, J)
    j, pid = (pid % blocks) * J + tl.arange(0, J), pid // blocks
    inside, g, pid = j < width, pid % groups, tl.cast(pid // groups, tl.int64)  # pid: b K + k
    row = ((pid % directions) * groups + g) * width + j
    rate = 1.4426950408889634 * tl.load(A + row * states + n, mask=inside, other=0.0)
    opening = pid * segments + tl.where(reverse != 0, segments - 1, 0)
    state = tl.load(starts + ((opening * groups + g) * states + n) * padded + j, mask=inside, other=0.0)
    for tile in range(tl.cdiv(segments, T)):
        i = tile * T + tl.arange(0, T)
        s, onward = tl.where(reverse != 0, segments - 1 - i, i), tl.where(reverse != 0, -1, 1)
        there = (i < segments)[:, None] & inside[None, :]
        head = (pid * segments + s) * groups + g
        total = tl.load(sums + head[:, None] * padded + j[None, :], mask=there, other=0.0)
        at = (head * states + n)[:, None] * padded + j[None, :]
        end = tl.load(ends + at, mask=there, other=0.0)
        decay = tl.exp2(total * rate[None, :])
        end = tl.where(i[:, None] == tile * T, end + decay * state[None, :], end)
        _passed, end = tl.associative_scan((decay, end), 0, _then)
        there = (i + 1 < segments)[:, None] & inside[None, :]
        tl.store(starts + at + onward * groups * states * padded, end, mask=there)
        state = tl.sum(tl.where(i[:, None] == tile * T + T - 1, end, 0.0), 0)
