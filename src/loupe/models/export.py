"""A classifier as one ONNX file that stands alone, from uint8 pixels to probabilities; and running such a file."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from jaxtyping import Float, Float32, UInt8
from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from loupe.models.classifiers import Classifier

OPSET = 18  # the first whose Resize smooths where it shrinks, as the preprocessing does
INPUT, OUTPUT = "images", "probabilities"
EXPORTERS = ("onnx_ir", "onnxscript")  # they log each node that they fold or drop
ERRORS_ALONE = 3  # onnxruntime's level of logging


class _Predictor(nn.Module):
    """uint8 images to probabilities."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch num_labels"]:
        logits: Tensor = self.classifier(images)
        return logits.softmax(dim=1)


def export_classifier(
    classifier: Classifier,
    example: UInt8[Tensor, "batch channels height width"],
    path: Path,
    geometry: Mapping[str, Any],
) -> None:
    """Write a classifier as an ONNX file, checked and whole: a reader sees the old file or the new one.

    Its input `images` is uint8, (batch, channels, height, width) with any batch and the sides of prepared images; crop,
    resize and normalisation are inside. Its output `probabilities` is float32, (batch, num_labels). Its metadata are
    `backbone`, and as JSON `labels` and `geometry`. Weights of more than 1.5 GB lie beside it in `<name>.data`, because
    an ONNX file can't be larger than 2 GB.

    Args:
        classifier: on the CPU; it is put into evaluation mode.
        example: two images or more, as one alone would freeze the batch size.
        path: its folder is made.
        geometry: how an image file becomes one that is prepared, kept for whoever uses the file.

    Raises:
        onnx.checker.ValidationError: if the exporter wrote what the standard does not allow.
    """
    with _quiet():
        program = torch.onnx.export(
            _Predictor(classifier).eval(),
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: "batch"}},
        )
        assert program is not None  # the exporter by dynamo gives one
        ClearMetadataAndDocStringPass()(program.model)  # the exporter notes in which files of this machine the code is
    config = classifier.config
    program.model.metadata_props.update(
        backbone=config.backbone, labels=json.dumps(config.labels), geometry=json.dumps(dict(geometry))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as folder:
        program.save(Path(folder) / path.name)
        onnx.checker.check_model(Path(folder) / path.name, full_check=True)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights, if apart, before what names them
            file.replace(path.parent / file.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Only the exporters' warnings are logged."""
    loggers = [logging.getLogger(name) for name in EXPORTERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def run_exported(
    path: Path, images: UInt8[np.ndarray, "num_images channels height width"], batch_size: int = 128
) -> Float32[np.ndarray, "num_images num_labels"]:
    """Probabilities that an exported classifier gives, by onnxruntime on as many of the CPU's cores as torch uses."""
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = ERRORS_ALONE
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    parts = [
        session.run([OUTPUT], {INPUT: images[start : start + batch_size]})[0]
        for start in range(0, len(images), batch_size)
    ]
    return np.concatenate(parts)
