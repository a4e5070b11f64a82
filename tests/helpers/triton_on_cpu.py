"""Triton's kernels without a GPU: run by its interpreter, one program after the other, or compiled for a GPU.

    python triton_on_cpu.py CONSTANTS CAPABILITY WARPS FILE

compiles the fused step with these constants (JSON) for GPUs of a capability (90 is 9.0), and writes the code into the
file. It prints the path of cuobjdump and the bytes of shared memory.

For the interpreter, set TRITON_INTERPRET=1 before Triton is imported. It multiplies the bits of bfloat16 numbers as if
they were whole numbers; after `mend_interpreter` it multiplies the numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"images": "*u8", "labels": "*i32", "sums": "*fp64", "counter": "*i32"}  # of arguments; the others are *fp32
NUMBERS = ("N", "B", "first_step", "steps")


def mend_interpreter() -> None:
    """From now on `tl.dot` takes bfloat16 in the interpreter."""
    from triton import language
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def as_float(operand: Any) -> Any:
        if operand.dtype.scalar != language.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), language.float32)

    def create_dot(self: Any, left: Any, right: Any, *others: Any) -> Any:
        return dot(self, as_float(left), as_float(right), *others)

    interpreter.InterpreterBuilder.create_dot = create_dot


def main(constants: dict[str, Any], capability: int, warps: int, target: Path) -> None:
    """Compile `take_steps`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mnist_dist.training.steps.fused_kernels import take_steps

    constants, names = {**constants, "STAGE": 0}, take_steps.arg_names
    signature = {name: "constexpr" if name in constants else "i32" if name in NUMBERS else TYPES.get(name, "*fp32")
                 for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name].startswith("*")}
    code = triton.compile(ASTSource(take_steps, signature, values, aligned), target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": warps, "launch_cooperative_grid": True})
    target.write_bytes(code.asm["cubin"])
    print(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump", code.metadata.shared)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
