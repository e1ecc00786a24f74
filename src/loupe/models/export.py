"""A model as one ONNX file that stands alone, from uint8 pixels to what it says of them; and running such a file."""

import gc
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from jaxtyping import Float, UInt8
from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from loupe.models.classifiers import Classifier
from loupe.models.detectors.base import Detector

OPSET = 18  # the first whose Resize smooths where it shrinks, as the preprocessing does
INPUT = "images"
PROBABILITIES, ANOMALIES = ("probabilities",), ("anomaly_scores", "anomaly_maps")
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
    """Write a classifier as `export_network` does.

    Its output `probabilities` is float32, (batch, num_labels). Its metadata are `backbone`, and as JSON `labels` and
    `geometry`.

    Args:
        classifier: on the CPU; it is put into evaluation mode, and computes nothing in place from then on.
        example: two images or more, as one alone would freeze the batch size.
        path: its folder is made.
        geometry: how an image file becomes one that is prepared, kept for whoever uses the file.

    Raises:
        onnx.checker.ValidationError: if the exporter wrote what the standard does not allow.
    """
    config = classifier.config
    metadata = {
        "backbone": config.backbone,
        "labels": json.dumps(config.labels),
        "geometry": json.dumps(dict(geometry)),
    }
    export_network(_Predictor(classifier), example, PROBABILITIES, path, metadata)


def export_detector(
    detector: Detector,
    example: UInt8[Tensor, "batch channels height width"],
    path: Path,
    geometry: Mapping[str, Any],
    threshold: float,
) -> None:
    """Write a detector as `export_network` does.

    Its outputs are float32: `anomaly_scores`, (batch,), and `anomaly_maps`, (batch, height, width), in the geometry of
    the prepared images. Its metadata are `detector`, and as JSON `threshold`, above which an image is flagged, and
    `geometry`.

    Args and errors are those of `export_classifier`.
    """
    metadata = {
        "detector": detector.name,
        "threshold": json.dumps(threshold),
        "geometry": json.dumps(dict(geometry)),
    }
    export_network(detector, example, ANOMALIES, path, metadata)


def export_network(
    network: nn.Module,
    example: UInt8[Tensor, "batch channels height width"],
    outputs: Sequence[str],
    path: Path,
    metadata: Mapping[str, str],
) -> None:
    """Write a network as an ONNX file, checked and whole: a reader sees the old file or the new one.

    Its input `images` is uint8, (batch, channels, height, width) with any batch and the sides of prepared images; crop,
    resize and normalisation are inside. Weights of more than 1.5 GB lie beside it in `<name>.data`, because an ONNX
    file can't be larger than 2 GB.
    """
    _leave_inputs_whole(network)
    with _quiet(), _without_garbage_collection():
        program = torch.onnx.export(
            network.eval(),
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic_shapes={INPUT: {0: "batch"}},
        )
        assert program is not None  # the exporter by dynamo gives one
        ClearMetadataAndDocStringPass()(program.model)  # the exporter notes in which files of this machine the code is
    program.model.metadata_props.update(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as folder:
        program.save(Path(folder) / path.name)
        onnx.checker.check_model(Path(folder) / path.name, full_check=True)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights, if apart, before what names them
            file.replace(path.parent / file.name)


def _leave_inputs_whole(network: nn.Module) -> None:
    """ONNX knows no operation in place: to take those of a network apart takes a third of the exporter's time."""
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]


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


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """The exporter makes many objects and needs them all: to look for others takes a fifth of its time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class ExportedModel:
    """An exported file, by onnxruntime on as many of the CPU's cores as torch uses."""

    def __init__(self, path: Path) -> None:
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = ERRORS_ALONE
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, images: UInt8[np.ndarray, "batch channels height width"]) -> list[np.ndarray]:
        """All its outputs for one batch, float32, a row an image."""
        outputs: list[np.ndarray] = self.session.run(None, {INPUT: images})
        return outputs
