"""Inductor: how a step is compiled, where its code is kept, and what its failures mean."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from mnist_dist.disk.files import make_folder, real
from mnist_dist.record.environment import processor_kind
from mnist_dist.record.gains import user_cache

# Adam's bias corrections are scalars, which inductor would otherwise compute again for every vector of 16 weights: this
# makes it keep them, and halves a step at batch 1 (its default is 30). With 4, scaling the images takes two passes
# over them. And each call need not see whether all tensors have their shapes: they are the same tensors.
INDUCTOR_OPTIONS = {"realize_opcount_threshold": 7, "size_asserts": False}

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # environment variable: inductor's cache

# Exceptions of torch: there is no compiler, or it fails. By name, because they differ between versions.
NO_COMPILER = {"CppCompileError", "InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton"}


def compiler_failure(error: BaseException) -> str | None:
    """What a user can do about an exception of torch.compile; None if it is a bug, here or in torch."""
    while error is not None:  # torch wraps what it catches
        if NO_COMPILER & {kind.__name__ for kind in type(error).__mro__}:
            return "install a C++ compiler such as g++ (on a GPU: triton), or give --compile off"
        if isinstance(error, OSError):  # of the compiler's process or its cache
            return "check that the compiler runs and that its cache can be written, or give --compile off"
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return None


def keep_compiled_code() -> None:
    """Have inductor keep its code in the user's cache; its default folder is lost when a machine restarts. There is one
    folder for each kind of processor, because machines may share the user's files.
    """
    if not os.environ.get(CACHE):
        with suppress(OSError):
            folder = real(user_cache()) / "compiled" / processor_kind()
            make_folder(folder)
            os.environ[CACHE] = str(folder)


def inductor_options(onednn_from: int | None = None) -> dict[str, Any]:
    """How inductor compiles a step."""
    from mnist_dist.training.steps.graph_pass import GraphPass  # which imports inductor

    return {"post_grad_custom_pre_pass": GraphPass(onednn_from), **INDUCTOR_OPTIONS}


def compile_graph(graph: Any, examples: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """Inductor's code for a graph. We assume that the C++ compiler knows the processor's vector instructions. Inductor
    would compile a program for each of them to check, which takes a third of a first start.
    """
    try:
        return torch._inductor.compile(graph, examples, options={**options, "cpp.vec_isa_ok": True})
    except Exception as error:
        if compiler_failure(error) is None:
            raise
        from torch._inductor import cpu_vec_isa

        with suppress(AttributeError):  # what inductor remembers of them, as torch 2.6 to 2.15 have it
            cpu_vec_isa.valid_vec_isa_list.cache_clear()
            for kind in {kind for isa in cpu_vec_isa.supported_vec_isa_list for kind in type(isa).__mro__}:
                getattr(vars(kind).get("__bool__"), "cache_clear", bool)()
        return torch._inductor.compile(graph, examples, options=options)


def compile_once(function: Callable[..., Tensor | None], *varying: Tensor, onednn_from: int | None = None
                 ) -> Callable[..., Sequence[Tensor]]:
    """`function`, which returns a tensor or nothing, compiled for arguments like `varying`, without being run.

    A function from torch.compile checks everything that it refers to at each call; at batch 1 this takes longer than
    the step. Here it refers only to tensors that stay the same. So the compiled graph is called directly, with these
    tensors and the arguments that vary.
    """
    # it logs a warning on a machine without a GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    captured: dict[str, Any] = {}
    torch.compiler.reset()  # otherwise it counts as a recompilation of an earlier function

    def backend(graph: Any, examples: Any) -> Callable[..., list[Tensor]]:
        captured["graph"] = compile_graph(graph, examples, inductor_options(onednn_from))

        def remember(*inputs: Tensor) -> list[Tensor]:
            captured["inputs"] = inputs
            return [torch.zeros(()) for _ in graph.graph.output_node().args[0]]

        return remember

    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*varying)
    compiled, inputs = captured["graph"], list(captured["inputs"])
    places = [next(i for i, tensor in enumerate(inputs) if tensor is argument) for argument in varying]

    def call(*arguments: Tensor) -> Sequence[Tensor]:
        for place, argument in zip(places, arguments, strict=True):
            inputs[place] = argument
        return compiled(*inputs)

    return call
