"""`--to onnx`: one ONNX graph for each size, with features and class scores as outputs, for any number of images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quietvit.weights.export.fixed_size import (
    FixedSize,
    OpenedGraphs,
    Run,
    description,
    graph_files,
    output_shapes,
    outputs_as_code,
    quietly,
    size_refusal,
    sizes_as_text,
    written_files,
    written_sizes,
)
from quietvit.weights.export.target import ExportOptions, Size, Target
from quietvit.weights.extractor import BackboneExtractor

__all__ = ["TARGET"]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18  # the first that the exporter writes without converting down; LayerNormalization is an operator from 17 on
ONE_FILE_BYTES = (
    1_900_000_000  # a protobuf holds 2 GiB; ours: what leaves room for the graph. Beyond: weights beside it
)
TOLERANCE = 1e-4  # ours: 20 times the greatest difference measured, 5e-6 (ViT-S at 518 px, T2T-ViT-14 at 224)


def refusal(extractor: BackboneExtractor, options: ExportOptions) -> str | None:
    """Missing packages, or a size that cannot be."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        return f"ONNX needs {', '.join(missing)}, not installed here: pip install 'quietvit[onnx]'"
    return size_refusal(extractor, options)


def write(extractor: BackboneExtractor, folder: Path, options: ExportOptions) -> None:
    """Raises ValueError if torch cannot export the model, OSError as the file system does."""
    import onnx

    for name, size in graph_files(extractor, options, ".onnx").items():
        model = FixedSize(extractor, size)
        with quietly(f"torch {torch.__version__} cannot export this model to ONNX; another version may"):
            program = torch.onnx.export(
                model,
                (model.example(),),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=model.names,
                dynamic_shapes=model.dynamic_shapes(),
                verbose=False,
            )
        assert program is not None
        _describe(program.model, output_shapes(extractor, size), description(extractor, size))
        weights = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
        with quietly("this model cannot be saved as ONNX"):
            program.save(folder / name, external_data=weights > ONE_FILE_BYTES)
            onnx.checker.check_model(str(folder / name), full_check=True)


def _describe(model: Any, shapes: Mapping[str, tuple[int, ...]], about: Mapping[str, Any]) -> None:
    """Shapes and metadata as documented; not the source lines and paths that the exporter notes."""
    graph = model.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for part in (graph, *graph.inputs, *graph.outputs, *graph.initializers.values()):
        part.metadata_props.clear()
    found = {value.name: tuple(value.shape[1:]) for value in graph.outputs}
    assert found == shapes, f"{found} instead of {shapes}"
    model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})


def reopen(folder: Path, options: ExportOptions) -> OpenedGraphs:
    """All graphs of a folder in onnxruntime, on the CPU, with as many threads as torch.

    Raises FileNotFoundError if there is none, ValueError if a file is damaged or no ONNX.
    """
    return OpenedGraphs(dict(_open(file) for file in written_files(folder, ".onnx")))


def _open(file: Path) -> tuple[Size, Run]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3  # errors
    wrong = f"{file} ({file.stat().st_size} bytes) is truncated or no ONNX for onnxruntime: export the model again"
    with quietly(wrong):
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        height, width = session.get_inputs()[0].shape[2:]
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        values = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return (height, width), run


def usage(extractor: BackboneExtractor, options: ExportOptions) -> str:
    """From file to features with onnxruntime and numpy."""
    name, size = next(iter(graph_files(extractor, options, ".onnx").items()))
    outputs = outputs_as_code(extractor, size)
    return f"""import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{name}", providers=["CPUExecutionProvider"])
images = np.random.rand(2, 3, {size[0]}, {size[1]}).astype(np.float32)  # any number of images [B 3 H W]: RGB in [0, 1]
mean, std = np.float32({list(extractor.mean)}), np.float32({list(extractor.std)})
images = (images - mean[:, None, None]) / std[:, None, None]
names = [output.name for output in session.get_outputs()]
outputs = dict(zip(names, session.run(names, {{"images": images}})))
{outputs}
"""


def remarks(extractor: BackboneExtractor, options: ExportOptions) -> str:
    """What the files take and hold."""
    return f"""{sizes_as_text(extractor, options)}

Operators are those of ONNX opset {OPSET}. The metadata of a file hold, as JSON, `mean`, `std`, `size`, `stride`,
`backbone` and `provenance`. Weights of more than 1.9 GB lie beside the graph, in a file that ends in `.data`: keep both
together.
"""


TARGET = Target(
    name="onnx",
    about="ONNX graphs of fixed size for any number of images (onnxruntime)",
    tolerance=TOLERANCE,
    refusal=refusal,
    write=write,
    reopen=reopen,
    sizes=written_sizes,
    usage=usage,
    remarks=remarks,
)
