"""Everything that a resumed run needs, as named tensors: student, teacher, centers, optimizer moments.

Under FSDP the tensors are sharded; the names and whole shapes are the same whatever the strategy and world size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

OPTIMIZER = "optimizer."


def parameter_names(method: nn.Module, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, str]:
    """Names of the optimizer's parameters as the method knows them."""
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    return {p: name for name, p in method.named_parameters() if p in owned}


def gather(method: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"method.<name>": ..., "optimizer.<parameter>.<moment>": ...} of a run: the tensors themselves, not copies."""
    tensors = {f"method.{k}": v for k, v in method.state_dict().items()}
    for parameter, name in parameter_names(method, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{OPTIMIZER}{name}.{key}"] = torch.as_tensor(value)
    return tensors


def room_for(
    method: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Tensors like `gather`'s for a checkpoint with these names and shapes, to be read into.

    Those of the method are its own, so that reading sets them; moments are new (an optimizer has none before its first
    step). Raises ValueError naming keys that are missing, left over or of another shape.
    """
    tensors = {f"method.{k}": v for k, v in method.state_dict().items()}
    for parameter, name in parameter_names(method, optimizer).items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{OPTIMIZER}{name}.{key}" in stored:
                # "step" stays where AdamW keeps it: on the CPU unless it is fused or capturable.
                like = torch.zeros((), dtype=torch.float32) if key == "step" else torch.zeros_like(parameter)
                tensors[f"{OPTIMIZER}{name}.{key}"] = like.detach()
    problems = [f"missing {k}" for k in tensors if k not in stored]
    problems += [f"unexpected {k}" for k in stored if k not in tensors]
    problems += [
        f"{k}: {tuple(stored[k])} in the checkpoint, {tuple(v.shape)} in the model"
        for k, v in tensors.items()
        if k in stored and tuple(stored[k]) != tuple(v.shape)
    ]
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        said = "; ".join(p.replace(" method.", " ").removeprefix("method.") for p in problems[:12])
        raise ValueError(
            f"the checkpoint is of another architecture: {said}{more}. "
            "Resume with the settings the run began with, or choose another --out"
        )
    return tensors


def restore(method: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take over what was read into `room_for`'s tensors."""
    method.load_state_dict({k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")})
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, name in parameter_names(method, optimizer).items():
        prefix = f"{OPTIMIZER}{name}."
        moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if moments:
            if fused:
                moments["step"] = moments["step"].to(parameter.device)
            optimizer.state[parameter] = moments
