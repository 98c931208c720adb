"""Everything that a resumed run needs, as named tensors: student, teacher, centers, optimizer moments."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def parameter_names(method: nn.Module, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, str]:
    """Names of the optimizer's parameters as the method knows them."""
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    return {p: name for name, p in method.named_parameters() if p in owned}


def gather(method: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"method.<name>": ..., "optimizer.<parameter>.<moment>": ...} of a run."""
    tensors = {f"method.{k}": v for k, v in method.state_dict().items()}
    for parameter, name in parameter_names(method, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    return tensors


def restore(method: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put `gather`'s tensors back. Raises ValueError naming keys that are missing, left over or of another shape."""
    state = {k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")}
    own = method.state_dict()
    problems = [f"missing {k}" for k in own if k not in state]
    problems += [f"unexpected {k}" for k in state if k not in own]
    problems += [
        f"{k}: {tuple(v.shape)} in the checkpoint, {tuple(own[k].shape)} in the model"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(
            f"the checkpoint is of another architecture: {'; '.join(problems[:12])}{more}. "
            "Resume with the settings the run began with, or choose another --out"
        )
    method.load_state_dict(state, strict=True)
    for parameter, name in parameter_names(method, optimizer).items():
        prefix = f"optimizer.{name}."
        moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if moments:
            # "step" stays where AdamW keeps it: on the CPU unless it is fused or capturable.
            optimizer.state[parameter] = {
                k: v.clone() if k == "step" else v.to(parameter.device, parameter.dtype, copy=True)
                for k, v in moments.items()
            }
