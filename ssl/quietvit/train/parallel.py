"""How a student runs over several processes: the one file that knows wrapping, compiling and activation checkpointing.

The order, each step of which the next one relies on (PyTorch's own engines throughout; training.md 7.4, 7.5):

    1. activation checkpointing of each block   so that what is compiled is the recomputation too
    2. torch.compile of each block              so that what is sharded is the compiled block
    3. DDP, or fully_shard of each block and then of the whole (teacher likewise)
    4. the optimizer, made by the caller        its moments are sharded as the parameters are
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from quietvit import dist
from quietvit.contracts import Batch, Targets

STRATEGIES = ("auto", "none", "ddp", "fsdp")
CHECKPOINTING = ("none", "selective", "full")
# Kept by selective checkpointing: products of matrices and attention are what is dear to compute again.
KEPT = (
    "mm",
    "addmm",
    "bmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)

Study = Callable[[Batch, Targets], dict[str, Tensor]]


@dataclass(frozen=True)
class Engine:
    """What the training step needs to know of all this."""

    study: Study  # the method's losses, through DDP where that is the strategy
    strategy: str  # "none", "ddp" or "fsdp"
    modules: Mapping[str, nn.Module]  # student submodules that hold gradients
    owns_group: bool = False  # a process group was made for it alone

    def close(self) -> None:
        """Take down the process group that was made for a single sharded process; any other is the launcher's."""
        if self.owns_group and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around one micro-batch: gradients travel between processes with the last one only."""
        if self.strategy == "ddp" and not last:
            return cast(DistributedDataParallel, self.study).no_sync()
        if self.strategy == "fsdp":
            return self._sharded(last)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _sharded(self, last: bool) -> Any:
        for module in self.modules.values():
            cast(FSDPModule, module).set_requires_gradient_sync(last)
        yield


def pick_strategy(name: str) -> str:
    """ "auto": none for one process, DDP for several (it is the fastest while a whole copy fits: docs/scaling.md).

    Raises ValueError for an unknown one, and for "none" with several processes.
    """
    if name not in STRATEGIES:
        raise ValueError(f"parallel.strategy={name!r}: choose {', '.join(STRATEGIES)}")
    several = dist.world_size() > 1
    if name == "auto":
        return "ddp" if several else "none"
    if name == "none" and several:
        raise ValueError(f"parallel.strategy=none, but {dist.world_size()} processes run: choose ddp, fsdp or auto")
    return "none" if name == "ddp" and not several else name


def parallelise(
    method: nn.Module,
    *,
    strategy: str,
    checkpointing: str,
    compile_blocks: bool,
    device: torch.device,
    precision: torch.dtype,
) -> Engine:
    """Prepare a method (with `student` and `teacher`, ModuleDicts that hold a "backbone") in place.

    Args:
        strategy: what `pick_strategy` returned. "fsdp" with a single process makes a group of its own if none is up:
            the engine's `close` takes it down.
        checkpointing: "none"; "full": a block's forward is computed again in the backward pass; "selective": all but
            matrix products and attention is.
        compile_blocks: torch.compile each block of student and teacher.
        precision: bfloat16 gathers parameters in bf16 under FSDP and reduces gradients in fp32.

    Raises ValueError for an unknown `checkpointing`.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"parallel.checkpointing={checkpointing!r}: choose {', '.join(CHECKPOINTING)}")
    student = cast(nn.ModuleDict, method.student)
    teacher = cast(nn.ModuleDict, method.teacher)
    if checkpointing != "none":
        for block in _blocks(student):
            _recompute(block, selective=checkpointing == "selective")
    if compile_blocks:
        for block in (*_blocks(student), *_blocks(teacher)):
            block.compile()
    study: Study = functools.partial(_study, method)
    owns_group = strategy == "fsdp" and dist.make_group_of_one(device)
    if strategy == "fsdp":
        _shard(student, device, precision, keep_whole=True)
        # The teacher has no backward pass that would drop its whole weights again, and they must not outlive the EMA.
        _shard(teacher, device, precision, keep_whole=False)
    elif strategy == "ddp":
        ids = [device] if device.type == "cuda" else None
        # Every parameter gets a gradient each step (masks may be empty: the mask token then gets zeros).
        study = cast(Study, DistributedDataParallel(_Study(method), device_ids=ids, gradient_as_bucket_view=True))
    return Engine(study, strategy, dict(student.items()), owns_group)


def _study(method: nn.Module, batch: Batch, targets: Targets) -> dict[str, Tensor]:
    """`method.study` as it is when the step is taken: a benchmark may time another in its place."""
    losses: dict[str, Tensor] = method.study(batch, targets)  # type: ignore[operator]
    return losses


class _Study(nn.Module):
    """The method's `study` as a module whose parameters are the student's: what DDP wraps."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.student = method.student
        self._method = [method]  # in a list: the teacher must not become a submodule

    def forward(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        return _study(self._method[0], batch, targets)


def _blocks(modules: nn.ModuleDict) -> list[nn.Module]:
    return list(cast(nn.ModuleList, modules["backbone"].blocks))


def _recompute(block: nn.Module, *, selective: bool) -> None:
    """Swap a block's forward for one that is computed again; names of parameters stay as they are."""
    forward = block.forward
    context = functools.partial(create_selective_checkpoint_contexts, _policy) if selective else None

    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        extra: dict[str, Any] = {"context_fn": context} if context is not None else {}
        return checkpoint(forward, *args, use_reentrant=False, **extra, **kwargs)

    block.forward = again


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = getattr(op, "__name__", "").split(".")[0] in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _shard(modules: nn.ModuleDict, device: torch.device, precision: torch.dtype, *, keep_whole: bool) -> None:
    """FSDP2: every block a group of its own, then what is left of the backbone, then each head.

    `keep_whole`: what is not in a block stays gathered between forward and backward pass.
    """
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (dist.group_size(),))
    half = precision is torch.bfloat16 and device.type == "cuda"
    # Autocast decides what is computed in bf16; inputs are not cast here, so that the fp32 islands stay fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )  # fmt: skip
    backbone = modules["backbone"]
    for block in _blocks(modules):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for module in modules.values():
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_whole)
    # Called beside forward by the health probe and by evaluations: they too must find whole parameters.
    for name in ("before_and_after_norm", "last_blocks"):
        register_fsdp_forward_method(backbone, name)
