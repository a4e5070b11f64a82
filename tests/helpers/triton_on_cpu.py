"""Triton's kernels without a GPU: run by its interpreter, one program after the other, or compiled for a GPU.

Set TRITON_INTERPRET=1 before Triton is imported. The interpreter multiplies the bits of bfloat16 numbers as if they
were whole numbers; here it multiplies the numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np


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
