"""Optimizer steps of an MLP with one hidden layer as one kernel for a GPU, in Triton.

A step has three stages. All programs of the kernel wait for each other between two stages.

1. Forward: a program has a tile of the first layer's weights, UNITS hidden units by SLICE pixels. It computes the part
   of the hidden layer that comes from these pixels.
2. Loss: a program has some rows of the batch. It adds up the parts, and computes the second layer, the loss and the
   gradients of both layers' outputs.
3. Update: a program computes the gradient of its tile, and Adam's step. Some programs also do this for the biases and
   the second layer.

If there is a program for each tile, weights and Adam's moments stay in registers from step to step.

Products run on tensor cores with the accuracy of float32. A pixel is a byte, which bfloat16 holds exactly. The float32
operand is split into three bfloat16 numbers of 8 bits each, and their products are added in float32. So x . w is
2/255 (bytes . w) - sum(w). Every sum has a fixed order: the same GPU gives the same bits.

Shapes: N images in an epoch, B in a batch, R rows of a block, K = 128 pixels of a slice with padding, U = 16 units,
H hidden units, C = 16 classes with padding, S = 7 slices, E steps of an epoch.

Arrays: `images` uint8 [S, N, K] and `labels` int32 [N], in the order of the epoch; `corrections` float32 [E, 2], the
`rate` and the `root` of `adam`; `sums` float64 [E], which gets each step's sum of losses; memory to work in: `parts`
[S, B, H], `hidden` and `slopes` [B, H], `slopes2` [B, C], `losses` [B], and `counter`, which is 0.

In one file, because the stages read what the others write.
"""

from __future__ import annotations

import triton
import triton.language as tl

SLICES, SLICE, PADDED_SLICE = 7, 112, 128  # of the 784 pixels; Triton's ranges are powers of two
UNITS = 16  # hidden units of a tile: the fewest that a tensor core takes
PADDED_CLASSES = 16

PIXELS, K_USED = tl.constexpr(SLICES * SLICE), tl.constexpr(SLICE)
S, K, U, C = tl.constexpr(SLICES), tl.constexpr(PADDED_SLICE), tl.constexpr(UNITS), tl.constexpr(PADDED_CLASSES)
CLASSES, SLOPE = tl.constexpr(10), tl.constexpr(0.1)  # of the model
BLOCK = tl.constexpr(64)  # rows at a time, for the second layer
CONTRAST = tl.constexpr(2.0 / 255.0)  # a pixel is CONTRAST x byte - 1


@triton.jit
def wait_for_all(counter, arrivals):
    """Wait until the programs have come here `arrivals` times in all. Then each sees what the others wrote, if it loads
    with cache_modifier=".cg".
    """
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def adam(weight, mean, square, gradient, rate, root, BETA1: tl.constexpr, BETA2: tl.constexpr, EPSILON: tl.constexpr):
    """Adam's step with the bias corrections in `rate`, lr / (1 - BETA1^t), and `root`, (1 - BETA2^t)^(1/2)."""
    mean = mean + (gradient - mean) * (1.0 - BETA1)
    square = square * BETA2 + gradient * gradient * (1.0 - BETA2)
    return weight - rate * (mean / (tl.sqrt(square) / root + EPSILON)), mean, square


@triton.jit
def three_parts(x):
    """float32 numbers as three bfloat16 numbers, whose sum they are."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def load_pixels(images, N, slice, first, rows, count):
    """uint8 [R, K], of the rows of the batch that begins at image `first`."""
    k = tl.arange(0, K)
    places = (slice * N + first + rows)[:, None] * K + k[None, :]
    return tl.load(images + places, mask=(rows < count)[:, None], other=0)


@triton.jit
def forward_rows(pixels_RK, weights_KU, part, H, units, rows, count):
    """The part of these hidden units [R, U] that comes from a slice."""
    x = pixels_RK.to(tl.float32).to(tl.bfloat16)
    high, middle, low = three_parts(weights_KU)
    y_RU = tl.dot(x, low)
    y_RU = tl.dot(x, middle, y_RU)
    y_RU = tl.dot(x, high, y_RU) * CONTRAST - tl.sum(weights_KU, axis=0)[None, :]
    tl.store(part + rows[:, None] * H + units[None, :], y_RU, mask=(rows < count)[:, None], cache_modifier=".cg")


@triton.jit
def gradient_rows(sum_KU, sum_U, pixels_RK, slopes, H, units, rows, count):
    """Add to the gradients of a tile's weights, up to CONTRAST and the -1 of the pixels, and of its biases."""
    slopes_RU = tl.load(slopes + rows[:, None] * H + units[None, :], mask=(rows < count)[:, None], other=0.0,
                        cache_modifier=".cg")
    high, middle, low = three_parts(slopes_RU)
    x = tl.trans(pixels_RK.to(tl.float32).to(tl.bfloat16))
    sum_KU = tl.dot(x, low, sum_KU)
    sum_KU = tl.dot(x, middle, sum_KU)
    return tl.dot(x, high, sum_KU), sum_U + tl.sum(slopes_RU, axis=0)


@triton.jit
def place_of(tile, H):
    """Of a tile: its slice, its units [U], their places in the first layer's weights [K, U], and which are used."""
    k, slice, units = tl.arange(0, K), tile % S, tile // S * U + tl.arange(0, U)
    is_used = (k < K_USED)[:, None] & (units < H)[None, :]
    return slice, units, units[None, :] * PIXELS + (slice * K_USED + k)[:, None], is_used


@triton.jit
def forward_tile(pixels, weights_KU, images, N, first, count, parts, slice, units, B, H, R: tl.constexpr,
                 KEEPS_PIXELS: tl.constexpr):
    """Stage 1 of a tile, for `count` rows."""
    block, part = tl.arange(0, R), parts + slice * B * H
    if KEEPS_PIXELS:
        forward_rows(pixels, weights_KU, part, H, units, block, count)
    else:
        for start in range(0, count, R):
            pixels_RK = load_pixels(images, N, slice, first, start + block, count)
            forward_rows(pixels_RK, weights_KU, part, H, units, start + block, count)


@triton.jit
def gradient_of_tile(pixels, images, N, first, count, slopes, slice, units, is_used, H, R: tl.constexpr,
                     KEEPS_PIXELS: tl.constexpr):
    """The gradients of a tile's weights [K, U], and of the biases of its units [U]."""
    block, sum_KU, sum_U = tl.arange(0, R), tl.zeros((K, U), tl.float32), tl.zeros((U,), tl.float32)
    if KEEPS_PIXELS:
        sum_KU, sum_U = gradient_rows(sum_KU, sum_U, pixels, slopes, H, units, block, count)
    else:
        for start in range(0, count, R):
            pixels_RK = load_pixels(images, N, slice, first, start + block, count)
            sum_KU, sum_U = gradient_rows(sum_KU, sum_U, pixels_RK, slopes, H, units, start + block, count)
    return tl.where(is_used, sum_KU * CONTRAST - sum_U[None, :], 0.0), sum_U


@triton.jit
def loss_rows(labels, first, count, parts, bias1, weight2, bias2, hidden, slopes, slopes2, losses, program, programs, B,
              H: tl.constexpr, H_PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Stage 2 of every `programs`-th group of ROWS rows: hidden layer [B, H], loss [B], and the derivatives of the mean
    loss by the outputs of the first layer [B, H] and of the second [B, C].
    """
    n, c = tl.arange(0, H_PADDED), tl.arange(0, C)
    is_unit, is_class = n < H, c < CLASSES
    weight_CH = tl.load(weight2 + c[:, None] * H + n[None, :], mask=is_class[:, None] & is_unit[None, :], other=0.0,
                        cache_modifier=".cg")
    bias_H = tl.load(bias1 + n, mask=is_unit, other=0.0, cache_modifier=".cg")
    bias_C = tl.load(bias2 + c, mask=is_class, other=0.0, cache_modifier=".cg")
    for start in range(program * ROWS, count, programs * ROWS):
        rows = start + tl.arange(0, ROWS)
        is_row = rows < count
        places, used = rows[:, None] * H + n[None, :], is_row[:, None] & is_unit[None, :]
        outputs_RH = tl.zeros((ROWS, H_PADDED), tl.float32)
        for slice in tl.static_range(S):
            outputs_RH += tl.load(parts + slice * B * H + places, mask=used, other=0.0, cache_modifier=".cg")
        outputs_RH += bias_H[None, :]
        hidden_RH = tl.where(outputs_RH > 0, outputs_RH, SLOPE * outputs_RH)
        logits_RC = tl.sum(weight_CH[None, :, :] * hidden_RH[:, None, :], axis=2) + bias_C[None, :]
        logits_RC = tl.where(is_class[None, :], logits_RC, float("-inf"))
        logits_RC -= tl.max(logits_RC, axis=1)[:, None]
        exps_RC = tl.exp(logits_RC)
        total_R = tl.sum(exps_RC, axis=1)
        is_label = c[None, :] == tl.load(labels + first + rows, mask=is_row, other=0)[:, None]
        loss_R = tl.log(total_R) - tl.sum(tl.where(is_label, logits_RC, 0.0), axis=1)
        slopes_RC = (exps_RC / total_R[:, None] - tl.where(is_label, 1.0, 0.0)) / count.to(tl.float32)
        slopes_RC = tl.where(is_class[None, :], slopes_RC, 0.0)
        slopes_RH = tl.sum(weight_CH[None, :, :] * slopes_RC[:, :, None], axis=1) * tl.where(outputs_RH > 0, 1.0, SLOPE)
        tl.store(losses + rows, loss_R, mask=is_row, cache_modifier=".cg")
        tl.store(hidden + places, hidden_RH, mask=used, cache_modifier=".cg")
        tl.store(slopes + places, slopes_RH, mask=used, cache_modifier=".cg")
        tl.store(slopes2 + rows[:, None] * C + c[None, :], slopes_RC, mask=is_row[:, None], cache_modifier=".cg")


@triton.jit
def load_vector(weight, mean, square, places, is_used):
    """A part of a parameter, and of Adam's moments."""
    return (tl.load(weight + places, mask=is_used, other=0.0, cache_modifier=".cg"),
            tl.load(mean + places, mask=is_used, other=0.0), tl.load(square + places, mask=is_used, other=0.0))


@triton.jit
def store_vector(weight, mean, square, places, is_used, w, m, v):
    """The same, to memory."""
    tl.store(weight + places, w, mask=is_used, cache_modifier=".cg")
    tl.store(mean + places, m, mask=is_used)
    tl.store(square + places, v, mask=is_used)


@triton.jit
def update_vector(weight, mean, square, places, is_used, gradient, rate, root, BETA1: tl.constexpr,
                  BETA2: tl.constexpr, EPSILON: tl.constexpr):
    """Adam's step of a part of a tensor in memory."""
    w, m, v = load_vector(weight, mean, square, places, is_used)
    w, m, v = adam(w, m, v, gradient, rate, root, BETA1, BETA2, EPSILON)
    store_vector(weight, mean, square, places, is_used, w, m, v)


@triton.jit
def update_rest(slice, units, gradient_U, count, step, sums, hidden, slopes2, losses, rate, root,
                bias1, bias1_mean, bias1_square, weight2, weight2_mean, weight2_square, bias2, bias2_mean, bias2_square,
                H: tl.constexpr, ROWS: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPSILON: tl.constexpr):
    """What the tiles of the first three slices update besides: the first layer's biases, the second layer's weights
    from these units, and, in the tile of the first units, the second layer's biases and the step's sum of losses.
    """
    c = tl.arange(0, C)
    if slice == 0:
        update_vector(bias1, bias1_mean, bias1_square, units, units < H, gradient_U, rate, root, BETA1, BETA2, EPSILON)
    if slice == 1:
        gradient_CU = tl.zeros((C, U), tl.float32)
        for start in range(0, count, ROWS):
            rows = start + tl.arange(0, ROWS)
            is_row = (rows < count)[:, None]
            slopes_RC = tl.load(slopes2 + rows[:, None] * C + c[None, :], mask=is_row, other=0.0, cache_modifier=".cg")
            hidden_RU = tl.load(hidden + rows[:, None] * H + units[None, :], mask=is_row, other=0.0,
                                cache_modifier=".cg")
            gradient_CU = tl.dot(tl.trans(slopes_RC), hidden_RU, gradient_CU, input_precision="ieee")
        is_used = (c < CLASSES)[:, None] & (units < H)[None, :]
        update_vector(weight2, weight2_mean, weight2_square, c[:, None] * H + units[None, :], is_used, gradient_CU,
                      rate, root, BETA1, BETA2, EPSILON)
    if (slice == 2) & (tl.min(units, axis=0) == 0):
        gradient_C, total = tl.zeros((C,), tl.float32), tl.zeros((1,), tl.float64)
        for start in range(0, count, ROWS):
            rows = start + tl.arange(0, ROWS)
            gradient_C += tl.sum(tl.load(slopes2 + rows[:, None] * C + c[None, :], mask=(rows < count)[:, None],
                                         other=0.0, cache_modifier=".cg"), axis=0)
            total += tl.sum(tl.load(losses + rows, mask=rows < count, other=0.0, cache_modifier=".cg").to(tl.float64),
                            axis=0)
        update_vector(bias2, bias2_mean, bias2_square, c, c < CLASSES, gradient_C, rate, root, BETA1, BETA2, EPSILON)
        tl.store(sums + step + tl.arange(0, 1), total)


@triton.jit(do_not_specialize=["N", "B", "first_step", "steps"])
def take_steps(images, labels, N, B, first_step, steps, corrections, sums, counter,
               weight1, weight1_mean, weight1_square, bias1, bias1_mean, bias1_square,
               weight2, weight2_mean, weight2_square, bias2, bias2_mean, bias2_square,
               parts, hidden, slopes, slopes2, losses,
               H: tl.constexpr, H_PADDED: tl.constexpr, R: tl.constexpr, LOSS_ROWS: tl.constexpr, TILES: tl.constexpr,
               IS_RESIDENT: tl.constexpr, KEEPS_PIXELS: tl.constexpr, STAGE: tl.constexpr,
               BETA1: tl.constexpr, BETA2: tl.constexpr, EPSILON: tl.constexpr):
    """`steps` optimizer steps from `first_step` of the epoch on. The weights and Adam's moments change in place.

    STAGE 0 is all stages, and all programs must run at the same time. STAGE 1, 2 or 3 is that stage of one step.
    IS_RESIDENT: there is a program for each of the TILES. KEEPS_PIXELS: and a batch has at most R rows.
    """
    program, programs, arrivals = tl.program_id(0), tl.num_programs(0), 0
    turns, pixels, first = tl.cdiv(TILES - program, programs), tl.zeros((R, K), tl.uint8), first_step * B
    slice, units, places, is_used = place_of(program, H)
    if IS_RESIDENT:
        w, m, v = load_vector(weight1, weight1_mean, weight1_square, places, is_used)
    if KEEPS_PIXELS:
        pixels = load_pixels(images, N, slice, first, tl.arange(0, R), tl.minimum(B, N - first))
    for step in range(first_step, first_step + steps):
        first = step * B
        count = tl.minimum(B, N - first)
        if STAGE == 0 or STAGE == 1:
            for turn in range(0, turns):
                if not IS_RESIDENT:
                    slice, units, places, is_used = place_of(program + turn * programs, H)
                    w = tl.load(weight1 + places, mask=is_used, other=0.0, cache_modifier=".cg")
                forward_tile(pixels, w, images, N, first, count, parts, slice, units, B, H, R, KEEPS_PIXELS)
        if STAGE == 0:
            arrivals += programs
            wait_for_all(counter, arrivals)
        if STAGE == 0 or STAGE == 2:
            loss_rows(labels, first, count, parts, bias1, weight2, bias2, hidden, slopes, slopes2, losses, program,
                      programs, B, H, H_PADDED, LOSS_ROWS)
        if STAGE == 0:
            after = tl.minimum(first + B, N - 1)
            if KEEPS_PIXELS:  # of the next step: they arrive while this program waits
                next_pixels = load_pixels(images, N, slice, after, tl.arange(0, R), tl.minimum(B, N - after))
            arrivals += programs
            wait_for_all(counter, arrivals)
        if STAGE == 0 or STAGE == 3:
            rate, root = tl.load(corrections + 2 * step), tl.load(corrections + 2 * step + 1)
            for turn in range(0, turns):
                if not IS_RESIDENT:
                    slice, units, places, is_used = place_of(program + turn * programs, H)
                gradient_KU, gradient_U = gradient_of_tile(pixels, images, N, first, count, slopes, slice, units,
                                                           is_used, H, R, KEEPS_PIXELS)
                if IS_RESIDENT:
                    w, m, v = adam(w, m, v, gradient_KU, rate, root, BETA1, BETA2, EPSILON)
                else:
                    update_vector(weight1, weight1_mean, weight1_square, places, is_used, gradient_KU, rate, root,
                                  BETA1, BETA2, EPSILON)
                update_rest(slice, units, gradient_U, count, step, sums, hidden, slopes2, losses, rate, root,
                            bias1, bias1_mean, bias1_square, weight2, weight2_mean, weight2_square,
                            bias2, bias2_mean, bias2_square, H, BLOCK, BETA1, BETA2, EPSILON)
        if KEEPS_PIXELS and STAGE == 0:
            pixels = next_pixels
        tl.debug_barrier()  # the threads of this program see its weights
    if IS_RESIDENT and (STAGE == 0 or STAGE == 3):
        store_vector(weight1, weight1_mean, weight1_square, places, is_used, w, m, v)
