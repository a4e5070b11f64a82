"""Digits drawn by a simulated pen, used if no copy of MNIST is found.

A digit is one of several pen paths for its class, shaken, bent, slanted, turned, scaled to MNIST's 20-pixel
box and inked with a pen of varying width. Every step is IEEE-exact arithmetic on raw PCG64 bits, in a fixed
order, so the images are the same, bit for bit, on every machine and for any number of threads. The module
does not know how real writers differ. So what is measured on its digits does not hold for MNIST.

In one file, because every constant and every step of the drawing decides the bits of its images.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.random import PCG64, SeedSequence
from numpy.typing import NDArray

from mnist_dist.disk.files import make_folder, open_file, real, remove, rename
from mnist_dist.disk.lock import FolderLock, Held

F32: TypeAlias = NDArray[np.float32]
U8: TypeAlias = NDArray[np.uint8]
Styles: TypeAlias = tuple[F32, NDArray[np.intp], F32]
VERSION = 1  # part of the cache's name: raise it, and renew the hash, whenever an image changes
DEFAULT_SHA256 = "d22540fca0a8b5ca3c6920f49b473a273449b4aba0a127b53e7ecf8c3d20dd15"
SIDE = 28
BLOCK = 500  # images that share one random generator; like the seed, it is part of what the images are
DABS = 72  # round dabs of the pen along a path, mostly less than a pixel apart
WINDOW = 7  # pixels a side around a dab that it can ink
LOCK_WAIT_S = 60.0  # far above the seconds that making the set takes
WEIGHT = 12  # sum of the weights of each digit's paths

# Pen paths: digits 0 to 9 parted by ";", the styles of one by "|". Each is its weight, then points "xy" of a
# smooth curve, base 36 (36 x 36 grid, y downwards); "," makes the point before a corner, "/" lifts the pen.
PATHS = """
3 j1 a5 6i av ky ts te o3 h2 | 3 m5 h1 8a 6m cw lx sk p6 i2 d4 | 2 o2 e2 7b 7r gy qu th p7 i1 c2 | 1 f1 87 6k
bw mx sn r6 k2 f5 f8 | 2 p4 i1 97 6k cv lx sl p9 j5 g6 | 1 s1 p7 j2 a7 7m ex pt sh p7 k2 ;
5 i1 ii iy | 2 i1 ga gn iy | 2 i1 ja io gy | 1 d7 h5 j1 , ii iy | 2 a9 g5 j1 , ii ix / 9x iw rx ;
3 79 b3 j1 q6 og gp 7w , fv mw tv | 3 79 c3 k1 p6 nf gp 9w 5v 7q dr kv px vt | 2 64 h2 s3 , ih 7w , iw uw | 1
9a b3 j1 q6 ng eo 7w dv ly uu | 2 77 e2 o3 p9 ii aq 6x , cs iu uy | 1 ca 95 f1 l2 na il au 5v 7p gs px yw ;
4 75 g1 o4 ob fg , oi sp mw ey 7u | 2 77 f2 o4 nb gg ei ih pk qs jy cy 7u | 2 73 h2 q2 , k9 ff , ng so nw fy
7u | 2 86 h2 n6 lc ff , lg sn mw dy 5s | 1 a4 i1 n6 je fh , mj pp jw by | 1 67 g3 q2 na gf ng tm pu gx 6x ;
4 a2 9a 7i , ij si / p1 pi ny | 2 n1 dc 5l , im ul / nb mn ly | 2 92 7c ai ji pc r1 , pg oy | 1 j2 cc 6n , fl
ng ra , nl ky | 2 a2 7c cj ki pc / r1 pg ny | 1 d2 79 7g gi pb p2 , pg oy ;
2 r2 i2 a3 , 99 8f , gd ph rp jx 7u | 4 a3 aa 8g , he pj ps hy 7u / a3 j2 s1 | 2 s2 i2 b6 bc kh pn kw cy 6u |
2 s1 i2 c3 , a9 af , ie ok ms ey 6w | 1 w3 n5 f6 , ae ih mn iu bx 5t | 1 o2 h4 d8 ge mj np iv ax ;
4 m1 d9 8k au iy pt nl hk aq | 2 p2 h4 af 7r fy ox sp lj el at | 2 j1 ba 8m dv lx rr mk fn cu | 2 g1 bb 9n aw
ky pu pn ik bn 9r | 1 s2 ha 9l aw kx st pp ip cs | 1 i1 fb dm eu ix mu lp in ep ;
4 73 i3 s2 , le gy | 1 73 i3 s2 , le gy / bj ji rh | 1 b7 h3 m2 n7 ki iy | 2 67 83 i3 s2 oc im gy | 2 79 73 ,
i3 s2 , ne ky | 1 57 e5 p2 , jg ay | 1 63 f4 o2 r7 ne jy / cj ji rg ;
5 p6 i1 a6 cd lj rr iy 9t cl ld q6 | 3 ig aa f1 o3 oc ig 9o cx mx pp ig | 2 r3 i1 97 ff ok ps hy 9u bn jg t1 |
1 jh cc a3 k1 p7 ke cm 9u iy qs nk ig | 1 s2 j2 c7 fe kl ju dx as hl ne u3 ;
3 p7 i1 a6 8e gh oc p6 , pi ny | 2 p7 i1 97 af ig pa r5 , qj mv fy 9u | 3 p4 i1 97 8f fi ne r4 pg hy | 2 o7 g2
78 bg kf q6 , mi hy | 1 d2 88 bf jf p7 k2 e2 , n3 pe oy | 1 r2 i1 96 ae jf p8 s2 pi ks dy
"""


class Digits(NamedTuple):
    """A set of digits: images uint8 [n, 28, 28], white (255) on black (0), and labels uint8 [n], 0 to 9."""

    train_images: U8
    train_labels: U8
    test_images: U8
    test_labels: U8


def make_digits(num_train: int = 60_000, num_test: int = 10_000, seed: int = 0, threads: int = 0) -> Digits:
    """Make the digits, without touching the disk; fewer of them are the first of more.

    threads (0: one per core) changes only the speed. Raises ValueError for a negative number.
    """
    sizes = num_train, num_test
    digits = Digits(*(np.empty((n, *tail), np.uint8) for n in sizes for tail in ((SIDE, SIDE), ())))
    styles = _read_styles()

    def fill(job: tuple[int, int]) -> None:
        split, block = job
        made = _make_block(PCG64(SeedSequence(seed, spawn_key=job)), styles)
        for array, new in zip(digits[2 * split : 2 * split + 2], made, strict=True):
            part = array[block * BLOCK : (block + 1) * BLOCK]
            part[...] = new[: len(part)]

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(threads or cores) as pool:
        jobs = [(split, block) for split in (0, 1) for block in range(-(-sizes[split] // BLOCK))]
        list(pool.map(fill, jobs))  # list() raises here what a thread raised
    return digits


def load_digits(cache_dir: Path, num_train: int = 60_000, num_test: int = 10_000, seed: int = 0) -> Digits:
    """Return make_digits(num_train, num_test, seed), from its cache file under cache_dir if that is undamaged.

    Otherwise one of the processes that ask at the same time makes and caches it; if the folder is read-only,
    each makes it. Warns (RuntimeWarning) if the default set is not the pinned one. Raises as make_digits.
    """
    path = real(cache_dir) / f"digits-v{VERSION}-seed{seed}-{num_train}-{num_test}.bin"
    pinned = DEFAULT_SHA256 if (num_train, num_test, seed) == (60_000, 10_000, 0) else ""
    with ExitStack() as stack:
        with suppress(OSError, Held):
            make_folder(path.parent)
            lock = FolderLock(path.parent, f"{path.name}.lock")
            lock.acquire(LOCK_WAIT_S)
            stack.callback(lock.release)
        digits = _read(path, num_train, num_test, pinned)
        if digits is None:
            digits = make_digits(num_train, num_test, seed)
            made = digest(digits)
            if pinned and made != pinned:
                warnings.warn(f"digits of SHA-256 {made}, not {pinned}", RuntimeWarning, stacklevel=2)
            with suppress(OSError):
                _write(path, digits, made)
    return digits


def digest(digits: Digits) -> str:
    """Return the SHA-256, in hexadecimal, of the bytes of the four arrays in order."""
    return hashlib.sha256(b"".join(array.tobytes() for array in digits)).hexdigest()


def _read(path: Path, num_train: int, num_test: int, pinned: str) -> Digits | None:
    """Read a cache file, 32 bytes of SHA-256 and the four arrays; None unless whole and the right one."""
    sizes = [32, num_train * SIDE * SIDE, num_train, num_test * SIDE * SIDE, num_test]
    try:
        with open(open_file(path, os.O_RDONLY), "rb") as file:
            data = np.fromfile(file, np.uint8, sum(sizes) + 1)  # one more, to see that the file ends there
        sha, a, b, c, d = np.split(data, np.cumsum(sizes)[:-1])
        digits = Digits(a.reshape(num_train, SIDE, SIDE), b, c.reshape(num_test, SIDE, SIDE), d)
    except (OSError, ValueError):  # no such file, or too short a one
        return None
    return digits if digest(digits) == (pinned or sha.tobytes().hex()) else None


def _write(path: Path, digits: Digits, sha256: str) -> None:
    # Not tempfile, whose files only their owner can read; the name is random as hosts may share the folder.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(open_file(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(bytes.fromhex(sha256) + b"".join(array.tobytes() for array in digits))
            file.flush()
            os.fsync(file.fileno())
        rename(part, path)
    finally:
        remove(part)


def _read_styles() -> Styles:
    """Return points [10 * WEIGHT, most, 2] in half heights from the middle, then knots and weights, both
    [10 * WEIGHT, DABS, 4]: the four points that place each dab, and how much each of them counts."""
    texts = [path.split() for digit in PATHS.split(";") for path in digit.split("|")]
    texts = [tokens for weight, *tokens in texts for _ in range(int(weight))]
    points = np.zeros((len(texts), max(map(len, texts)), 2))
    knots, weights = np.zeros((len(texts), DABS, 4), np.intp), np.zeros((len(texts), DABS, 4), np.float32)
    for s, tokens in enumerate(texts):
        strokes: list[list[int]] = [[]]
        for n, token in enumerate(tokens):  # the places of "," and "/" remain unused points
            if token in ",/":
                strokes.append(strokes[-1][-1:] if token == "," else [])
            else:
                strokes[-1].append(n)
                points[s, n] = int(token[0], 36) / 17.5 - 1, int(token[1], 36) / 17.5 - 1
        ends = [(k, i, len(k) - 1) for k in strokes for i in range(len(k) - 1)]
        quads = np.array([(k[max(i - 1, 0)], k[i], k[i + 1], k[min(i + 2, last)]) for k, i, last in ends])
        dx, dy = (points[s, quads[:, 2]] - points[s, quads[:, 1]]).T
        reach = np.append(0, np.add.accumulate(np.sqrt(dx * dx + dy * dy)))  # chords do for dabs evenly apart
        far = reach[-1] * np.arange(DABS) / (DABS - 1)
        span = np.minimum(np.searchsorted(reach, far, "right"), len(quads)) - 1
        u = (far - reach[span]) / (reach[span + 1] - reach[span])
        knots[s] = quads[span]  # of a Catmull-Rom curve
        weights[s, :, :2] = np.stack((u * (u * (2 - u) - 1), u * u * (3 * u - 5) + 2), 1) / 2
        weights[s, :, 2:] = np.stack((u * (u * (4 - 3 * u) + 1), u * u * (u - 1)), 1) / 2
    return points.astype(np.float32), knots, weights


def _uniform(bits: PCG64, *shape: int) -> F32:
    raw = bits.random_raw(math.prod(shape)).reshape(shape)
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _bell(bits: PCG64, *shape: int) -> F32:  # nearly normal: mean 0, variance 1
    a, b, c, d = _uniform(bits, 4, *shape)
    return (a + b + c + d - 2) * np.float32(math.sqrt(3))


def _make_block(bits: PCG64, styles: Styles) -> tuple[U8, U8]:
    style = (bits.random_raw(BLOCK) % np.uint64(10 * WEIGHT)).astype(np.intp)
    x, y, pressure = _draw(bits, style, styles)
    u = _uniform(bits, 2, BLOCK)
    width = 0.77 + u[0] * (0.75 + 0.5 * u[1])  # radius in pixels
    x, y = _lay_out(bits, x, y, width)
    depth = _ink(x, y, np.clip(width * (1 + 0.13 * pressure), 0.5, 2.4))  # WINDOW has room for 2.4
    # Roughness of the edge over 2 x 2 pixels: by single ones it looks like noise, not like paper.
    raw = bits.random_raw(depth.size // 8).astype("<u8")  # the byte order is part of what the images are
    rough = raw.view(np.uint8).reshape(depth.shape).astype(np.float32) - 127.5
    rough[:, 1:] += rough[:, :-1]
    rough[:, :, 1:] += rough[:, :, :-1]
    ink = np.clip((depth + rough * (0.38 / 255)) / 1.3 + 0.5, 0, 1)  # an edge 1.3 pixels wide
    return np.rint(ink * 255).astype(np.uint8), (style // WEIGHT).astype(np.uint8)


def _draw(bits: PCG64, style: NDArray[np.intp], styles: Styles) -> tuple[F32, ...]:
    """Shake the points of the styles [n]; returns x, y in half heights and the pressure, each [DABS, n]."""
    points, knots, weights = styles[0][style], styles[1][style], styles[2][style]
    untidy = _uniform(bits, len(style), 1)
    size = 0.06 + 0.09 * untidy * untidy
    shake = _bell(bits, len(style), points.shape[1] + 2, 3)
    # Points that follow each other move together, else curves become polygons; 0.8165 restores the variance.
    x, y, pressure = np.moveaxis((shake[:, 1:-1] + 0.5 * (shake[:, :-2] + shake[:, 2:])) * 0.8165, 2, 0)
    curves = []
    for value in (points[..., 0] + x * size, points[..., 1] + y * size, pressure):
        a, b, c, d = (np.take_along_axis(value, knots[..., i], 1) * weights[..., i] for i in range(4))
        curves.append(np.ascontiguousarray((a + b + c + d).T))
    return tuple(curves)


def _lay_out(bits: PCG64, x: F32, y: F32, width: F32) -> tuple[F32, F32]:
    """Bend, widen, slant and turn the paths [DABS, n], scale them to the box, centre the ink; in pixels."""
    n = len(width)
    a = _bell(bits, 10, n) * 0.085
    xx, xy, yy = x * x, x * y, y * y
    u = x + a[0] * xx + a[1] * xy + a[2] * yy + a[3] * (yy * y) + a[4] * (xx * y)
    v = y + a[5] * xx + a[6] * xy + a[7] * yy + a[8] * (xx * x) + a[9] * (yy * x)
    b = _bell(bits, 3, n)
    u = u * (1 + 0.19 * b[0]) - (0.15 + 0.22 * b[1]) * v
    t = 0.07 * b[2]  # tangent of half the angle: cos() and sin() differ between machines
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    x, y = cos * u - sin * v, sin * u + cos * v
    extent = np.maximum(np.maximum(np.ptp(x, 0), np.ptp(y, 0)), 0.5)
    scale = (20 - 2 * width) * (0.94 + 0.08 * _uniform(bits, n)) / extent
    # The mean by accumulate: unlike np.sum it has a defined order of additions.
    middle_x, middle_y = (np.add.accumulate(c, 0)[-1] / DABS for c in (x, y))
    to = _uniform(bits, 2, n) + 13.5
    return (x - middle_x) * scale + to[0], (y - middle_y) * scale + to[1]


def _ink(x: F32, y: F32, radius: F32) -> F32:
    """Return each pixel's depth in the ink (pixels; below 0: outside), [n, 28, 28], of dabs [DABS, n]."""
    n = x.shape[1]
    depth = np.full(n * SIDE * SIDE, -9, np.float32)
    first = np.arange(n) * (SIDE * SIDE)
    step = np.arange(WINDOW)
    window = (step[:, None] * SIDE + step).ravel()
    for px, py, r in zip(x, y, radius, strict=True):
        left, top = (np.clip(np.rint(p) - WINDOW // 2, 0, SIDE - WINDOW) for p in (px, py))
        dx, dy = ((low - p)[:, None] + step.astype(np.float32) for low, p in ((left, px), (top, py)))
        away = np.sqrt((dy * dy)[:, :, None] + (dx * dx)[:, None, :]).reshape(n, -1)
        at = (first + (top * SIDE + left).astype(np.intp))[:, None] + window
        depth[at] = np.maximum(depth[at], r[:, None] - away)
    return depth.reshape(n, SIDE, SIDE)
